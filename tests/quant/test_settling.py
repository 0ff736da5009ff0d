"""What one thread brings to the disk while work goes on."""

from __future__ import annotations

import os
import threading

import pytest

from eightfold.quant.settling import Settling


def test_work_goes_on_until_the_result_is_asked_for(tmp_path):
    may_end, done = threading.Event(), []
    with Settling() as settling:
        settling.do(lambda: done.append(may_end.wait(60)))
        assert done == []
        may_end.set()
        settling.require()
        assert done == [True]


def test_a_file_is_closed_when_it_is_synced(tmp_path):
    file = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    with Settling() as settling:
        settling.sync(file)
        settling.require()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)


def test_what_has_failed_is_told_once_it_is_asked_for(tmp_path, monkeypatch):
    def refuse(file: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", refuse)
    file = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    with Settling() as settling:
        settling.sync(file)
        settling.do(lambda: None)
        with pytest.raises(OSError, match="Input/output error"):
            settling.require()


def test_nothing_goes_on_after_an_error():
    may_end, done = threading.Event(), []
    with pytest.raises(ValueError, match="elsewhere"), Settling() as settling:
        settling.do(lambda: done.append(may_end.wait(60)))
        may_end.set()
        raise ValueError("elsewhere")
    assert done == [True]
