"""The server's life: a socket, an event loop, and an end in good order.

The first SIGTERM or SIGINT stops it: new requests and /health get 503, those that run may finish. A second one, or the
end of the time for it, ends them too.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import uvicorn

from eightfold.errors import ConfigError
from eightfold.server.app import create_app
from eightfold.server.connections import Connections
from eightfold.server.service import Hosts, ServerSettings, Service

if TYPE_CHECKING:
    from eightfold.engine.async_llm import AsyncLLM

log = logging.getLogger("eightfold.server")

KEEP_ALIVE_SECONDS = 75  # longer than clients and proxies keep a connection, so that it is them who close it
GRACE_SECONDS = 3.0  # for the last bytes of answers


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that has an address and does not listen yet.

    Raises:
        ConfigError: the address is in use, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise _not_ours(host, error) from None
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise _address_error(host, port, error) from None
    return found


def _not_ours(host: str, error: OSError) -> ConfigError:
    return ConfigError("host", got=host, expected="an address of this machine", action=f"{error.strerror}.")


def _address_error(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        action = "Another program uses this one: choose another."
        return ConfigError("port", got=port, expected="a free one", action=action)
    if error.errno == errno.EACCES:
        action = "Lower ones need rights that you do not have."
        return ConfigError("port", got=port, expected="1024 or more", action=action)
    return _not_ours(host, error)


def serve(engine: AsyncLLM, settings: ServerSettings, sock: socket.socket, announce: Callable[[str], None]) -> None:
    """Serve on a socket from `bind` until a signal says to stop; `announce` is told the address once it is served.

    Raises:
        ConfigError: another program was quicker to listen at the address.
    """
    host, port = sock.getsockname()[:2]
    try:
        Server(engine, settings, lambda: announce(f"http://{_in_url(host)}:{port}")).run(sockets=[sock])
    except OSError as error:
        raise _address_error(host, port, error) from None


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Server(uvicorn.Server):
    """uvicorn with a stop of our own."""

    def __init__(self, engine: AsyncLLM, settings: ServerSettings, ready: Callable[[], None]) -> None:
        self.service = Service(engine, settings)
        self._ready = ready
        self._connections = Connections()
        self._drain: asyncio.Task[None] | None = None
        config = uvicorn.Config(
            create_app(self.service),
            http=cast(Any, self._connections.protocol),
            backlog=self._connections.backlog,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=round(GRACE_SECONDS),
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: `startup` has seen to them."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for sock in sockets or ():
            self.service.hosts = Hosts(str(sock.getsockname()[0]), self.service.settings)
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._connections.on_fault)
        await super().startup(sockets)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                loop.add_signal_handler(number, self.stop)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # each second
            self._connections.look()
        return await super().on_tick(counter)

    def stop(self) -> None:
        """Begin to stop; the second time, do not wait for anybody."""
        if self._drain is None:
            self._drain = asyncio.get_running_loop().create_task(self._finish())
        else:
            self.service.abort_all()

    async def _finish(self) -> None:
        """Let what runs come to its end, within the time for it."""
        limiter, timeout = self.service.limiter, self.service.settings.drain_timeout
        limiter.is_draining = True
        log.info("stopping: %d sequences may finish within %g s", limiter.inside, timeout)
        for seconds in (timeout, GRACE_SECONDS):
            try:
                await asyncio.wait_for(limiter.wait_until_empty(), seconds)
                break
            except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
                log.warning("ending %d sequences that still run", limiter.inside)
                self.service.abort_all()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._connections.tell()
        self.service.close()
        await self.service.engine.shutdown()
        log.info("stopped")
