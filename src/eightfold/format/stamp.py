"""What tells a checkpoint from another one, without reading all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from eightfold.format.checkpoint import Checkpoint
from eightfold.format.safetensors import TensorInfo

_MOST = 4096  # tensors that are looked into: a mixture of experts has tens of thousands


def first_values(checkpoint: Checkpoint, most: int) -> Iterator[tuple[TensorInfo, bytes]]:
    """Yield every tensor, in the order of their names, and what it begins with, up to `most` bytes.

    Of many tensors only some are looked into, at equal distances; the others come with nothing. Bytes are read and not
    mapped: a mapping would bring in what lies around them, and so experts that a process may never need.
    """
    step = -(-len(checkpoint.tensors) // _MOST)
    with ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        for at, (_, info) in enumerate(sorted(checkpoint.tensors.items())):
            if at % step:
                yield info, b""
                continue
            if info.file not in files:
                files[info.file] = stack.enter_context(info.file.open("rb", buffering=0))
            files[info.file].seek(info.begin)
            yield info, files[info.file].read(min(most, info.nbytes))
