"""Work is told by its bytes, so that the time left does not depend on the order of small and large tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from eightfold.format.safetensors import checksum_of_file
from eightfold.progress import Task, by_bytes


class Counted(Task):
    def __init__(self) -> None:
        self.steps, self.calls, self.total, self.names = 0, 0, 0, list[str]()

    def at(self, text: str) -> None:
        self.names.append(text)

    def advance(self, steps: int = 1) -> None:
        self.steps += steps
        self.calls += 1

    @contextmanager
    def __call__(self, title: str, total: int, unit: str) -> Iterator[Task]:
        self.total = total
        yield self


def test_pieces_of_any_size_add_up_to_whole_mebibytes() -> None:
    counted = Counted()
    with by_bytes(counted, "copy", 5 << 20) as task:
        task.at("first")
        seen = []
        for nbytes in (3 << 19, 1, (1 << 20) - 1, 1 << 19, 0, 2 << 20):
            task.advance(nbytes)
            seen.append(counted.steps)
    assert (seen, counted.total, counted.names) == ([1, 1, 2, 3, 3, 5], 5, ["first"])
    assert counted.calls == 4  # many steps at a time would look like great speed


def test_a_checksum_tells_of_each_tensor(tmp_path: Path) -> None:
    told = list[int]()
    path = tmp_path / "a.safetensors"
    save_file({"a": np.zeros(3, np.int8), "b": np.zeros((2, 5), np.float32)}, path)
    assert checksum_of_file(path, told.append) == checksum_of_file(path)
    assert sorted(told) == [3, 40]
