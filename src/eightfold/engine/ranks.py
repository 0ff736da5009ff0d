"""A model in several processes, as rank 0 has it, and what the others do: steps.

An order is int32 numbers: what it is, and for a step its arrays one after the other, which is about 50 bytes for each
sequence of a decode step.

Letters: T tokens of a step, S sequences, R rows after which the choice is wanted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eightfold.engine.watch import ended_by_watch
from eightfold.errors import CapacityError, EightfoldError
from eightfold.model.native.model import NativeModel, Step
from eightfold.parallel.link import Peer

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STEP, _CACHE = range(2)
_HEADER = 6  # numbers: the order, T, S, pages of a table, R, rows with logits


@dataclass(frozen=True)
class Facts:
    """What rank 0 knows of a rank's share.

    Attributes:
        resident: bytes of memory that loading it took.
        weights: bytes that a step reads.
        room: memory for keys and values; None if the system does not say.
    """

    resident: int
    weights: int
    room: int | None

    @classmethod
    def of(cls, model: NativeModel) -> Facts:
        """Say what there is to know of a share in this process."""
        return cls(model.resident_weights[0], model.weight_bytes, model.room())


class SharedModel(NativeModel):
    """Rank 0's share of a model, and the others' behind it."""

    def __init__(self, share: NativeModel, peers: Sequence[Peer], others: Sequence[Facts]) -> None:
        super().__init__(share._model, share.config, share.isa, share.float_prompts, share.neighbours)
        self._peers, self._others = peers, others
        self._is_inside = False  # a step that has not ended
        self.world_size = 1 + len(peers)
        self.resident_weights = (*share.resident_weights, *(facts.resident for facts in others))

    @property
    def all_weight_bytes(self) -> int:
        """Bytes of weights that a step reads on all ranks together."""
        return self.weight_bytes + sum(facts.weights for facts in self._others)

    def room(self) -> int | None:
        """Return the memory that every rank has for keys and values."""
        known = [room for room in (super().room(), *(facts.room for facts in self._others)) if room is not None]
        return min(known, default=None)

    def allocate_cache(self, positions: int, action: str = "Lower --max-new-tokens or shorten the prompt.") -> None:
        """Make a cache of so many positions on every rank.

        Raises:
            CapacityError: there is not enough memory for it, on this rank or another.
        """
        self._order(np.array([_CACHE, positions], np.int32).tobytes())
        problems = []
        try:
            super().allocate_cache(positions, action)
        except EightfoldError as error:
            problems.append(error)
        for peer in self._peers:
            with ended_by_watch():
                text = peer.orders.hear()["error"]
            if text:
                problems.append(CapacityError(f"{peer}: {text}", action=action))
        if problems:
            raise problems[0]

    def run(self, step: Step) -> tuple[NDArray[Any], NDArray[Any]]:
        """Run a step on all ranks."""
        if self._is_inside:
            raise RuntimeError("the processes are out of step: an earlier one was interrupted")
        self._is_inside = True
        self._order(pack(step))
        found = super().run(step)
        self._is_inside = False
        return found

    def _order(self, order: bytes) -> None:
        with ended_by_watch():
            for peer in self._peers:
                peer.orders.send(order)


def follow(model: NativeModel, first: Peer) -> None:
    """Do what rank 0 orders, for ever.

    Raises:
        EOFError: it has ended.
    """
    while True:
        order = first.orders.receive()
        kind, size = np.frombuffer(order, np.int32, 2).tolist()
        if kind == _STEP:
            model.run(unpack(order))
            continue
        problem = ""
        try:
            model.allocate_cache(size, "")
        except (CapacityError, MemoryError) as error:
            problem = str(error) or "out of memory"
        first.orders.tell(error=problem)


def pack(step: Step) -> bytes:
    """Write a step down. Positions rise by one inside a sequence, so the first of each is enough."""
    header = (_STEP, len(step.token_ids), *step.tables.shape, len(step.rows), step.shown)
    first = step.positions[step.starts[:-1]]
    numbers = (np.array(header, np.int32), step.token_ids, first, step.starts, step.tables, step.rows)
    return b"".join([array.tobytes() for array in numbers]) + step.generated.tobytes()


def unpack(order: bytearray) -> Step:
    """Read what `pack` has written."""
    _, tokens, sequences, width, rows, shown = np.frombuffer(order, np.int32, _HEADER).tolist()
    sizes = (tokens, sequences, sequences + 1, sequences * width, rows)
    at, parts = 4 * _HEADER, []
    for size in sizes:
        parts.append(np.frombuffer(order, np.int32, size, at))
        at += 4 * size
    token_ids, first, starts, tables, wanted = parts
    positions = np.repeat(first - starts[:-1], np.diff(starts)) + np.arange(tokens, dtype=np.int32)
    return Step(
        token_ids=token_ids,
        positions=positions,
        generated=np.frombuffer(order, np.uint8, tokens, at),
        starts=starts,
        tables=tables.reshape(sequences, width),
        rows=wanted,
        shown=shown,
    )


def memory_files(ranks: int) -> list[int]:
    """Return files in memory that only grow, for SharedExchange: counters, and two places for each rank."""
    import fcntl

    files = [os.memfd_create("eightfold", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) for _ in range(1 + 2 * ranks)]
    for file in files:
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return files
