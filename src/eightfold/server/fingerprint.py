"""What `system_fingerprint` says: a name for the program, the checkpoint and the template that answer."""

from __future__ import annotations

import hashlib
from pathlib import Path

from eightfold import __version__

_SAMPLES, _SAMPLE_BYTES = 8, 4096  # of a file of weights: reading all of it would take as long as loading it
_OURS = "eightfold_"  # reports of how a checkpoint was made, which answer nothing


def fingerprint(directory: Path, template: str | None, *arithmetic: str) -> str:
    """Return a name that stays the same as long as the same program answers with the same model and arithmetic.

    Of weights, and of other large files, it takes samples.
    """
    found = hashlib.sha256(f"{__version__}\n{template}\n{arithmetic}".encode("utf-8", "replace"))
    for path in sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith(_OURS)):
        size = path.stat().st_size
        found.update(f"{path.name}\n{size}\n".encode("utf-8", "replace"))
        with path.open("rb") as file:
            for at in range(_SAMPLES):
                file.seek(max(size - _SAMPLE_BYTES, 0) * at // (_SAMPLES - 1))
                found.update(file.read(_SAMPLE_BYTES))
    return f"fp_{found.hexdigest()[:12]}"
