"""What the endpoints share: the engine, who is let in, what runs, and threads for the tokenizer."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from eightfold.errors import ConfigError
from eightfold.server.fields import (
    LARGE_BODY_BYTES,
    ApiError,
    Fields,
    bad_request,
    draining,
    parse,
    receive,
)
from eightfold.server.generation import Asked, InFlight
from eightfold.server.logs import Record
from eightfold.server.metrics import Metrics
from eightfold.server.served import Served
from eightfold.server.tool_parsers import AUTO
from eightfold.values import shown_as_json

if TYPE_CHECKING:
    from starlette.requests import Request

    from eightfold.engine.async_llm import AsyncLLM

MAX_HELD_BYTES = 256 * 2**20  # of all bodies that are being read or tokenized
BYTES_OF_VALUE = 100  # of memory, for each value of a body that has more than most
FEW_VALUES = 10_000
# Log-probabilities of the answers to one request, and to all; those of a single sequence do not count: they take time.
MAX_ENTRIES, MAX_HELD_ENTRIES = 2**20, 2**22

T = TypeVar("T")

_HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How to serve."""

    model_names: tuple[str, ...]  # what clients may call the model; answers carry the first
    api_keys: tuple[str, ...] = ()  # clients have to send one of them; none: nothing
    max_num_seqs: int = 64  # sequences that the engine runs at a time
    max_waiting: int = 256  # sequences that may wait beyond those
    drain_timeout: float = 30.0  # seconds that running requests get to finish when the server is told to stop
    cors_origins: tuple[str, ...] = ()  # web origins whose pages may call the API; "*" for any
    cache_salt_per_key: bool = False  # only requests with the same key share the prefix cache
    report_cached_tokens: bool = False  # also of prompts that another client may have sent before
    reasoning_parser: str = "auto"  # how thoughts are told from answers, see engine/reasoning.py
    responses_kept: int = 1000  # of the Responses API, for requests that build on them
    tool_call_parser: str = AUTO  # the family in whose form calls are recognised
    allowed_hosts: tuple[str, ...] = ()  # names of this server beside those of the loopback interface; "*" for any


def host_name(text: str) -> str:
    """Return the name in what a person gives as a host, which may be an address or have a port.

    Raises:
        ConfigError: it is no host.
    """
    match = _HOST.fullmatch(text)
    name = (match[1] if match else text).strip("[]").rstrip(".").lower()
    if match is None and text != "*" and not _is_address(text):
        raise ConfigError("allowed_host", got=shown_as_json(text), expected="a name such as llm.example, or an address")
    return name


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_loopback(address: str) -> bool:
    """Return whether a host is an address of the loopback interface, which no owner of a name can choose."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


class Hosts:
    """By which names requests may call this server.

    The owner of evil.example can make that name point at 127.0.0.1. A page of his is then of the same origin as this
    server, and only the Host header tells. So names are checked where nothing else keeps strangers out, which is on a
    loopback address without a key; elsewhere they are checked if there is a list.

    Args:
        address: on which the server listens.
        settings: with the names that are allowed beside localhost and the address.
    """

    def __init__(self, address: str, settings: ServerSettings) -> None:
        is_loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        given = frozenset(map(host_name, settings.allowed_hosts))
        self._are_checked = "*" not in given and bool(given or (is_loopback and not settings.api_keys))
        self._names = given | {"localhost", address}
        self._origins = frozenset(settings.cors_origins)

    def require(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Check the Host and the Origin of a request.

        Raises:
            ApiError: 400 where there is no Host, or a strange one; 403 for a name that is not ours.
        """
        if not self._are_checked:
            return
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None:
            got = shown_as_json(hosts[0]) if len(hosts) == 1 else f"{len(hosts)} of them"
            raise ApiError(400, f"Host: got {got}, expected one name with or without a port", code="invalid_host")
        self._require_ours("Host", match[1])
        for origin in (value.decode("latin-1") for name, value in headers if name == b"origin"):
            if not self._origins & {origin, "*"}:
                match = _HOST.fullmatch(origin.partition("://")[2])
                self._require_ours("Origin", match[1] if match else origin)

    def _require_ours(self, header: str, name: str) -> None:
        name_or_address = name.strip("[]").removesuffix(".").lower()
        if name_or_address in self._names or _is_loopback(name_or_address):
            return
        option = "--allowed-host" if header == "Host" else "--cors-origin"
        message = f"{header}: got {shown_as_json(name)}, which this server does not answer to. Start it with {option}."
        raise ApiError(403, message, code=f"{header.lower()}_not_allowed")


class Limiter:
    """Counts sequences from their admission to their end, and bytes of bodies from their arrival until they are tokens.

    Attributes:
        inside: sequences that were admitted and have not ended.
        held_bytes: bytes of bodies.
        held_entries: log-probabilities that the answers may have.
        is_draining: whether the server is stopping.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._running = settings.max_num_seqs
        self._most = settings.max_num_seqs + settings.max_waiting
        self.inside = 0
        self.held_bytes = self.held_entries = 0
        self.is_draining = False
        self._mean_seconds = 1.0  # of the last requests
        self._emptied = asyncio.Event()
        self._emptied.set()

    @contextmanager
    def admitted(self, sequences: int) -> Iterator[None]:
        """Let a request in for as long as the context lasts.

        Raises:
            ApiError: 400 for one that can never be admitted, 429 when too many are inside, 503 while draining.
        """
        if self.is_draining:
            raise draining()
        if sequences > self._most:
            raise bad_request(f"prompts x n: got {sequences}, expected at most {self._most}", param="n")
        if self.inside + sequences > self._most:
            raise self._busy("requests are waiting")
        self.inside += sequences
        self._emptied.clear()
        entered = time.monotonic()
        try:
            yield
        finally:
            self.inside -= sequences
            if not self.inside:
                self._emptied.set()
            self._mean_seconds += 0.1 * (time.monotonic() - entered - self._mean_seconds)

    def hold(self, record: Record, size: int) -> None:
        """Count more bytes of a request's body; ApiError 429 where there are too many already."""
        if self.held_bytes + size > MAX_HELD_BYTES:
            raise self._busy("texts are being read")
        self.held_bytes += size
        record.held_bytes += size

    def let_go(self, record: Record) -> None:
        self.held_bytes -= record.held_bytes
        record.held_bytes = 0

    def hold_entries(self, record: Record, count: int) -> None:
        """Count log-probabilities that a request's answers may have; ApiError 400 or 429 where they are too many."""
        if count > MAX_ENTRIES:
            expected = f"expected at most {MAX_ENTRIES}. Ask for fewer answers, tokens or alternatives."
            raise bad_request(f"logprobs: got up to {count} in all answers, {expected}", param="logprobs")
        if self.held_entries + count > MAX_HELD_ENTRIES:
            raise self._busy("log-probabilities are being computed")
        self.held_entries += count
        record.held_entries += count

    def let_go_entries(self, record: Record) -> None:
        self.held_entries -= record.held_entries
        record.held_entries = 0

    async def wait_until_empty(self) -> None:
        await self._emptied.wait()

    def _busy(self, what: str) -> ApiError:
        turns = max(self.inside - self._running, 0) / self._running
        seconds = min(max(math.ceil(turns * self._mean_seconds), 1), 60)
        message = f"too many {what}. Try again in {seconds} s."
        return ApiError(429, message, code="too_many_requests", headers={"Retry-After": str(seconds)})


class Service(Served):
    """An engine and everything around it.

    Attributes:
        created: when it began, in seconds since 1970.
    """

    def __init__(self, engine: AsyncLLM, settings: ServerSettings) -> None:
        ours = engine.engine
        parsers = settings.reasoning_parser, settings.tool_call_parser
        super().__init__(ours.tokenizer, ours.max_model_len, settings.model_names, *parsers)
        self.engine, self.settings = engine, settings
        self.arithmetic = (ours.config.attention_mode, ours.config.dynamic)
        self.hosts = Hosts("127.0.0.1", settings)  # until it is known where the server listens
        self.limiter = Limiter(settings)
        self.metrics = Metrics(settings.model_names[0], lambda: engine.stats)
        self.created = int(time.time())
        # Large texts have one thread, behind which small ones do not wait.
        self._small_texts, self._large_texts = ThreadPoolExecutor(2, "text"), ThreadPoolExecutor(1, "large-text")
        self._in_flight: set[InFlight] = set()

    async def read(self, request: Request, path: str = "") -> Fields:
        """Return the fields of a request for the model, at an endpoint as the table of fields calls it.

        Raises:
            ApiError: 4xx, or 503 while the server is stopping.
        """
        if self.limiter.is_draining:
            raise draining()
        record: Record = request.state.record
        raw = await receive(request, lambda size: self.limiter.hold(record, size))
        values, count = await self.at_once_if_small(record, lambda: parse(raw))
        self.limiter.hold(record, max(count - FEW_VALUES, 0) * BYTES_OF_VALUE)
        return self.fields(values, path)

    async def at_once_if_small(self, record: Record, work: Callable[[], T]) -> T:
        """Return what work on a request returns: at once, or in a thread where the body is large."""
        return await self.in_thread(record, work) if record.held_bytes > LARGE_BODY_BYTES else work()

    async def in_thread(self, record: Record, work: Callable[[], T]) -> T:
        """Return what work on a request's texts returns, in a thread."""
        pool = self._large_texts if record.held_bytes > LARGE_BODY_BYTES else self._small_texts
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    @contextmanager
    def in_flight(self, asked: Asked, prompts: Sequence[Sequence[int]], record: Record) -> Iterator[InFlight]:
        """Hold prompts that `abort_all` knows for as long as the context lasts."""
        made = InFlight(self.engine, self.metrics, asked, prompts, record)
        self._in_flight.add(made)
        try:
            yield made
        finally:
            self._in_flight.discard(made)

    def abort_all(self) -> None:
        for each in tuple(self._in_flight):
            each.abort()

    def close(self) -> None:
        for pool in (self._small_texts, self._large_texts):
            pool.shutdown(wait=False, cancel_futures=True)
