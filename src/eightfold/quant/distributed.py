"""Several processes that torchrun has started, as a team (team.py).

Rank 0 has two connections to each of the others, over TCP; torchrun's store tells where it listens, and a secret.

    orders    what the ranks tell each other, rank 0 in the middle: a few numbers for each sample, a few times a layer
    watch     silent while both live (watch.py)

gloo's collectives would do, and were measured to take ten times as long for so little (docs/distributed_quantize.md).
Pickled objects travel here, so the network between hosts has to be one that can be trusted.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import secrets
import socket
import struct
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from eightfold import __version__
from eightfold.errors import CheckpointError, ConfigError
from eightfold.quant.team import Round
from eightfold.quant.watch import EXIT_LOST, OVER, Watch, read_line

T = TypeVar("T")

_JOIN_SECONDS = 600
_INTRODUCTION_SECONDS = 5.0
_LENGTH = struct.Struct("<Q")
_STORE_KEY = f"eightfold/quantize/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # a store outlives restarts

_START = "Start them with torchrun --nproc_per_node N -m eightfold quantize ..."
_ADVICE = {
    "eightfold": "Install the same version on all hosts.",
    "torch": "Install the same version on all hosts.",
    "source": "Let all ranks see the same model directory.",
}


class Ranks:
    """The processes of one start of torchrun; see team.Team."""

    def __init__(self) -> None:
        """Meet the others.

        Raises:
            ConfigError: the environment makes no sense, or they are not there in time.
        """
        self.rank, self.size = _number("RANK"), _number("WORLD_SIZE")
        self.round: Round | None = None
        if self.rank >= self.size:
            raise ConfigError("RANK", got=self.rank, expected=f"less than WORLD_SIZE, {self.size}", action=_START)
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        with _one_line_errors():
            store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=_JOIN_SECONDS))))
            self._store = store  # rank 0 may be the one that serves it
            met = self._accept(store) if self.is_first else self._connect(store, address)
        self._orders = {rank: orders for rank, (orders, _, _) in met.items()}
        names = {rank: f"rank {rank} ({name})" for rank, (_, _, name) in met.items()}
        self._watch = Watch(self.rank, {watch: names[rank] for rank, (_, watch, _) in met.items()})

    @property
    def is_first(self) -> bool:
        """Whether this is the process that owns the output and talks to the user."""
        return self.rank == 0

    # --- meeting

    def _accept(self, store: Any) -> dict[int, tuple[socket.socket, socket.socket, str]]:
        """Wait for all others; return the two connections and the name of each."""
        found: dict[tuple[int, str], tuple[socket.socket, str]] = {}
        with socket.create_server(("", 0), backlog=2 * self.size) as server:
            secret = secrets.token_hex(16)
            store.set(_STORE_KEY, json.dumps([server.getsockname()[1], secret]))
            server.settimeout(_JOIN_SECONDS)
            while len(found) < 2 * (self.size - 1):
                other, _ = server.accept()
                other.settimeout(_INTRODUCTION_SECONDS)
                facts = read_line(other)
                if facts is None or facts.get("secret") != secret:
                    other.close()  # a stranger
                    continue
                _keep_alive(other)
                found[facts["rank"], facts["purpose"]] = other, facts["name"]
        return {rank: (*found[rank, "orders"][:1], *found[rank, "watch"]) for rank in range(1, self.size)}

    def _connect(self, store: Any, address: str) -> dict[int, tuple[socket.socket, socket.socket, str]]:
        port, secret = json.loads(store.get(_STORE_KEY))
        found = []
        for purpose in ("orders", "watch"):
            other = socket.create_connection((address, port), timeout=_JOIN_SECONDS)
            facts = {"rank": self.rank, "purpose": purpose, "secret": secret, "name": process_name()}
            other.sendall(json.dumps(facts).encode() + b"\n")
            _keep_alive(other)
            found.append(other)
        return {0: (found[0], found[1], "")}

    def require_alike(self, facts: dict[str, Any]) -> None:
        """Compare what has to be the same in all processes.

        Raises:
            ConfigError: a rank has another version, or was started otherwise.
            CheckpointError: a rank sees another source.
        """
        facts = json.loads(json.dumps({**facts, "eightfold": __version__, "torch": torch.__version__}))
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
        counts = self.round.samples
        own = part.contiguous().numpy().tobytes()
        whole = b"".join(self._gather(own))
        if self.is_first:
            self._spread(whole)
        else:
            whole = self._receive(0)
        values = torch.frombuffer(bytearray(whole), dtype=torch.float32).reshape(sum(counts), *part.shape[1:])
        return values, sum(counts[: self.rank])

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
            self._orders[rank].sendall(_LENGTH.pack(len(data)) + data)

    def _receive(self, rank: int) -> bytes:
        with self._watch.explains():
            (length,) = _LENGTH.unpack(_exactly(self._orders[rank], _LENGTH.size))
            return bytes(_exactly(self._orders[rank], length))

    # --- parting

    def end(self) -> None:
        """Part: all is done."""
        self._watch.end(OVER)

    def fail(self, error: BaseException) -> None:
        """Let the others end too. Rank 0 tells the user; another rank has rank 0 tell, and ends here."""
        self._watch.end({"kind": type(error).__name__, "text": str(error) or type(error).__name__})
        if not self.is_first:
            os._exit(EXIT_LOST)


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isascii() or not text.isdigit():
        raise ConfigError(name, got=text or "nothing", expected="a number", action=_START)
    return int(text)


def process_name() -> str:
    """Return what a person finds this process by."""
    return f"process {os.getpid()} on {socket.gethostname()}"


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


def _exactly(sock: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = sock.recv_into(view)
        if not count:
            raise ConnectionError("the other end is closed")
        view = view[count:]
    return data


def _keep_alive(sock: socket.socket) -> None:
    """Wait as long as it takes; notice within seconds that the other host is gone."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 6000)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError("the ranks do not find each other", got=text, action=_START) from None
