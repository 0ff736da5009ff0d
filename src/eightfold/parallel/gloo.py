"""torch.distributed with gloo: for models on several hosts, and for quantizing in several processes (ranks.py)."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

from eightfold.errors import DependencyError
from eightfold.parallel.world import World

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SIOCGIFADDR = 0x8915  # of Linux: the address of an interface


def start_gloo(world: World, seconds: float) -> Any:
    """Begin torch.distributed and return its store; any wait for another process ends after so many seconds.

    Raises:
        DependencyError: torch is not installed.
    """
    try:
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous
    except ImportError:
        raise DependencyError(
            "processes on several hosts need torch",
            got="none installed",
            action="Install it: pip install 'eightfold[distributed]'",
        ) from None
    # Left to itself, gloo takes the interface that the host's own name stands for, which other hosts need not see.
    if interface := _interface_to(world.address, world.port):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    timeout = datetime.timedelta(seconds=seconds)
    store, _, _ = next(iter(rendezvous("env://", world.rank, world.size, timeout=timeout)))
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    atexit.register(_stop_gloo)
    return store


def _stop_gloo() -> None:
    """End gloo's threads while Python still runs: later they end the process with SIGABRT."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast(values: list[Any]) -> list[Any]:
    """Return what rank 0 passes."""
    import torch.distributed as dist

    dist.broadcast_object_list(values, src=0)
    return values


def gather_parts(own: NDArray[Any], everybody: NDArray[Any]) -> None:
    """Put every rank's part (n,) into (ranks, n).

    Raises:
        RuntimeError: a connection is closed.
    """
    import torch
    import torch.distributed as dist

    dist.all_gather(list(torch.from_numpy(everybody)), torch.from_numpy(own))


def _interface_to(address: str, port: int) -> str | None:
    """Return the network interface by which an address is reached; None where that cannot be told."""
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
