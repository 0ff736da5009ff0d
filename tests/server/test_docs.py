"""What docs/serving.md says of fields is what the server does."""

from __future__ import annotations

import re
from pathlib import Path

from eightfold.server import fields

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def test_the_refused_fields_are_those_of_the_page():
    listed = TEXT.partition("<!-- refused fields")[2].partition("-->")[2].partition("Every other")[0]
    assert re.findall(r"`(\w+)`", listed) == sorted(fields.REFUSED)


def test_every_option_is_on_the_page():
    from eightfold.cli.options import flags_of
    from eightfold.cli.serving import ServeCommand

    flags = flags_of(ServeCommand)
    assert len(flags) > 15
    assert [flag for flag in flags.values() if flag not in TEXT and f"--no-{flag[2:]}" not in TEXT] == []


def test_every_metric_is_on_the_page(serve):
    samples = re.findall(r"^# TYPE eightfold_(\w+) (\w+)", serve().http.get("/metrics").text, re.MULTILINE)
    assert len(samples) > 15
    for name, kind in samples:
        assert (kind == "gauge" and name.endswith("_created")) or f"`{name}" in TEXT, name
