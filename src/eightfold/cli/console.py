"""What a person sees: notes, JSON for programs, and tables; and what every command does before it loads a model."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.errors import DependencyError, clipped
from eightfold.progress import CONTROLS
from eightfold.progress import bars as bars

if TYPE_CHECKING:
    from eightfold.format.checkpoint import Checkpoint


def note(text: str) -> None:
    """Tell the user something that is not an error."""
    print(f"note: {clipped(text)}", file=sys.stderr)


def opened(model: Path) -> Checkpoint:
    """Open a model directory, and say what a user should know of its files."""
    from eightfold.format.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model)
    for text in checkpoint.notes:
        note(text)
    return checkpoint


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON document as one line of stdout; what is not a number becomes null.

    Control characters are escaped, also those that JSON does not mind: the line may be read in a terminal.
    """
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
    text = json.dumps(finite, ensure_ascii=False, allow_nan=False)
    print(text.translate({code: f"\\u{code:04x}" for code in CONTROLS}), flush=True)


def require_torch(command: str) -> None:
    """Import torch for a command, with a malloc that does not hoard and threads that do not spin.

    Raises:
        DependencyError: it is not installed.
    """
    from eightfold.machine import tame_malloc
    from eightfold.model.native import name_cut_files

    tame_malloc()
    name_cut_files()
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


MAX_LINE_BYTES = 16 << 20  # of a prompt, in a pipe or a file
