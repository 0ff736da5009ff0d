"""How work reports its steps without knowing who listens; and what a terminal is shown: a bar of them, and safe text.

Names, answers and errors come from models, files and clients, and may hold characters that a terminal obeys. The
command line therefore prints through Filtered, and nothing else has to think of it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


# What a terminal obeys instead of showing it: control characters but tab and newline (C0, DEL, C1), and those that turn
# the direction of the text around them.
_OBEYED = (*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
CONTROLS = dict.fromkeys(set(_OBEYED) - {ord("\t"), ord("\n")})


def printable(text: str) -> str:
    """Return a text without the characters that a terminal obeys."""
    return text if text.isascii() and text.isprintable() else text.translate(CONTROLS)


class Filtered:
    """A stream to which only printable text is written; in all else it is the stream below."""

    def __init__(self, stream: TextIO) -> None:
        self.unfiltered = stream

    def write(self, text: str) -> int:
        return self.unfiltered.write(printable(text))

    def writelines(self, lines: Iterable[str]) -> None:
        self.unfiltered.writelines(map(printable, lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unfiltered, name)


def unfiltered(stream: TextIO) -> TextIO:
    """Return what is below a filter, for escapes of our own."""
    below: TextIO = getattr(stream, "unfiltered", stream)
    return below


@contextmanager
def filtered(*, keeps_stdout: bool) -> Iterator[None]:
    """Print only what a terminal does not obey.

    Args:
        keeps_stdout: stdout is for programs, which get every byte, unless it is a terminal.
    """
    previous = sys.stdout, sys.stderr
    for name, keeps in (("stdout", keeps_stdout), ("stderr", False)):
        stream = getattr(sys, name)
        if stream is not None and not (keeps and not stream.isatty()):  # None: it was closed before we began
            setattr(sys, name, Filtered(stream))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = previous


class Task:
    """A piece of work with a known number of steps; this one is shown to nobody."""

    def at(self, text: str) -> None:
        """Say what is being done now."""

    def advance(self, steps: int = 1) -> None:
        """Say that so many steps are done."""


class ByteTask:
    """A task whose steps are MiB: tensors and files differ too much to be counted alike."""

    def __init__(self, task: Task) -> None:
        self.at, self._task, self._nbytes = task.at, task, 0

    def advance(self, nbytes: int) -> None:
        """Say that so many more bytes are done."""
        before, self._nbytes = self._nbytes, self._nbytes + nbytes
        # At once, as a bar takes many steps in no time for speed.
        if steps := (self._nbytes >> 20) - (before >> 20):
            self._task.advance(steps)


@contextmanager
def by_bytes(progress: Progress, title: str, nbytes: int) -> Iterator[ByteTask]:
    """Open a task of so many bytes."""
    with progress(title, nbytes >> 20, "MiB") as task:
        yield ByteTask(task)


# Opens a task: (title, number of steps, name of a step).
Progress = Callable[[str, int, str], AbstractContextManager[Task]]


@contextmanager
def silent(title: str, total: int, unit: str) -> Iterator[Task]:
    """Open a task that is shown to nobody."""
    yield Task()


class _BarTask(Task):
    def __init__(self, bar: RichProgress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def at(self, text: str) -> None:
        self._bar.update(self._task, now=printable(text))

    def advance(self, steps: int = 1) -> None:
        done = self._bar.tasks[self._task]
        self._bar.advance(self._task, steps)
        speed = done.speed
        self._bar.update(self._task, rate=f"{speed:.1f}/s" if speed else "")


@contextmanager
def bars(title: str, total: int, unit: str, after: float = 0.0) -> Iterator[Task]:
    """Show a bar on stderr with what is being done, speed and time left; nothing where that is no terminal.

    Args:
        title: the work.
        total: number of steps.
        unit: name of a step.
        after: seconds until the bar appears: work that is done before is not worth one.
    """
    if not sys.stderr.isatty():
        yield Task()
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TextColumn(f"{unit if unit == 'MiB' else f'{unit}s'}  {{task.fields[rate]}}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[now]}", style="dim", markup=False),
    )
    # rich's own way of printing above a bar would lead past the filter.
    terminal = Console(file=unfiltered(sys.stderr))
    bar = progress.Progress(*columns, console=terminal, transient=True, redirect_stdout=False, redirect_stderr=False)
    task = _BarTask(bar, bar.add_task(title, total=total, now="", rate=""))
    starter = threading.Timer(after, bar.start)
    starter.start()
    try:
        yield task
    finally:
        starter.cancel()
        starter.join()
        bar.stop()
