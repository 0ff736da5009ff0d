"""What docs/serving.md says of fields is what the server does."""

from __future__ import annotations

import re
from pathlib import Path

from eightfold.server.field_table import FIELDS, RESPONSES

OF_RESPONSES = [field for field in FIELDS if field.paths == {RESPONSES}]
OTHERS = [field for field in FIELDS if field.paths != {RESPONSES}]
TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def test_the_refused_fields_are_those_of_the_page():
    listed = re.findall(
        r"`([\w.]+)`", TEXT.partition("<!-- refused fields")[2].partition("-->")[2].partition("Every other")[0]
    )
    assert sorted(listed) == sorted({field.name for field in OTHERS if field.is_refused})


def test_the_fields_that_are_obeyed_are_those_of_the_page():
    table = TEXT.partition("<!-- fields:")[2].partition("<!-- refused fields")[0]
    named = set(re.findall(r"`([\w.]+)`", table))
    known = [field for field in OTHERS if not field.is_refused]
    obeyed = {name for field in known for name in (field.name, *field.also)}
    assert obeyed <= named
    first = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert set(re.findall(r"`([\w.]+)`", " ".join(first))) <= obeyed


def test_the_fields_of_responses_are_those_of_the_page():
    rows = [row for row in TEXT.partition("\n## Responses\n")[2].partition("\n## ")[0].splitlines() if row[:3] == "| `"]
    named = {name for row in rows for name in re.findall(r"`([\w.]+)`", row.split("|")[1])}
    assert {field.name for field in OF_RESPONSES} - {"max_tokens", "text.verbosity"} <= named | {"text"}
    everywhere = {field.name for field in FIELDS if RESPONSES in field.paths} | {"max_output_tokens"}
    assert named <= everywhere | {"message.output_text.logprobs"}


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
