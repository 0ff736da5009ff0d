"""The processes that make one output: who does what, and how they tell each other.

A round is W consecutive batches of samples, one for each of W ranks; who takes which is settled by their lengths, so
that all have as much to do. What an observer needs of its round is put together in the order of the samples, so that
each rank sees what one process would have seen. Rank 0 has the output's lock and journal; the others write where it
says.

Here: the words for that, and a team of one, for which nothing is to be told. Several processes: distributed.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Round:
    """The samples that go through a layer at one time.

    Attributes:
        samples: how many each rank has; none, where batches have run out.
        order: the ranks that have a batch, in the order of the batches.
        first_sample: of this rank's, among all samples.
        first_token: of this rank's, among all tokens.
    """

    samples: tuple[int, ...]
    order: tuple[int, ...]
    first_sample: int
    first_token: int


class Team(Protocol):
    """The processes, seen from one of them."""

    rank: int
    size: int
    is_one_host: bool
    round: Round | None  # under way; None while samples do not move

    @property
    def is_first(self) -> bool:
        """Whether this is the process that owns the output and talks to the user."""
        ...

    def in_order(self, part: Tensor) -> tuple[Tensor, int]:
        """Put together what each rank knows of its samples in this round.

        Args:
            part: (samples of this rank, ...) float32.

        Returns:
            (samples of the round, ...), and at which of them this rank's begin.
        """
        ...

    def require_alike(self, facts: dict[str, Any]) -> None:
        """Refuse ranks for which something is not as it is for rank 0."""
        ...

    def share(self, value: T) -> T:
        """Return rank 0's value."""
        ...

    def collect(self, value: T) -> list[T]:
        """Return every rank's value, in order, to all."""
        ...

    def collect_first(self, value: T) -> list[T]:
        """Return every rank's value, in order, to rank 0; to the others their own."""
        ...

    def collect_at(self, rank: int, value: T) -> list[T]:
        """Return every rank's value, in order, to one rank; to the others their own."""
        ...


class Alone:
    """A team of one."""

    rank, size, is_first, is_one_host = 0, 1, True, True
    round: Round | None = None

    def in_order(self, part: Tensor) -> tuple[Tensor, int]:
        """Return what is known."""
        return part, 0

    def require_alike(self, facts: dict[str, Any]) -> None:
        """Find nobody else."""

    def share(self, value: T) -> T:
        """Return the value."""
        return value

    def collect(self, value: T) -> list[T]:
        """Return the only value."""
        return [value]

    def collect_first(self, value: T) -> list[T]:
        """Return the only value."""
        return [value]

    def collect_at(self, rank: int, value: T) -> list[T]:
        """Return the only value."""
        return [value]


def owners(sizes: Mapping[str, int], ranks: int, spared: int | None = None) -> dict[str, int]:
    """Return which rank makes each thing: the largest first, each to whom has least to do; nothing to who is spared."""
    loads = [0] * ranks
    if spared is not None:
        loads[spared] = sum(sizes.values())
    found = {}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        found[name] = loads.index(min(loads))
        loads[found[name]] += size
    return found


def prover_of(team: Team) -> int:
    """Return the rank that moves the sample of the proof and writes no linears: the last, since the first has more."""
    return team.size - 1


def turns(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Return for each round who takes its batches: the largest goes to whom has had least, the first of all to rank 0.

    Args:
        sizes: of the batches, in whatever tells how long they take.
        ranks: how many there are; the last round may have fewer batches.
    """
    loads = [0] * ranks
    found = []
    for at in range(0, len(sizes), ranks):
        numbers = range(at, min(at + ranks, len(sizes)))
        by_size = sorted(numbers, key=lambda batch: -sizes[batch]) if at else numbers
        takers = dict(zip(by_size, sorted(range(ranks), key=loads.__getitem__), strict=False))
        for batch, rank in takers.items():
            loads[rank] += sizes[batch]
        found.append([takers[batch] for batch in numbers])
    return found


def in_batch_order(parts: Sequence[Sequence[T]], taken: Sequence[Sequence[int]]) -> list[T]:
    """Return what each rank has, one for each batch that it took (see turns), in the order of the batches."""
    left = [iter(part) for part in parts]
    return [next(left[rank]) for ranks in taken for rank in ranks]
