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
    import inspect

    from eightfold.cli.serving import serve

    for name in inspect.signature(serve).parameters:
        option = f"--{name.replace('_', '-')}"
        assert name == "model" or option in TEXT or option.replace("--", "--no-") in TEXT, option


def test_every_metric_is_on_the_page(serve):
    samples = re.findall(r"^# TYPE eightfold_(\w+) (\w+)", serve().http.get("/metrics").text, re.MULTILINE)
    assert len(samples) > 15
    for name, kind in samples:
        assert (kind == "gauge" and name.endswith("_created")) or f"`{name}" in TEXT, name
