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
from dataclasses import replace
from types import FrameType
from typing import Any

from eightfold import __version__
from eightfold.cli import options
from eightfold.errors import ConfigError, EightfoldError, clipped, kept_work
from eightfold.progress import filtered

PROGRAM = "eightfold"  # in messages, however the program was started
EXIT_FAULT, EXIT_USER = 1, 2

_NOTHING_LEFT = "nothing was left half-written."

HEADER = "8-bit LLM checkpoints in the Ascend / MindIE format: make them, inspect them, run them on a CPU."
START = "Start: eightfold quantize FLOAT_DIR OUT --scheme w8a8-dynamic; eightfold run OUT --chat --prompt Hello"
FIRST_HOUR = [
    (
        "eightfold quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm2 --scheme w8a8-dynamic",
        "Fetch a small model and make it 8-bit; a directory of your own works too.",
    ),
    ("eightfold chat smollm2", "Talk to it."),
    ("eightfold serve smollm2", "OpenAI's API, and a chat page: http://127.0.0.1:8000 in a browser."),
]
MORE = (
    "pip install 'eightfold[all]' installs what these need; eightfold doctor says what this machine lacks. "
    "All commands: eightfold --help. One of them: eightfold quantize --help."
)

# Command -> module of eightfold.cli and dataclass.
COMMANDS = {
    "export": ("exporting", "ExportCommand"),
    "convert": ("exporting", "ConvertCommand"),
    "import": ("exporting", "ImportCommand"),
    "import-gguf": ("exporting", "ImportGgufCommand"),
    "quantize": ("quantizing", "QuantizeCommand"),
    "analyze": ("analyzing", "AnalyzeCommand"),
    "synth": ("making", "SynthCommand"),
    "check": ("inspecting", "CheckCommand"),
    "inspect": ("inspecting", "InspectCommand"),
    "run": ("running", "RunCommand"),
    "chat": ("chatting", "ChatCommand"),
    "serve": ("serving", "ServeCommand"),
    "eval": ("measuring", "EvaluateCommand"),
    "bench": ("measuring", "BenchCommand"),
    "push": ("pushing", "PushCommand"),
    "env": ("inspecting", "EnvCommand"),
    "doctor": ("inspecting", "DoctorCommand"),
    "completion": ("completing", "CompletionCommand"),
}

# Before the command.
OWN_OPTIONS = {"--version": "Show the version and exit.", "--debug": "Show a Python traceback with an error."}

# What several processes do together; another command in each of them would only be in the others' way.
SHARED = frozenset({"quantize", "run", "serve", "bench"})

# Their stdout is what a model says.
ANSWERING = frozenset({"run", "chat"})


def command_type(name: str) -> Any:
    """Return the dataclass of a command."""
    module, kind = COMMANDS[name]
    return getattr(importlib.import_module(f"eightfold.cli.{module}"), kind)


def program_help() -> str:
    """Return the help on all commands."""
    commands = [(name, (command_type(name).__doc__ or "").partition(".")[0] + ".") for name in COMMANDS]
    own = [
        *OWN_OPTIONS.items(),
        (", ".join(options.HELP), "Show this help, or after a command that command's help, and exit."),
    ]
    usage = f"Usage: {PROGRAM} [OPTIONS] COMMAND ..."
    parts = [usage, HEADER, options.listing("Commands", commands), options.listing("Options", own), START]
    return "\n\n".join(options.filled(part) if part in (HEADER, START) else part for part in parts)


def first_hour() -> str:
    """Return what somebody sees who types the program's name alone."""
    return "\n\n".join([options.filled(HEADER), options.listing("The first hour", FIRST_HOUR), options.filled(MORE)])


def _command(words: Sequence[str]) -> str:
    """Return the first word that is no option; "" for none, or where help on all is asked for."""
    before = next((number for number, word in enumerate(words) if not word.startswith("-")), len(words))
    return "" if before == len(words) or set(words[:before]) & {*options.HELP, "--version"} else words[before]


def _require_one_process(command: str) -> None:
    from eightfold.parallel.world import World

    # Other launchers set WORLD_SIZE for whatever runs below them.
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("LOCAL_WORLD_SIZE", "1") != "1"
    if command and command not in SHARED and is_launched and (size := World.of_environment().size) > 1:
        raise ConfigError(command, got=f"{size} processes", expected="one", action="Start it without torchrun.")


class _Stopped(BaseException):
    """A signal to end: it unwinds the command, so that half-written files are removed, and is told in one line."""


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
        with filtered(keeps_stdout=_command(sys.argv[1:]) in ANSWERING):
            try:
                return _run()
            except Exception:  # a fault of ours
                import traceback

                traceback.print_exc()  # within the filter: it quotes what was read
                return EXIT_FAULT
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run() -> int:
    debug, flags = "--debug" in sys.argv, dict[str, str]()
    try:
        name = _command(sys.argv[1:])
        _require_one_process(name)
        words = _own_options(sys.argv[1:], name)
        if not name:
            return _overview(words)
        kind, program = command_type(name), f"{PROGRAM} {name}"
        flags = options.flags_of(kind)
        command = options.parse(kind, words, program)
        if command is None:
            print(options.help_text(kind, program))
            return 0
        return with_models_here(command).execute() or 0
    except _Stopped as stop:
        return _fail(f"{stop}: {kept_work(stop) or f'{_NOTHING_LEFT} Run the same command to start again.'}", debug)
    except EightfoldError as error:
        return _fail(f"{options.in_flags(error, flags)} {kept_work(error) or ''}", debug)
    except BrokenPipeError:
        # The reader has left; there is nobody to tell, nor one for what is flushed at the end of the process.
        sys.stderr.close()
        if sys.__stdout__ is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
        return EXIT_USER
    except OSError as error:
        return _fail(_system_error(error), debug)
    except MemoryError as error:
        return _fail(_out_of_memory(error), debug)
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # torch's way of saying it
            raise
        return _fail(_out_of_memory(error), debug)


def with_models_here(command: options.AnyCommand) -> options.AnyCommand:
    """Return a command with directories in the place of hub ids, whose models are fetched."""
    from eightfold.hub.names import id_of

    ids = {name: model for name, path in options.models_of(command).items() if (model := id_of(path)) is not None}
    if not ids:
        return command
    from eightfold.cli.console import note
    from eightfold.hub.choice import chosen_hub
    from eightfold.hub.fetch import fetched

    here: dict[str, Any] = {name: fetched(model, chosen_hub(), note) for name, model in ids.items()}
    return replace(command, **here)


def _own_options(words: Sequence[str], command: str) -> Sequence[str]:
    """Check what stands before the command, and the command; return what stands behind it, or else all.

    Raises:
        ConfigError: the command, or an option before it, is unknown.
    """
    before = words.index(command) if command else len(words)
    known = [*OWN_OPTIONS, *options.HELP]
    with options.usage_of(PROGRAM):
        for word in words[:before]:
            if word in (*options.HELP, "--version"):
                break  # what stands behind them does not matter
            if word not in known:
                raise options.unknown("option before the command", word, known)
        if command and command not in COMMANDS:
            raise options.unknown("command", command, COMMANDS)
    return words[before + 1 :] if command else words


def _overview(words: Sequence[str]) -> int:
    """Do what is asked for without a command."""
    asked = next((word for word in words if word in (*options.HELP, "--version")), "")
    if asked == "--version":
        print(f"{PROGRAM} {__version__}")
    else:
        print(program_help() if asked else first_hour())
    return 0 if asked else EXIT_USER


def _out_of_memory(error: BaseException) -> str:
    return f"out of memory: {kept_work(error) or _NOTHING_LEFT} Close other programs, or use a smaller model."


def _fail(message: str, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    if _speaks():
        print(f"eightfold: {clipped(message)}", file=sys.stderr)
    return EXIT_USER


def _speaks() -> bool:
    """Whether this process tells the user: of several that share a model, one does."""
    from eightfold.parallel.world import World

    try:
        return World.of_environment().speaks
    except EightfoldError:
        return True


def _system_error(error: OSError) -> str:
    where = f" in {error.filename}" if error.filename else ""
    left = kept_work(error) or _NOTHING_LEFT
    advice = {
        errno.ENOSPC: f"Free some space, or choose another disk; {left}",
        errno.EIO: f"A disk of the model or of OUT fails: see the system's log; {left}",
        errno.EDQUOT: f"Your disk quota is used up; {left}",
        errno.EFBIG: f"The file size limit is too small; {left}",
        errno.EACCES: "Check the permissions.",
        errno.ENOMEM: f"Close other programs, or use a smaller model; {left}",
        errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    }.get(error.errno or 0, kept_work(error) or "")
    return f"{error.strerror or error}{where}. {advice}".strip()


if __name__ == "__main__":
    sys.exit(main())
