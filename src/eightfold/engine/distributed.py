"""One model in several processes: tensor parallel.

Every process that torchrun starts has a share of the model (parallel/share.py). Rank 0 has the engine: it schedules,
sends every step to the others in one small message, and takes part in it. The others do nothing but steps. What the
shares make of a step is put together in the core: through memory that the processes of one host share, or over gloo
between hosts (parallel/link.py).

A message of rank 0 is int32 numbers: what to do, and for a step its arrays one after the other, which is about 50 bytes
for each sequence of a decode step.

Letters: T tokens of a step, S sequences, R rows after which the choice is wanted.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from eightfold import __version__
from eightfold.errors import CapacityError, ConfigError, EightfoldError, UnsupportedError
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.stamp import first_values
from eightfold.model import native as core
from eightfold.model.native import load as native
from eightfold.model.native.model import NativeModel, Step
from eightfold.parallel import gloo, link
from eightfold.parallel.link import EXIT_LOST, Liveness, Peer, ended_by_liveness, meets_in_memory, shared_files
from eightfold.parallel.share import Share
from eightfold.parallel.world import World, require_alike

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A step of the slowest machine takes less.
_GLOO_SECONDS = 600

_STAMP_BYTES = 64  # of a tensor, in a checkpoint's fingerprint

_ADVICE = {
    "eightfold": "Install the same version on all hosts.",
    "checkpoint": "Copy the model directory to all hosts again.",
    "isa": f"Set {core.ISA_VARIABLE} to one that all hosts have.",
    "options": "Start all processes with the same options.",
    "processes": "Start all processes with the same torchrun options.",
}

_STEP, _CACHE = range(2)
_HEADER = 6  # numbers: what to do, T, S, pages of a table, R, rows with logits


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

    def allocate_cache(self, positions: int, action: str = "Lower `max_new_tokens` or shorten the prompt.") -> None:
        """Make a cache of so many positions on every rank.

        Raises:
            CapacityError: there is not enough memory for it, on this rank or another.
        """
        self._send(np.array([_CACHE, positions], np.int32).tobytes())
        problems = []
        try:
            super().allocate_cache(positions, action)
        except EightfoldError as error:
            problems.append(error)
        for peer in self._peers:
            with ended_by_liveness():
                text = peer.hear()["error"]
            if text:
                problems.append(CapacityError(f"{peer}: {text}", action=action))
        if problems:
            raise problems[0]

    def run(self, step: Step) -> tuple[NDArray[Any], NDArray[Any]]:
        """Run a step on all ranks."""
        if self._is_inside:
            raise RuntimeError("the processes are out of step: an earlier one was interrupted")
        self._is_inside = True
        self._send(pack(step))
        found = super().run(step)
        self._is_inside = False
        return found

    def _send(self, order: bytes) -> None:
        with ended_by_liveness():
            for peer in self._peers:
                peer.send(order)


# --- rank 0


@dataclass
class _Others:
    """The other processes, as rank 0 has met them."""

    peers: list[Peer]
    have_model: bool = False


@functools.cache
def meet(world: World) -> _Others:
    """Meet the others, once in a process; they end when it does."""
    others = _Others(link.accept_all(world, _broadcast_of(world)))
    atexit.register(Liveness(world, others.peers).end)
    return others


def lead(world: World, checkpoint: Checkpoint, options: Mapping[str, Any]) -> SharedModel:
    """Load a share of the model while the others load theirs.

    Args:
        world: this process and the others.
        checkpoint: of the model.
        options: of native.load.load_model.
    """
    others = meet(world)
    if others.have_model:
        raise UnsupportedError(
            "second model", got=f"{world.size} processes", expected="one model for them", action="Start others for it."
        )
    others.have_model, peers = True, others.peers
    Share(0, world.size, options["expert_parallel"]).require(checkpoint.config, checkpoint.directory)
    found = [(str(peer), facts) for peer, facts in zip(peers, _answers(peers), strict=True)]
    require_alike(_setup(world, checkpoint, options), found, _ADVICE)
    with ended_by_liveness():
        for peer in peers:
            peer.tell(name=link.process_name())
    share = _load(world, checkpoint, options)
    loaded = [Facts(**facts) for facts in _answers(peers)]
    _join(share, world, peers)
    return SharedModel(share, peers, loaded)


def _answers(peers: Sequence[Peer]) -> list[dict[str, Any]]:
    """Wait for what each rank has to say.

    Raises:
        ConfigError: one has a problem.
    """
    found = []
    for peer in peers:
        with ended_by_liveness():
            facts = peer.hear()
        if "error" in facts:
            raise ConfigError(f"{peer}: {facts['error']}")
        found.append(facts)
    return found


# --- the others


def follow(world: World, opened: Callable[[], Checkpoint], options: Mapping[str, Any]) -> NoReturn:
    """Do what rank 0 says, until it ends; see `lead`."""
    first = link.connect(world, _broadcast_of(world))
    # Rank 0 decides when to end: a signal to all must not make this one leave in the middle of a step.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    liveness = Liveness(world, [first])
    try:
        with ended_by_liveness():
            share = _follow_loading(world, first, opened, options)
            _join(share, world, [first])
            while True:
                _obey(share, first)
    except BaseException as error:
        liveness.fail(str(error) or type(error).__name__)
    os._exit(EXIT_LOST)


def _follow_loading(
    world: World, first: Peer, opened: Callable[[], Checkpoint], options: Mapping[str, Any]
) -> NativeModel:
    try:
        checkpoint = opened()
        first.tell(**_setup(world, checkpoint, options))
        first.name = str(first.hear()["name"])
        share = _load(world, checkpoint, options)
        first.tell(**asdict(Facts(share.resident_weights[0], share.weight_bytes, share.room())))
    except (EightfoldError, OSError, MemoryError) as error:
        first.tell(error=str(error) or "out of memory")
        while True:
            first.receive()  # until rank 0 has told the user: it may be at work for long before it listens
    return share


def _obey(share: NativeModel, first: Peer) -> None:
    """Do the next thing that rank 0 says.

    Raises:
        EOFError: it has ended.
    """
    order = first.receive()
    kind, size = np.frombuffer(order, np.int32, 2).tolist()
    if kind == _STEP:
        share.run(unpack(order))
        return
    problem = ""
    try:
        share.allocate_cache(size, "")
    except (CapacityError, MemoryError) as error:
        problem = str(error) or "out of memory"
    first.tell(error=problem)


# --- all


def _broadcast_of(world: World) -> link.Broadcast | None:
    """Return how ranks find each other: None, as they know, or over gloo, which begins here."""
    if meets_in_memory(world):
        return None
    gloo.start_gloo(world, _GLOO_SECONDS)
    return gloo.broadcast


def _setup(world: World, checkpoint: Checkpoint, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what has to be the same in all processes."""
    return {
        "eightfold": __version__,
        "checkpoint": fingerprint(checkpoint),
        "isa": core.choose_isa(),
        "options": f"{options['dynamic']}, {options['attention']}, {options['longest'] or 'any'} positions"
        + (", expert_parallel" if options["expert_parallel"] else ""),
        "processes": world.size,
    }


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return 16 hexadecimal digits that differ where config, names, places, sizes or first values of tensors do."""
    digest = hashlib.blake2b(json.dumps(checkpoint.config_raw, sort_keys=True).encode(), digest_size=8)
    for info, begins in first_values(checkpoint, _STAMP_BYTES):
        digest.update(f"{info.name} {info.dtype} {info.shape} {info.file.name} {info.begin}".encode())
        digest.update(begins)
    return digest.hexdigest()


def _load(world: World, checkpoint: Checkpoint, options: Mapping[str, Any]) -> NativeModel:
    """Load this rank's share; the ranks of a host share its CPUs, too."""
    chosen = {**options, "threads": core.choose_threads(options["threads"], world.local_size)}
    return native.load_model(checkpoint, **chosen, share=Share(world.rank, world.size), neighbours=world.local_size)


def _join(share: NativeModel, world: World, peers: Sequence[Peer]) -> None:
    """Let a share meet the others."""
    if meets_in_memory(world):
        share.share_memory(world.rank, shared_files(world, peers))
    else:
        share.share_by_call(world.rank, _gather_parts)


def _gather_parts(own: NDArray[Any], everybody: NDArray[Any]) -> None:
    with ended_by_liveness(RuntimeError):  # a connection is closed
        gloo.gather_parts(own, everybody)


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
