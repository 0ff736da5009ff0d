"""The entry point: commands by name, failures in one line.

Only the command that is asked for is imported, and that imports what it needs when it runs: answers and `--help` come
soon.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any

import typer

from eightfold import __version__
from eightfold.cli.conversion import convert_soon
from eightfold.errors import ConfigError, EightfoldError, kept_work

PROGRAM = "eightfold"  # in messages, however the program was started
EXIT_USER = 2

_NOTHING_LEFT = "nothing was left half-written."

# typer's own copy of click or an installed one, by version: the base of all usage errors either way.
ClickException: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

# Command -> module of eightfold.cli and function.
COMMANDS = {
    "import-gguf": ("importing", "import_gguf"),
    "quantize": ("quantizing", "quantize"),
    "synth": ("synthesizing", "synth"),
    "check": ("checking", "check"),
    "inspect": ("inspecting", "inspect"),
    "run": ("running", "run"),
    "chat": ("chatting", "chat"),
    "serve": ("serving", "serve"),
    "eval": ("evaluate", "evaluate"),
    "bench": ("benching", "bench"),
    "env": ("inspecting", "env"),
}

HELP = ("-h", "--help")

# What several processes do together; another command in each of them would only be in the others' way.
SHARED = frozenset({"quantize", "run", "serve", "bench"})


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"eightfold {__version__}")
        raise typer.Exit()


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a Python traceback with an error.")] = False,
) -> None:
    """Take the options that stand before the command."""


def program(arguments: Sequence[str] = ()) -> typer.Typer:
    """Return the program: with the command that the arguments name, or else with all."""
    app = typer.Typer(
        name=PROGRAM,
        help="8-bit LLM checkpoints in the Ascend / MindIE format: make them, look into them, run them on a CPU.",
        epilog="Start: eightfold quantize FLOAT_DIR OUT --scheme w8a8-dynamic; eightfold run OUT --chat --prompt Hello",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": list(HELP)},
        callback=_options,
    )
    command = _command(arguments)
    for name in [command] if command else COMMANDS:
        module, function = COMMANDS[name]
        app.command(name)(getattr(importlib.import_module(f"eightfold.cli.{module}"), function))
    return app


def _command(arguments: Sequence[str]) -> str:
    """Return the command that is asked for; "" for none, one that is not there, or help on all."""
    for argument in arguments:
        if not argument.startswith("-"):
            return argument if argument in COMMANDS else ""
        if argument in HELP:
            break
    return ""


def _require_one_process(command: str) -> None:
    from eightfold.parallel.world import World

    # Other launchers set WORLD_SIZE for whatever runs below them.
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("LOCAL_WORLD_SIZE", "1") != "1"
    if command and command not in SHARED and is_launched and (size := World.of_environment().size) > 1:
        raise ConfigError(command, got=f"{size} processes", expected="one", action="Start it without torchrun.")


class _Stopped(BaseException):
    """A signal to end, so that what is half-written goes away; of KeyboardInterrupt typer would say nothing."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped("interrupted" if number == signal.SIGINT else "terminated")


def main() -> int:
    """Run the command line; return the exit code: 0, or 2 with one line on stderr."""
    previous = {
        number: signal.signal(number, _stop)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        return _run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run() -> int:
    debug = "--debug" in sys.argv
    try:
        _require_one_process(_command(sys.argv[1:]))
        command = typer.main.get_command(program(sys.argv[1:]))
        convert_soon(command)
        code = command(prog_name=PROGRAM, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except ClickException as error:
        return _usage_error(error)
    except _Stopped as stop:
        return _fail(f"{stop}: {kept_work(stop) or f'{_NOTHING_LEFT} Run the same command to start again.'}", debug)
    except EightfoldError as error:
        return _fail(f"{error} {kept_work(error) or ''}", debug)
    except BrokenPipeError:
        sys.stderr.close()  # the reader has left; there is nobody to tell
        return EXIT_USER
    except OSError as error:
        return _fail(_system_error(error), debug)
    except MemoryError as error:
        return _fail(_out_of_memory(error), debug)
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # torch's way of saying it
            raise
        return _fail(_out_of_memory(error), debug)


def _out_of_memory(error: BaseException) -> str:
    return f"out of memory: {kept_work(error) or _NOTHING_LEFT} Close other programs, or use a smaller model."


def _fail(message: str, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    if _speaks():
        print(f"eightfold: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER


def _speaks() -> bool:
    """Whether this process tells the user: of several that share a model, one does."""
    from eightfold.parallel.world import World

    try:
        return World.of_environment().speaks
    except EightfoldError:
        return True


def _usage_error(error: Any) -> int:
    message = error.format_message()
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else PROGRAM
    if not message:  # no arguments: the help has been shown
        error.show()
        return EXIT_USER
    if not _speaks():
        return EXIT_USER
    text = " ".join(message.split())
    print(f"eightfold: {text}{'' if text[-1] in '.?!' else '.'} Try: {path} --help", file=sys.stderr)
    return EXIT_USER


def _system_error(error: OSError) -> str:
    where = f" in {error.filename}" if error.filename else ""
    left = kept_work(error) or _NOTHING_LEFT
    advice = {
        errno.ENOSPC: f"Free some space, or choose another disk; {left}",
        errno.EDQUOT: f"Your disk quota is used up; {left}",
        errno.EFBIG: f"The file size limit is too small; {left}",
        errno.EACCES: "Check the permissions.",
        errno.ENOMEM: f"Close other programs, or use a smaller model; {left}",
        errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    }.get(error.errno or 0, kept_work(error) or "")
    return f"{error.strerror or error}{where}. {advice}".strip()


if __name__ == "__main__":
    sys.exit(main())
