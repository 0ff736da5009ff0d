"""How the processes that work on one thing talk: rank 0 has two connections to each of the others.

    orders    messages, one after the other
    watch     silent while both live: whoever ends closes it (engine/watch.py, quant/watch.py)

On one host they are local sockets with names of their own, which only processes of the same user get to talk over;
files of shared memory travel over them too. Between hosts they are TCP, with a secret that torchrun's store hands out.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

from eightfold.errors import ConfigError
from eightfold.parallel.world import World

# Until rank 0 is there: it may read a long file of prompts first.
JOIN_SECONDS = 600.0
# For a new connection to say whose it is, in so many bytes at most.
_INTRODUCTION_SECONDS = 5.0
_MOST_INTRODUCTION = 4096

_SIOCGIFADDR = 0x8915  # of Linux: the address of an interface

_LENGTH = struct.Struct("<Q")


class Connection:
    """Messages between two processes, in order."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, data: bytes) -> None:
        """Send a message."""
        self.sock.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self, most: int | None = None) -> bytearray:
        """Wait for a message.

        Args:
            most: bytes of it; None for any number.

        Raises:
            EOFError: the other has ended.
            ValueError: it is longer.
        """
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if most is not None and length > most:
            raise ValueError(f"a message of {length} bytes")
        return self._exactly(length)

    def _exactly(self, length: int) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            try:
                count = self.sock.recv_into(view)
            except ConnectionError:
                count = 0
            if not count:
                raise EOFError
            view = view[count:]
        return data

    def tell(self, **facts: Any) -> None:
        """Send a JSON object."""
        self.send(json.dumps(facts).encode())

    def hear(self, most: int | None = None) -> dict[str, Any]:
        """Wait for a JSON object; see `receive`."""
        facts = json.loads(bytes(self.receive(most)))
        assert isinstance(facts, dict)
        return facts


@dataclass
class Peer:
    """Another rank, as this one reaches it."""

    rank: int
    orders: Connection
    watch: socket.socket
    name: str = ""  # host and process, for messages

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.name})" if self.name else f"rank {self.rank}"


def local_name(world: World) -> str:
    """Return the name in the abstract namespace where rank 0 of a run on one host is found."""
    return f"\0eightfold-{os.getuid()}-{world.port}-{world.run}"


def listen(world: World, *, local: bool) -> socket.socket:
    """Return a socket to which the other ranks connect."""
    family = socket.AF_UNIX if local else socket.AF_INET6 if ":" in world.address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.bind(local_name(world) if local else ("", 0))
    sock.listen(2 * world.size)
    return sock


def accept_all(sock: socket.socket, world: World, secret: str) -> list[Peer]:
    """Wait until all other ranks have connected; return them in order.

    Raises:
        ConfigError: one of them is not there in time.
    """
    ends, found = time.monotonic() + JOIN_SECONDS, dict[tuple[int, str], socket.socket]()
    names = dict[int, str]()
    while len(found) < 2 * (world.size - 1):
        sock.settimeout(max(ends - time.monotonic(), 0.001))
        try:
            other, _ = sock.accept()
            who = _introduced(other, secret)
        except TimeoutError:
            missing = next(r for r in range(1, world.size) if (r, "watch") not in found)
            raise ConfigError(f"rank {missing}", got=f"no word from it in {JOIN_SECONDS:.0f} s") from None
        if who is None or who[:2] in found or not 1 <= who[0] < world.size:
            other.close()  # a stranger
        else:
            found[who[:2]], names[who[0]] = other, who[2]
    return [Peer(r, Connection(found[r, "orders"]), found[r, "watch"], names[r]) for r in range(1, world.size)]


def connect(world: World, address: Any, secret: str, *, local: bool) -> Peer:
    """Connect to rank 0.

    Raises:
        ConfigError: it is not there in time.
    """
    orders, watch = (_connected(world, address, purpose, secret, local) for purpose in ("orders", "watch"))
    return Peer(0, Connection(orders), watch)


def _connected(world: World, address: Any, purpose: str, secret: str, local: bool) -> socket.socket:
    ends = time.monotonic() + JOIN_SECONDS
    while True:
        sock = socket.socket(socket.AF_UNIX) if local else None
        try:
            if sock is None:
                sock = socket.create_connection(address, timeout=JOIN_SECONDS)
            else:
                sock.connect(address)
            break
        except OSError as error:
            if sock is not None:
                sock.close()
            if time.monotonic() > ends:
                raise ConfigError("rank 0", got=f"no connection in {JOIN_SECONDS:.0f} s", action=str(error)) from None
            time.sleep(0.05)
    if not _is_own(sock):
        raise ConfigError("rank 0", got="another user's process", expected="one of this user")
    _prepare(sock)
    Connection(sock).tell(rank=world.rank, purpose=purpose, secret=secret, name=process_name())
    return sock


def interface_to(address: str, port: int) -> str | None:
    """Return the network interface by which an address is reached; None where that cannot be told.

    Left to itself, gloo takes the one that the host's own name stands for, which other hosts need not see.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(address, port or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(target)  # nothing is sent
            own = sock.getsockname()[0]
            if family != socket.AF_INET:
                return None
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # an interface without an address
                    request = struct.pack("256s", name.encode()[:15])
                    if socket.inet_ntoa(fcntl.ioctl(sock, _SIOCGIFADDR, request)[20:24]) == own:
                        return name
    except OSError:
        pass
    return None


def process_name() -> str:
    """Return what a person finds this process by."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _introduced(sock: socket.socket, secret: str) -> tuple[int, str, str] | None:
    """Return who has connected, what for, and its name; None for a stranger."""
    sock.settimeout(_INTRODUCTION_SECONDS)
    try:
        if not _is_own(sock):
            return None
        facts = Connection(sock).hear(_MOST_INTRODUCTION)
        if facts["secret"] != secret:
            return None
        who = (int(facts["rank"]), str(facts["purpose"]), str(facts["name"]))
    except (OSError, EOFError, ValueError, KeyError, AssertionError, RecursionError):
        return None
    _prepare(sock)
    return who


def _is_own(sock: socket.socket) -> bool:
    """Whether the other end of a local socket belongs to the same user; between hosts there is a secret."""
    if sock.family != socket.AF_UNIX:
        return True
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid) == os.getuid()


def _prepare(sock: socket.socket) -> None:
    """Wait as long as it takes from here on; notice within seconds that the other host is gone."""
    sock.settimeout(None)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 6000)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
