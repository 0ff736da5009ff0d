"""What tells checkpoints apart is read beside the mapping, and of many tensors only in part."""

from __future__ import annotations

from pathlib import Path

import pytest

from eightfold.format import stamp
from eightfold.format.checkpoint import Checkpoint
from tests.conftest import tiny_config, write_model


@pytest.mark.parametrize(("most", "expected"), [(4096, 21), (10, 7), (1, 1)])
def test_first_values(tmp_path, monkeypatch, most, expected):
    monkeypatch.setattr(stamp, "_MOST", most)
    checkpoint = Checkpoint.open(write_model(tmp_path / "model", tiny_config(), tokenizer=False))
    found = list(stamp.first_values(checkpoint, 8))
    assert [info.name for info, _ in found] == sorted(checkpoint.tensors)
    told = [(info, begins) for info, begins in found if begins]
    assert (len(found), len(told)) == (21, expected)
    for info, begins in told:
        assert begins == checkpoint.array(info.name).tobytes()[:8]


def test_nothing_is_mapped(tmp_path):
    directory = write_model(tmp_path / "model", tiny_config(vocab_size=100_000), tokenizer=False)
    checkpoint = Checkpoint.open(directory)
    assert sum(len(begins) for _, begins in stamp.first_values(checkpoint, 1 << 16)) > 1 << 16
    assert resident(directory) == 0
    checkpoint.array("model.embed_tokens.weight").sum()
    assert resident(directory) > 0  # or nothing would be seen


def resident(directory: Path) -> int:
    """Return how much of the files in a directory this process has mapped and read."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = str(directory) in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total
