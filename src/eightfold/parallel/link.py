"""How the processes that share a model talk, meet in a step, and end together.

Rank 0 has two connections to each of the others:

    orders    messages, one after the other
    watch     silent while both live: whoever ends closes it

On one host they are local sockets with names of their own, which only processes of the same user may talk over; files
of shared memory, in which the shares meet, travel over them too. Between hosts they are TCP, with a secret that
torchrun's store hands out, and the shares meet over gloo. EIGHTFOLD_EXCHANGE=gloo takes gloo on one host, too.

A process that ends by itself says why over `watch`; of one that dies, the system closes the connection. Either ends the
others within moments, whatever they are doing: the main thread may be inside a step then, waiting for what will never
come.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from eightfold.errors import ConfigError, UnsupportedError
from eightfold.parallel.world import World

EXCHANGE_VARIABLE = "EIGHTFOLD_EXCHANGE"

EXIT_LOST = 2

# From the end of one process to that of another, at most.
_END_SECONDS = 8.0

_OVER, _TOLD = "over", "told"  # last words of rank 0: all is done; the user knows what has happened
_MAX_WORDS = 1 << 16

# Rank 0 may read a long file of prompts before it listens.
JOIN_SECONDS = 600.0
# A new connection has so long to introduce itself, in so many bytes.
_INTRODUCTION_SECONDS = 5.0
_MAX_INTRODUCTION = 4096

_LENGTH = struct.Struct("<Q")

# Returns the values that rank 0 passes, in every rank.
Broadcast = Callable[[list[Any]], list[Any]]


@dataclass
class Peer:
    """Another rank, as this one reaches it: messages in order, and a connection that is silent while both live."""

    rank: int
    sock: socket.socket
    watch: socket.socket
    name: str = ""  # host and process, for messages

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.name})" if self.name else f"rank {self.rank}"

    def send(self, data: bytes) -> None:
        _send(self.sock, data)

    def receive(self) -> bytearray:
        """Wait for a message.

        Raises:
            EOFError: the other process has ended.
        """
        return _receive(self.sock)

    def tell(self, **facts: Any) -> None:
        self.send(json.dumps(facts).encode())

    def hear(self) -> dict[str, Any]:
        """Wait for a JSON object; see `receive`."""
        facts: dict[str, Any] = json.loads(self.receive())
        return facts


def _send(sock: socket.socket, data: bytes) -> None:
    sock.sendall(_LENGTH.pack(len(data)) + data)


def _receive(sock: socket.socket, max_bytes: int | None = None) -> bytearray:
    (length,) = _LENGTH.unpack(_read(sock, _LENGTH.size))
    if max_bytes is not None and length > max_bytes:
        raise ValueError(f"a message of {length} bytes")
    return _read(sock, length)


def _read(sock: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        try:
            count = sock.recv_into(view)
        except ConnectionError:
            count = 0
        if not count:
            raise EOFError
        view = view[count:]
    return data


def process_name() -> str:
    """Return what a person finds this process by."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def accept_all(world: World, broadcast: Broadcast | None) -> list[Peer]:
    """Wait in rank 0 until all others have connected; return them in order.

    Args:
        world: of this process.
        broadcast: tells the others where rank 0 listens; None for ranks of one host, which know.

    Raises:
        ConfigError: one of them is not there in time.
    """
    if broadcast is None:
        family: int = socket.AF_UNIX
    else:
        family = socket.AF_INET6 if ":" in world.address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.bind(("", 0) if broadcast else _local_name(world))
        server.listen(2 * world.size)
        secret = secrets.token_hex(16) if broadcast else ""
        if broadcast:
            broadcast([server.getsockname()[1], secret])
        return _accept_all(server, world, secret)


def _accept_all(server: socket.socket, world: World, secret: str) -> list[Peer]:
    deadline, found = time.monotonic() + JOIN_SECONDS, dict[tuple[int, str], socket.socket]()
    names = dict[int, str]()
    while len(found) < 2 * (world.size - 1):
        server.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            sock, _ = server.accept()
        except TimeoutError:
            missing = next(r for r in range(1, world.size) if (r, "watch") not in found)
            raise ConfigError(f"rank {missing}", got=f"no word from it in {JOIN_SECONDS:.0f} s") from None
        introduced = _introduction(sock, secret)
        if introduced is None or introduced[:2] in found or not 1 <= introduced[0] < world.size:
            sock.close()  # a stranger
        else:
            found[introduced[:2]], names[introduced[0]] = sock, introduced[2]
    return [Peer(r, found[r, "orders"], found[r, "watch"], names[r]) for r in range(1, world.size)]


def connect(world: World, broadcast: Broadcast | None) -> Peer:
    """Connect to rank 0; see `accept_all`.

    Raises:
        ConfigError: it is not there in time.
    """
    port, secret = broadcast([None, None]) if broadcast else (None, "")
    orders, watch = (_connected(world, port, purpose, secret) for purpose in ("orders", "watch"))
    return Peer(0, orders, watch)


def _connected(world: World, port: int | None, purpose: str, secret: str) -> socket.socket:
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            if port is not None:
                sock = socket.create_connection((world.address, port), timeout=JOIN_SECONDS)
            else:
                sock = _connected_here(world)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError("rank 0", got=f"no connection in {JOIN_SECONDS:.0f} s", action=str(error)) from None
            time.sleep(0.05)
    if not _is_own(sock):
        raise ConfigError("rank 0", got="another user's process", expected="one of this user")
    _prepare(sock)
    facts = {"rank": world.rank, "purpose": purpose, "secret": secret, "name": process_name()}
    _send(sock, json.dumps(facts).encode())
    return sock


def _connected_here(world: World) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(_local_name(world))
    except OSError:
        sock.close()
        raise
    return sock


def _local_name(world: World) -> str:
    """Return the name in the abstract namespace under which rank 0 of a run on one host is found."""
    return f"\0eightfold-{os.getuid()}-{world.port}-{world.run}"


def _introduction(sock: socket.socket, secret: str) -> tuple[int, str, str] | None:
    """Return the rank that has connected, what for, and its name; None for a stranger."""
    sock.settimeout(_INTRODUCTION_SECONDS)
    try:
        if not _is_own(sock):
            return None
        facts = json.loads(_receive(sock, _MAX_INTRODUCTION))
        if not secrets.compare_digest(facts["secret"], secret):
            return None
        introduced = (int(facts["rank"]), str(facts["purpose"]), str(facts["name"]))
    except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError):
        return None
    _prepare(sock)
    return introduced


def _is_own(sock: socket.socket) -> bool:
    """Whether the other end of a local socket belongs to the same user; between hosts there is a secret."""
    if sock.family != socket.AF_UNIX:
        return True
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid) == os.getuid()


def _prepare(sock: socket.socket) -> None:
    """Wait as long as it takes from here on, but notice within seconds that the other host is gone."""
    sock.settimeout(None)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 6000)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


# --- meeting in a step


def meets_in_memory(world: World) -> bool:
    """Return whether shares meet in shared memory, and not over gloo.

    Raises:
        ConfigError: the environment asks for something unknown.
        UnsupportedError: it asks for shared memory, and there are several hosts.
    """
    wanted = os.environ.get(EXCHANGE_VARIABLE, "")
    if wanted not in ("", "memory", "gloo"):
        raise ConfigError(EXCHANGE_VARIABLE, got=wanted, expected="memory or gloo")
    if wanted == "memory" and not world.is_one_host:
        raise UnsupportedError(EXCHANGE_VARIABLE, got="memory", expected="gloo, as there are several hosts")
    return world.is_one_host and wanted != "gloo"


def shared_files(world: World, peers: Sequence[Peer]) -> list[int]:
    """Return open files in memory that are the same in all processes: counters, then two places for each rank.

    Rank 0 makes them and sends them to its peers; the others have rank 0 as their only peer.
    """
    count = 1 + 2 * world.size
    if not world.is_first:
        return list(socket.recv_fds(peers[0].sock, 1, count)[1])
    files = [os.memfd_create("eightfold", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) for _ in range(count)]
    for file in files:
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)  # they grow with the cache, and never shrink
    for peer in peers:
        socket.send_fds(peer.sock, [b"0"], files)
    return files


# --- ending together


class Liveness:
    """A thread that ends this process when another one has ended."""

    def __init__(self, world: World, peers: Sequence[Peer]) -> None:
        self._world, self._peers = world, peers
        self._ends = False
        threading.Thread(target=self._run, name="eightfold-liveness", daemon=True).start()

    def end(self) -> None:
        """Let the others end too: all is done."""
        self._end(_OVER)

    def fail(self, reason: str) -> None:
        """Let the others end too. Rank 0 has told the user, or is about to; of another rank it tells the reason."""
        self._end(_TOLD if self._world.is_first else reason)

    def _end(self, words: str) -> None:
        if self._ends:
            return
        self._ends = True
        for peer in self._peers:
            with contextlib.suppress(OSError):  # it has ended already
                peer.watch.sendall(words.encode())
                peer.watch.shutdown(socket.SHUT_WR)

    def _run(self) -> None:
        watched = {peer.watch: peer for peer in self._peers}
        ready, _, _ = select.select(watched, [], [])
        peer = watched[ready[0]]
        words = _last_words(peer.watch)
        if self._ends:
            return
        if self._world.is_first or (self._world.rank == 1 and words not in (_OVER, _TOLD)):
            reason = words or "it has died or cannot be reached, so all others end"
            with contextlib.suppress(OSError):
                print(f"eightfold: {peer}: {reason}. Start the command again.", file=sys.stderr, flush=True)
            self.fail(words)
        sys.stdout.flush()
        os._exit(0 if words == _OVER else EXIT_LOST)


@contextlib.contextmanager
def ended_by_liveness(*more: type[Exception]) -> Iterator[None]:
    """When another process is not there to talk to, wait to be ended by the liveness thread, which knows why.

    Args:
        more: what says so, besides the errors of connections.
    """
    gone: tuple[type[Exception], ...] = (EOFError, ConnectionError, *more)
    try:
        yield
    except gone:
        time.sleep(_END_SECONDS)
        os._exit(EXIT_LOST)


def _last_words(sock: socket.socket) -> str:
    data = b""
    with contextlib.suppress(OSError):
        while len(data) < _MAX_WORDS and (more := sock.recv(4096)):
            data += more
    return " ".join(data.decode(errors="replace").split()).rstrip(".")
