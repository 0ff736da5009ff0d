"""`eightfold completion`: what a shell needs to complete our commands, options and their values."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from eightfold.cli.options import Option, argument, options_of
from eightfold.errors import DependencyError
from eightfold.values import PATH, choice

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True, kw_only=True)
class CompletionCommand:
    """Print a script that completes commands, options and their values in a shell.

    Example: eightfold completion bash > ~/.local/share/bash-completion/completions/eightfold

    For zsh: eightfold completion zsh > ~/.zfunc/_eightfold, with fpath+=~/.zfunc before compinit in ~/.zshrc. For
    fish: eightfold completion fish > ~/.config/fish/completions/eightfold.fish. Print it anew after an update.
    """

    shell: str = argument("SHELL", "bash, zsh or fish.", choice(*SHELLS))

    def execute(self) -> None:
        try:
            import shtab
        except ImportError:
            raise DependencyError(
                "eightfold completion needs shtab",
                got="none installed",
                action="Install it: pip install 'eightfold[completion]'",
            ) from None
        print(shtab.complete(_parser(shtab.FILE), shell=self.shell))


def _parser(files: Any) -> argparse.ArgumentParser:
    """Return all commands in the words of argparse, which shtab knows.

    Args:
        files: what shtab calls the completion of paths.
    """
    from eightfold.cli.main import COMMANDS, OWN_OPTIONS, PROGRAM, command_type

    program = argparse.ArgumentParser(PROGRAM)
    for flag, text in OWN_OPTIONS.items():
        program.add_argument(flag, action="store_true", help=text)
    commands = program.add_subparsers()
    for name in COMMANDS:
        command = command_type(name)
        summary = (command.__doc__ or "").partition(".")[0]
        parser = commands.add_parser(name, help=summary, description=summary)
        for option in options_of(command):
            _add(parser, option, files)
    return program


def _add(parser: argparse.ArgumentParser, option: Option, files: Any) -> None:
    summary = str(option.row["help"]).partition(". ")[0]
    if option.kind.types == (bool,):
        for flag in option.flags:
            parser.add_argument(flag, action="store_true", help=summary)
        return
    names = [option.name] if option.is_argument else [*option.flags]
    added = parser.add_argument(*names, choices=option.kind.choices or None, help=summary)
    if option.kind is PATH:
        added.complete = files  # type: ignore[attr-defined]
