"""What a person sees: progress bars, notes, errors in one line, JSON for programs."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from eightfold.errors import DependencyError
from eightfold.progress import SilentTask, Task

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


def note(text: str) -> None:
    """Tell the user something that is not an error."""
    print(f"note: {' '.join(text.split())}", file=sys.stderr)


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON document as one line of stdout; what is not a number becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
    print(json.dumps(finite, ensure_ascii=False, allow_nan=False), flush=True)


class _BarTask:
    def __init__(self, bar: RichProgress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def at(self, text: str) -> None:
        self._bar.update(self._task, now=text)

    def advance(self) -> None:
        done = self._bar.tasks[self._task]
        self._bar.advance(self._task)
        speed = done.speed
        self._bar.update(self._task, rate=f"{speed:.1f}/s" if speed else "")


@contextmanager
def bars(title: str, total: int, unit: str) -> Iterator[Task]:
    """Show a progress bar on stderr with what is being done, speed and time left; nothing when it is no terminal."""
    if not sys.stderr.isatty():
        yield SilentTask()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(f"{unit}s  {{task.fields[rate]}}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}", style="dim"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _BarTask(bar, bar.add_task(title, total=total, now="", rate=""))


def require_torch(command: str) -> None:
    """Import torch for a command, with a malloc that does not hoard and threads that do not spin.

    Raises:
        DependencyError: it is not installed.
    """
    from eightfold.machine import tame_malloc

    tame_malloc()
    # OpenMP's threads spin while they wait for each other. With one core busy elsewhere that was measured to take
    # three times as long as waiting asleep; on an idle machine the difference is small.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        import torch  # noqa: F401
    except ImportError:
        raise DependencyError(
            f"eightfold {command} needs torch",
            got="none installed",
            action="Install it: pip install 'eightfold[quantize]'",
        ) from None


@contextmanager
def loading() -> Iterator[None]:
    """Load a model, soon.

    Garbage is not looked for meanwhile: what loading makes stays, and looking through it takes 15 ms. numpy gets a BLAS
    of one thread, as nothing is multiplied with it: other threads spin for 50 ms when they start, on cores that are
    needed then.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        _import_numpy()
        yield
    finally:
        if collects:
            gc.enable()


def _import_numpy() -> None:
    threads = "OPENBLAS_NUM_THREADS"
    if "numpy" in sys.modules or threads in os.environ:
        return
    os.environ[threads] = "1"
    try:
        import numpy  # noqa: F401
    finally:
        del os.environ[threads]  # torch may bring a BLAS of its own


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right_from: int) -> list[str]:
    """Return the lines of a plain table; columns from `right_from` on are flush right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(c.rjust(w) if i >= right_from else c.ljust(w) for i, (c, w) in enumerate(cells)).rstrip()

    return [line(row) for row in (header, *rows)]


def size_text(nbytes: int) -> str:
    """Return a size in the unit a person would choose, powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}" if unit == "GB" else f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} B"
