"""Responses that are kept for a while, in memory, so that later requests can build on them."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eightfold.server.answers import to_json
from eightfold.server.response_items import Item

MAX_KEPT_BYTES = 64 * 2**20  # of JSON
KEPT_SECONDS = 24 * 3600.0  # since a response was last used


@dataclass(slots=True)
class Kept:
    """A response, and the conversation that it belongs to.

    Attributes:
        response: as it was answered.
        inputs: the items that it answers, with those of earlier responses.
        size: bytes of JSON in both.
        used: when it was last asked for, in seconds of time.monotonic.
    """

    response: dict[str, Any]
    inputs: Sequence[Item]
    size: int
    used: float

    @property
    def items(self) -> list[Item]:
        """The conversation with the answer."""
        return [*self.inputs, *self.response["output"]]


class ResponseStore:
    """Keeps responses, each for the client that asked for it; those unused for longest go first.

    Methods may be called in any thread.

    Args:
        most: responses that are kept; 0: none.
        most_bytes: of JSON that they have together. A conversation's earlier items count with each response.
        clock: seconds.
    """

    def __init__(
        self, most: int, most_bytes: int = MAX_KEPT_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._most_bytes, self._clock = most, most_bytes, clock
        self._kept = OrderedDict[tuple[str, str], Kept]()  # by client and id; what was used last comes last
        self._holders = defaultdict[tuple[str, str], dict[tuple[str, str], None]](dict)  # of items: who has them
        self._size = 0
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of JSON in all that is kept."""
        return self._size

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, client: str, response: dict[str, Any], inputs: Sequence[Item]) -> None:
        """Keep a response, unless it is too large."""
        size = len(to_json(response)) + len(to_json(inputs))
        if not self._most or size > self._most_bytes:
            return
        with self._lock:
            kept = Kept(response, inputs, size, self._clock())
            key = (client, response["id"])
            self._kept[key] = kept
            self._size += size
            for item in kept.items:
                self._holders[client, item["id"]][key] = None
            self._forget_old()

    def get(self, client: str, name: str) -> Kept | None:
        """Return a response of a client by its id."""
        with self._lock:
            self._forget_old()
            return self._use((client, name))

    def item(self, client: str, name: str) -> Item | None:
        """Return an item of a client's responses or of what they answer, by its id."""
        with self._lock:
            self._forget_old()
            holders = self._holders.get((client, name))
            kept = self._use(next(reversed(holders))) if holders else None
            return None if kept is None else next(item for item in kept.items if item["id"] == name)

    def delete(self, client: str, name: str) -> bool:
        """Forget a response of a client; return whether there was one."""
        with self._lock:
            self._forget_old()
            return self._forget((client, name))

    def _use(self, key: tuple[str, str]) -> Kept | None:
        kept = self._kept.get(key)
        if kept is not None:
            kept.used = self._clock()
            self._kept.move_to_end(key)
        return kept

    def _forget_old(self) -> None:
        now = self._clock()
        while self._kept:
            key, oldest = next(iter(self._kept.items()))
            is_over = len(self._kept) > self._most or self._size > self._most_bytes
            if not (is_over or now - oldest.used > KEPT_SECONDS):
                return
            self._forget(key)

    def _forget(self, key: tuple[str, str]) -> bool:
        kept = self._kept.pop(key, None)
        if kept is None:
            return False
        self._size -= kept.size
        for item in kept.items:
            holders = self._holders[key[0], item["id"]]
            holders.pop(key, None)
            if not holders:
                del self._holders[key[0], item["id"]]
        return True
