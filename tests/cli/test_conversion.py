"""Plain values of options become what typer makes of them, without what typer needs for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import typer

from eightfold.cli.conversion import _has_hook, convert_soon
from tests.conftest import tiny_config, write_model


class Color(str, Enum):
    red = "red"
    blue = "blue"


def command(
    where: Annotated[Path, typer.Argument()],
    text: Annotated[str | None, typer.Option()] = None,
    count: Annotated[int, typer.Option(min=1, max=9)] = 3,
    free: Annotated[int | None, typer.Option()] = None,
    clamped: Annotated[int, typer.Option(min=1, clamp=True)] = 5,
    share: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    color: Annotated[Color, typer.Option()] = Color.red,
    loose: Annotated[Color, typer.Option(case_sensitive=False)] = Color.red,
    names: Annotated[list[str] | None, typer.Option()] = None,
    fresh: Annotated[Path | None, typer.Option(exists=True)] = None,
    real: Annotated[Path | None, typer.Option(resolve_path=True)] = None,
    folder: Annotated[Path | None, typer.Option(file_okay=False)] = None,
    file: Annotated[Path | None, typer.Option(dir_okay=False)] = None,
    out: Annotated[Path | None, typer.Option(writable=True)] = None,
    flag: Annotated[bool, typer.Option("--flag")] = False,
    pair: Annotated[bool, typer.Option()] = True,
    parsed: Annotated[int, typer.Option(parser=lambda text: len(str(text)))] = 7,
) -> Any:
    return repr(locals())


def outcome(arguments: list[str], soon: bool) -> Any:
    """Return the values that the command gets, or the line that says what is wrong."""
    app = typer.Typer(add_completion=False)
    app.command()(command)
    made = typer.main.get_command(app)
    if soon:
        convert_soon(made)
    try:
        return made(arguments, prog_name="p", standalone_mode=False)
    except Exception as error:
        return type(error).__name__, getattr(error, "format_message", error.__str__)()


ARGUMENTS = [
    [],
    ["DIR"],
    ["."],
    [""],
    ["a\0b"],
    ["DIR", "--text", ""],
    ["DIR", "--text", "é "],
    *(["DIR", "--count", text] for text in ("1", "9", "0", "10", "007", "+4", " 5", "5.0", "1_0", "x", "", "٣")),
    *(["DIR", "--free", text] for text in ("-12", "9" * 18, "9" * 19, "9" * 5000, "1e3", "true")),
    *(["DIR", "--clamped", text] for text in ("0", "6")),
    *(["DIR", "--share", text] for text in ("0.5", "1", "1.5", "nan", "half")),
    *(["DIR", "--color", text] for text in ("blue", "BLUE", "green", "Color.blue", "")),
    *(["DIR", "--loose", text] for text in ("blue", "BLUE", "green")),
    ["DIR", "--names", "a", "--names", "b"],
    *(
        ["DIR", f"--{name}", text]
        for name in ("fresh", "real", "folder", "file")
        for text in (".", "nothing-there", __file__)
    ),
    ["DIR", "--file", "a" * 300],
    ["DIR", "--out", "/proc/version"],
    ["DIR", "--flag"],
    ["DIR", "--no-pair"],
    ["DIR", "--parsed", "four"],
    ["DIR", "--unknown"],
    ["DIR", "more"],
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: " ".join(arguments)[:40])
def test_values_and_messages_are_those_of_typer(arguments):
    assert outcome(arguments, soon=True) == outcome(arguments, soon=False)


def test_a_file_that_may_not_be_read_or_written_is_what_typer_says_it_is(tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for somebody who is not root
    for arguments in ([str(closed)], ["DIR", "--out", str(closed)]):
        found = outcome(arguments, soon=True)
        assert found == outcome(arguments, soon=False)
        assert str(closed) in found[1]


def test_without_the_hook_typer_converts_everything():
    """Its names are typer's own affair: where one is missing, nothing is put in its place."""
    described = SimpleNamespace(annotation=str, parameter_info=None)
    whole = {"_runtime_param": None, "get_runtime_param": print, "type_descriptor": described}
    assert _has_hook(SimpleNamespace(**whole))
    for name in whole:
        assert not _has_hook(SimpleNamespace(**{key: value for key, value in whole.items() if key != name}))
    for half in (SimpleNamespace(annotation=str), SimpleNamespace(parameter_info=None)):
        assert not _has_hook(SimpleNamespace(**{**whole, "type_descriptor": half}))


def test_a_prompt_is_answered_without_pydantic(tmp_path):
    write_model(tmp_path / "m", tiny_config())
    code = (
        "import sys\nfrom eightfold.cli.main import main\n"
        "sys.argv = 'eightfold run m --prompt x --max-new-tokens 3 --threads 1 --backend native --json'.split()\n"
        "assert main() == 0\nprint('pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    answer, has_pydantic = done.stdout.splitlines()
    assert len(json.loads(answer)["token_ids"]) == 3
    assert has_pydantic == "False"
