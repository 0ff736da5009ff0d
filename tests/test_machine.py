"""What a process knows of its memory."""

from __future__ import annotations

from eightfold.machine import peak_resident_bytes, resident_bytes


def test_a_process_knows_what_it_has():
    now, peak = resident_bytes(), peak_resident_bytes()
    assert now is not None
    assert peak is not None
    assert 1 << 20 < now <= peak
