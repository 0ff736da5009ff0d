"""How the shares of a model meet in a step: in memory that the processes of a host share, or over gloo between hosts.

EIGHTFOLD_EXCHANGE=gloo takes gloo on one host, too.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Sequence

from eightfold.errors import ConfigError, UnsupportedError
from eightfold.parallel.link import Peer
from eightfold.parallel.world import World

EXCHANGE_VARIABLE = "EIGHTFOLD_EXCHANGE"


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
