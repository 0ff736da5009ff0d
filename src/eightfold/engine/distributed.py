"""One model in several processes: tensor parallel.

Every process that torchrun starts has a share of the model (model/native/share.py). Rank 0 has the engine: it
schedules, sends every step to the others in one small message (ranks.py), and takes part in it. The others do
nothing but steps. What the shares make of a step is put together in the core: through memory that the processes of
one host share, or through torch.distributed (gloo) between hosts. Only then is torch loaded, by this file alone.

EIGHTFOLD_EXCHANGE=gloo takes torch.distributed on one host too.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import secrets
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from eightfold import __version__
from eightfold.engine.loading import Options
from eightfold.engine.ranks import Facts, SharedModel, follow, memory_files
from eightfold.engine.watch import EXIT_LOST, Watch, ended_by_watch
from eightfold.errors import CheckpointError, ConfigError, DependencyError, EightfoldError, UnsupportedError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.native import core
from eightfold.model.native import load as native
from eightfold.model.native.model import NativeModel
from eightfold.model.native.share import Share
from eightfold.parallel import link
from eightfold.parallel.link import Peer
from eightfold.parallel.world import World

if TYPE_CHECKING:
    from numpy.typing import NDArray

EXCHANGE_VARIABLE = "EIGHTFOLD_EXCHANGE"

# For one meeting: a step of the slowest machine takes less.
_GLOO_SECONDS = 600

_STAMP_BYTES = 64  # of each tensor, in a checkpoint's fingerprint


@dataclass
class _Team:
    """The other processes, as rank 0 has met them."""

    exchange: _Memory | _Gloo
    peers: list[Peer]
    has_model: bool = False


@functools.cache
def meet(world: World) -> _Team:
    """Meet the others, once in a process; they end when it does."""
    exchange = _exchange_of(world)
    team = _Team(exchange, exchange.gather())
    atexit.register(Watch(world, team.peers).end)
    return team


def lead(world: World, checkpoint: Checkpoint, options: Options) -> SharedModel:
    """Load a share of the model while the others load theirs."""
    team = meet(world)
    if team.has_model:
        raise UnsupportedError("second model", got=f"{world.size} processes", expected="one model for them")
    team.has_model = True
    Share(0, world.size).require(checkpoint.config, checkpoint.directory)
    _require_alike(team.peers, _answers(team.peers), _about(world, checkpoint, options))
    with ended_by_watch():
        for peer in team.peers:
            peer.orders.tell(name=link.process_name())
    share = _load(world, checkpoint, options)
    others = [Facts(**facts) for facts in _answers(team.peers)]
    team.exchange.join(share, team.peers)
    return SharedModel(share, team.peers, others)


def follow_first(world: World, opened: Callable[[], Checkpoint], options: Options) -> NoReturn:
    """Do what rank 0 says."""
    exchange = _exchange_of(world)
    first = exchange.reach()
    # Rank 0 decides when to end: a signal to all must not make this one leave in the middle of a step.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    watch = Watch(world, [first])
    try:
        with ended_by_watch():
            share = _follow_loading(world, first, opened, options)
            exchange.join(share, [first])
            follow(share, first)
    except BaseException as error:
        watch.fail(str(error) or type(error).__name__)
    os._exit(EXIT_LOST)


def _follow_loading(world: World, first: Peer, opened: Callable[[], Checkpoint], options: Options) -> NativeModel:
    try:
        checkpoint = opened()
        first.orders.tell(**_about(world, checkpoint, options))
        first.name = str(first.orders.hear()["name"])
        share = _load(world, checkpoint, options)
        first.orders.tell(**asdict(Facts.of(share)))
    except (EightfoldError, OSError, MemoryError) as error:
        first.orders.tell(error=str(error) or "out of memory")
        while True:
            first.orders.receive()  # until rank 0 has told the user: it may be at work for long before it listens
    return share


def _load(world: World, checkpoint: Checkpoint, options: Options) -> NativeModel:
    """Load this rank's share; the ranks of a host share its CPUs, too."""
    threads = core.choose_threads(options.threads, world.local_size)
    share = Share(world.rank, world.size)
    chosen = asdict(options) | {"threads": threads}
    return native.load_model(checkpoint, **chosen, share=share, neighbours=world.local_size)


def _answers(peers: Sequence[Peer]) -> list[dict[str, Any]]:
    """Wait for what each rank has to say.

    Raises:
        ConfigError: one has a problem.
    """
    found = []
    for peer in peers:
        with ended_by_watch():
            facts = peer.orders.hear()
        if "error" in facts:
            raise ConfigError(f"{peer}: {facts['error']}")
        found.append(facts)
    return found


def _about(world: World, checkpoint: Checkpoint, options: Options) -> dict[str, Any]:
    """Return what has to be the same in all processes."""
    return {
        "eightfold": __version__,
        "checkpoint": fingerprint(checkpoint),
        "isa": core.choose_isa(),
        "options": f"{options.dynamic}, {options.attention}",
        "processes": world.size,
    }


def _require_alike(peers: Sequence[Peer], found: Sequence[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Compare every rank with this one.

    Raises:
        ConfigError: another version, instruction set or options.
        CheckpointError: another checkpoint.
    """
    for peer, facts in zip(peers, found, strict=True):
        for name, value in expected.items():
            if facts.get(name) != value:
                kind = CheckpointError if name == "checkpoint" else ConfigError
                wanted = f"{value}, as rank 0 has"
                raise kind(f"{name} of {peer}", got=facts.get(name), expected=wanted, action=_ADVICE[name])


_ADVICE = {
    "eightfold": "Install the same version on all hosts.",
    "checkpoint": "Copy the model directory to all hosts again.",
    "isa": f"Set {core.ISA_VARIABLE} to one that all hosts have.",
    "options": "Start all processes with the same options.",
    "processes": "Start all processes with the same torchrun options.",
}


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return 16 hexadecimal digits that differ where config, names, places, sizes or first values of tensors do."""
    digest = hashlib.blake2b(json.dumps(checkpoint.config_raw, sort_keys=True).encode(), digest_size=8)
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape} {info.file.name} {info.begin}".encode())
        array = checkpoint.array(name).reshape(-1)
        digest.update(array[: _STAMP_BYTES // array.itemsize].tobytes())
    return digest.hexdigest()


class _Memory:
    """Ranks of one host: local sockets, and meetings in shared memory."""

    def __init__(self, world: World) -> None:
        self._world = world

    def gather(self) -> list[Peer]:
        """Wait for all others."""
        with link.listen(self._world, local=True) as sock:
            return link.accept_all(sock, self._world, "")

    def reach(self) -> Peer:
        """Connect to rank 0."""
        return link.connect(self._world, link.local_name(self._world), "", local=True)

    def join(self, share: NativeModel, peers: Sequence[Peer]) -> None:
        """Let a share meet the others."""
        if self._world.is_first:
            files = memory_files(self._world.size)
            for peer in peers:
                socket.send_fds(peer.orders.sock, [b"0"], files)
        else:
            _, files, _, _ = socket.recv_fds(peers[0].orders.sock, 1, 1 + 2 * self._world.size)
        share.share_memory(self._world.rank, files)


class _Gloo:
    """Ranks of several hosts: TCP, and meetings through torch.distributed."""

    def __init__(self, world: World) -> None:
        self._world = world
        _start_gloo(world)

    def gather(self) -> list[Peer]:
        """Wait for all others."""
        with link.listen(self._world, local=False) as sock:
            secret = secrets.token_hex(16)
            _broadcast([sock.getsockname()[1], secret])
            return link.accept_all(sock, self._world, secret)

    def reach(self) -> Peer:
        """Connect to rank 0."""
        port, secret = _broadcast([None, None])
        return link.connect(self._world, (self._world.address, port), secret, local=False)

    def join(self, share: NativeModel, peers: Sequence[Peer]) -> None:
        """Let a share meet the others."""
        share.share_by_call(self._world.rank, _gather_parts)


def _exchange_of(world: World) -> _Memory | _Gloo:
    wanted = os.environ.get(EXCHANGE_VARIABLE, "")
    if wanted not in ("", "memory", "gloo"):
        raise ConfigError(EXCHANGE_VARIABLE, got=wanted, expected="memory or gloo")
    if wanted == "memory" and not world.is_one_host:
        raise UnsupportedError(EXCHANGE_VARIABLE, got="memory", expected="gloo, as there are several hosts")
    return _Memory(world) if world.is_one_host and wanted != "gloo" else _Gloo(world)


def _start_gloo(world: World) -> None:
    """Begin torch.distributed.

    Raises:
        DependencyError: torch is not installed.
    """
    try:
        import torch.distributed as dist
    except ImportError:
        raise DependencyError(
            "processes on several hosts need torch",
            got="none installed",
            action="Install it: pip install 'eightfold[distributed]'",
        ) from None
    import datetime

    if interface := link.interface_to(world.address, world.port):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    dist.init_process_group(
        "gloo", rank=world.rank, world_size=world.size, timeout=datetime.timedelta(seconds=_GLOO_SECONDS)
    )


def _broadcast(facts: list[Any]) -> list[Any]:
    """Return what rank 0 gives."""
    import torch.distributed as dist

    dist.broadcast_object_list(facts, src=0)
    return facts


def _gather_parts(mine: NDArray[Any], everybody: NDArray[Any]) -> None:
    """Put every rank's part (n,) into (ranks, n)."""
    import torch
    import torch.distributed as dist

    with ended_by_watch(RuntimeError):  # a connection is closed
        dist.all_gather(list(torch.from_numpy(everybody)), torch.from_numpy(mine))
