"""Several processes that torchrun has started, as a team (team.py).

Rank 0 has two connections to each of the others (wire.py): over one the ranks tell each other a few numbers for each
sample, a few times a layer, and the other is watched (watch.py). Between hosts torchrun's store tells where rank 0
listens, and a secret.

gloo's collectives would do, and were measured to take ten times as long for so little (docs/distributed_quantize.md).
Objects travel pickled, so the network between hosts has to be one that can be trusted.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pickle
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from eightfold import __version__
from eightfold.errors import CheckpointError, ConfigError
from eightfold.parallel.link import JOIN_SECONDS, accept_all, connect, process_name
from eightfold.parallel.world import World
from eightfold.quant.arithmetic import float_facts
from eightfold.quant.team import Round
from eightfold.quant.watch import EXIT_LOST, OVER, Watch

T = TypeVar("T")

_START = "Start them with torchrun --nproc_per_node N -m eightfold quantize ..."
_SAME_BITS = "Use hosts with the same kind of CPU and the same environment, or start all ranks with"
_ADVICE = {
    "eightfold": "Install the same version on all hosts.",
    "torch": "Install the same version on all hosts.",
    "source": "Let all ranks see the same model directory.",
    "instruction set": f"{_SAME_BITS} ATEN_CPU_CAPABILITY=avx2 and MKL_CBWR=AVX2.",
    "float32 arithmetic": f"{_SAME_BITS} ATEN_CPU_CAPABILITY=avx2 and MKL_CBWR=AVX2.",
}


class Ranks:
    """The processes of one start of torchrun; see team.Team."""

    def __init__(self) -> None:
        """Meet the others.

        Raises:
            ConfigError: the environment makes no sense, or they are not there in time.
        """
        world = World.of_environment()
        self.rank, self.size, self.is_first = world.rank, world.size, world.is_first
        self.is_one_host = world.is_one_host
        self.round: Round | None = None
        with _one_line_errors():
            tell = None if world.is_one_host else functools.partial(self._told, world)
            peers = accept_all(world, tell) if self.is_first else [connect(world, tell)]
        self._orders = {peer.rank: peer.orders for peer in peers}
        self._watch = Watch(self.rank, {peer.watch: str(peer) for peer in peers})

    def _told(self, world: World, values: list[Any]) -> list[Any]:
        self._store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS))))
        key = f"eightfold/quantize/{world.run}"  # a store outlives restarts
        if self.is_first:
            self._store.set(key, json.dumps(values))
        return list(json.loads(self._store.get(key)))

    def require_alike(self, facts: dict[str, Any]) -> None:
        """Compare what has to be the same in all processes.

        Raises:
            ConfigError: a rank has another version, or was started otherwise.
            CheckpointError: a rank sees another source.
        """
        own = {"eightfold": __version__, "torch": torch.__version__, **float_facts()}
        facts = json.loads(json.dumps({**own, **facts, **own}))
        everybody = self.collect_first((facts, process_name()))
        for rank, (theirs, name) in enumerate(everybody if self.is_first else ()):
            for key, value in facts.items():
                if theirs.get(key) != value:
                    raise (CheckpointError if key == "source" else ConfigError)(
                        f"{key} of rank {rank} ({name})",
                        got=_differing(theirs.get(key), value),
                        expected=f"{_differing(value, theirs.get(key))}, as rank 0 has",
                        action=_ADVICE.get(key, "Start all processes with the same options."),
                    )

    # --- telling each other

    def in_order(self, part: Tensor) -> tuple[Tensor, int]:
        """Put together what each rank knows of its samples in this round; see team.Team."""
        assert self.round is not None
        counts, order = self.round.samples, self.round.order
        own = part.contiguous().numpy().tobytes()
        parts = self._gather(own)
        if self.is_first:
            whole = b"".join(parts[rank] for rank in order)
            self._spread(whole)
        else:
            whole = self._receive(0)
        values = torch.frombuffer(bytearray(whole), dtype=torch.float32).reshape(sum(counts), *part.shape[1:])
        before = order[: order.index(self.rank)] if self.rank in order else order
        return values, sum(counts[rank] for rank in before)

    def share(self, value: T) -> T:
        """Return rank 0's value."""
        if self.is_first:
            self._spread(_pickled(value))
            return value
        shared: T = pickle.loads(self._receive(0))
        return shared

    def collect(self, value: T) -> list[T]:
        """Return every rank's value, in order, to all."""
        return self.share(self.collect_first(value))

    def collect_first(self, value: T) -> list[T]:
        """Return every rank's value, in order, to rank 0; to the others their own."""
        parts = self._gather(b"" if self.is_first else _pickled(value))
        return [value, *(pickle.loads(part) for part in parts[1:])]

    def collect_at(self, rank: int, value: T) -> list[T]:
        """Return every rank's value, in order, to one rank; to the others their own. It goes by way of rank 0."""
        if rank == 0:
            return self.collect_first(value)
        parts = self._gather(_pickled(value))
        if self.is_first:
            for part in parts:
                self._send(rank, part)
        if self.rank != rank:
            return [value]
        return [pickle.loads(self._receive(0)) for _ in range(self.size)]

    def _gather(self, own: bytes) -> list[bytes]:
        """Return what every rank has, to rank 0; to the others their own."""
        if not self.is_first:
            self._send(0, own)
            return [own]
        return [own, *(self._receive(rank) for rank in range(1, self.size))]

    def _spread(self, data: bytes) -> None:
        for rank in range(1, self.size):
            self._send(rank, data)

    def _send(self, rank: int, data: bytes) -> None:
        with self._watch.explains():
            self._orders[rank].send(data)

    def _receive(self, rank: int) -> bytes:
        with self._watch.explains():
            return bytes(self._orders[rank].receive())

    # --- parting

    def end(self) -> None:
        """Part: all is done."""
        self._watch.end(OVER)

    def fail(self, error: BaseException) -> None:
        """Let the others end too. Rank 0 tells the user; another rank has rank 0 tell, and ends here."""
        self._watch.end({"kind": type(error).__name__, "text": str(error) or type(error).__name__})
        if not self.is_first:
            os._exit(EXIT_LOST)


def _differing(value: Any, other: Any) -> str:
    """Return a value; of a table, what another one has otherwise."""
    if isinstance(value, dict) and isinstance(other, dict):
        return ", ".join(f"{key} {value[key]}" for key in value if value[key] != other.get(key))[:200] or "less"
    return str(value)


class _Pickler(pickle.Pickler):
    """Tensors as arrays: torch's own way takes ten times as long for small ones."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.from_numpy, (value.contiguous().numpy(),)
        return NotImplemented


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError("the ranks do not find each other", got=text, action=_START) from None
