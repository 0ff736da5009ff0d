"""The journal's lines, its lock, and what an unfinished directory is told."""

from __future__ import annotations

import fcntl
import os
from typing import Any

import pytest

from eightfold.errors import CheckpointError
from eightfold.format.journal import JOURNAL_NAME, Journal, layers_done, parse, read_entries, render, require_finished

HEAD = {"format": 1, "layers": 3, "recipe": {"scheme": "w8a8"}}
LINES: list[dict[str, Any]] = [HEAD, {"step": "embedding"}, {"step": "layer 0", "é": 0.1 + 0.2}, {"step": "layer 1"}]


def written(tmp_path, lines=LINES):
    journal = Journal(tmp_path)
    for line in lines:
        journal.append(line)
    journal.close()
    return tmp_path / JOURNAL_NAME


def test_entries_come_back_as_they_were(tmp_path):
    written(tmp_path)
    journal = Journal(tmp_path)
    assert journal.entries == LINES
    assert journal.head == HEAD
    assert list(journal.steps) == ["embedding", "layer 0", "layer 1"]
    assert journal.complete is None
    assert layers_done(journal.entries) == 2
    journal.close()


def test_each_line_stands_alone_and_in_ascii(tmp_path):
    blob = written(tmp_path).read_bytes()
    assert blob == b"".join(map(render, LINES))
    assert blob.isascii()
    assert blob.count(b"\n") == len(LINES)


def test_a_journal_cut_anywhere_keeps_its_whole_lines():
    blob = b"".join(map(render, LINES))
    ends = [len(b"".join(map(render, LINES[:n]))) for n in range(len(LINES) + 1)]
    for length in range(len(blob) + 1):
        entries, end = parse(blob[:length])
        whole = sum(end <= length for end in ends[1:])
        assert (entries, end) == (LINES[:whole], ends[whole])


def test_a_journal_with_any_changed_byte_ends_before_that_line():
    blob = b"".join(map(render, LINES))
    first = len(render(LINES[0]))
    for at in range(first, first + len(render(LINES[1]))):
        damaged = bytearray(blob)
        damaged[at] ^= 1
        assert parse(bytes(damaged)) == (LINES[:1], first)


@pytest.mark.parametrize(
    "torn", [b"{", b'{"step": 1}', b"null\n", b"[1]\n", b'{"step": 1}\n', b"\xff\n", b"[" * 99_999]
)
def test_what_is_no_line_is_written_over(tmp_path, torn):
    path = written(tmp_path, LINES[:2])
    with path.open("ab") as file:
        file.write(torn)
    journal = Journal(tmp_path)
    assert journal.entries == LINES[:2]
    assert path.read_bytes().endswith(torn)  # looking changes nothing
    journal.append(LINES[2])
    journal.close()
    assert path.read_bytes() == b"".join(map(render, LINES[:3]))


def test_writing_goes_on_where_a_write_was_short(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:3], at))
    assert written(tmp_path).read_bytes() == b"".join(map(render, LINES))


def test_a_journal_has_one_writer(tmp_path):
    journal = Journal(tmp_path)
    with pytest.raises(BlockingIOError):
        Journal(tmp_path)
    journal.close()
    journal.close()
    Journal(tmp_path).close()


def test_a_lock_on_a_journal_that_is_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    written(tmp_path)
    lock, locked = fcntl.flock, []

    def another_run_removes_it_first(file, how):
        locked.append(os.fstat(file).st_ino)
        if len(locked) < 3:
            (tmp_path / JOURNAL_NAME).unlink()
        if len(locked) == 2:
            (tmp_path / JOURNAL_NAME).write_bytes(render(HEAD))  # and another one is there already
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", another_run_removes_it_first)
    journal = Journal(tmp_path)
    assert len(locked) == 3
    assert journal.entries == [HEAD]
    assert locked[-1] == (tmp_path / JOURNAL_NAME).stat().st_ino
    journal.close()


def test_a_directory_is_finished_with_the_closing_line_or_without_a_journal(tmp_path):
    require_finished(tmp_path)
    assert read_entries(tmp_path) is None
    written(tmp_path, [*LINES, {"complete": {"config.json": [2, 3]}}])
    require_finished(tmp_path)


@pytest.mark.parametrize(
    "complete",
    [[], {"a": 1}, {"a": [1]}, {"a": [1, "2"]}, {"/etc/passwd": [1, 2]}, {"x/../../y": [1, 2]}, {"a\0": [1, 2]}],
)
def test_a_list_of_files_that_is_none_completes_nothing(tmp_path, complete):
    written(tmp_path, [*LINES, {"complete": complete}])
    with pytest.raises(CheckpointError, match=r"^unfinished model"):
        require_finished(tmp_path)


def test_a_journal_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / JOURNAL_NAME)
    with pytest.raises(CheckpointError, match=r"^eightfold_journal\.jsonl in .*: got a FIFO, expected a regular file$"):
        require_finished(tmp_path)


@pytest.mark.parametrize(
    ("lines", "got"),
    [
        ([], "one that had just begun"),
        (LINES[:1], "0 of 3 layers"),
        (LINES, "2 of 3 layers"),
        ([*LINES, {"complete": {}}, {"step": "x"}], "2 of 3 layers"),
    ],
)
def test_an_unfinished_directory_is_told_how_to_go_on(tmp_path, lines, got):
    written(tmp_path, lines)
    with pytest.raises(CheckpointError) as error:
        require_finished(tmp_path)
    assert str(error.value) == (
        f"unfinished model {tmp_path}: got {got}, expected a complete one. "
        "Run the `eightfold quantize` command that began it again."
    )
