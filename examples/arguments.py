"""What the command lines below `examples` share: boolean words, and failures in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from eightfold.errors import ConfigError, EightfoldError
from eightfold.parallel.world import World
from eightfold.progress import filtered

EXIT_USER = 2

_OUT_OF_MEMORY = "out of memory. Close other programs, or use a smaller model."


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser that does not print its usage when an argument is wrong."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse has to say.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(message.removeprefix("argument "), action=f"Try: {self.prog} --help")


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that names the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, "", ()) else action.help


def cmd_bool(text: str) -> bool:
    """Read the word True or False; nothing else is a boolean."""
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected True or False")
    return text == "True"


def _speaks() -> bool:
    try:
        return World.of_environment().speaks
    except ConfigError:
        return True


def exit_code(work: Callable[[], int], *more: type[Exception]) -> int:
    """Run a command; return its exit code: what it says itself, or 2 with one line on stderr.

    Nothing that a terminal would obey is printed, as by eightfold itself.

    Args:
        work: the command.
        more: errors that are the user's to mend, besides eightfold's own.
    """
    with filtered(keeps_stdout=True):
        return _exit_code(work, (EightfoldError, OSError, *more))


def _exit_code(work: Callable[[], int], expected: tuple[type[Exception], ...]) -> int:
    try:
        return work()
    except expected as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted"
    except MemoryError:
        message = _OUT_OF_MEMORY
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # torch's way of saying it
            raise
        message = _OUT_OF_MEMORY
    if _speaks():
        print(f"eightfold: {message}", file=sys.stderr)
    return EXIT_USER
