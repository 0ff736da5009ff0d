"""Responses that are kept for a while, in memory, so that later requests can build on them."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from eightfold.server.answers import in_parts
from eightfold.server.response_items import Item

MAX_KEPT_BYTES = 64 * 2**20
KEPT_SECONDS = 24 * 3600.0  # since a response was last used
_ITEM_BYTES = 500  # what an item takes beside its JSON

_DEEP = 9  # levels of a response down to its log-probabilities


class Kept:
    """A response, and the conversation that it belongs to, as JSON: objects would take ten times the memory.

    Attributes:
        body: the response.
        names: ids of the items that it answers, with those of earlier responses, and of its own.
        used: when it was last asked for, in seconds of time.monotonic.
    """

    __slots__ = ("_inputs", "body", "names", "used")

    def __init__(self, response: dict[str, Any], inputs: Sequence[Item], now: float) -> None:
        self.body, self._inputs = b"".join(in_parts(response, _DEEP)), b"".join(in_parts(list(inputs)))
        self.names = [item["id"] for item in (*inputs, *response["output"])]
        self.used = now

    @property
    def size(self) -> int:
        """Bytes in memory, about."""
        return len(self.body) + len(self._inputs) + _ITEM_BYTES * (1 + len(self.names))

    @property
    def inputs(self) -> list[Item]:
        """The items that it answers."""
        inputs: list[Item] = json.loads(self._inputs)
        return inputs

    @property
    def items(self) -> list[Item]:
        """The conversation with the answer."""
        return [*self.inputs, *json.loads(self.body)["output"]]


class ResponseStore:
    """Keeps responses, each for the client that asked for it; those unused for longest go first.

    Methods may be called in any thread.

    Args:
        most: responses that are kept; 0: none.
        most_bytes: of memory. A conversation's earlier items are kept, and count, with each response.
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
        """Bytes of all that is kept."""
        return self._size

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, client: str, response: dict[str, Any], inputs: Sequence[Item]) -> None:
        """Keep a response, unless it is too large."""
        kept, key = Kept(response, inputs, self._clock()), (client, response["id"])
        if not self._most or kept.size > self._most_bytes:
            return
        with self._lock:
            self._kept[key] = kept
            self._size += kept.size
            for name in kept.names:
                self._holders[client, name][key] = None
            self._forget_old()

    def get(self, client: str, name: str) -> Kept | None:
        """Return a response of a client by its id."""
        with self._lock:
            self._forget_old()
            return self._use((client, name))

    def holder(self, client: str, name: str) -> Kept | None:
        """Return the youngest response of a client that has an item, or answers it, by the item's id."""
        with self._lock:
            self._forget_old()
            holders = self._holders.get((client, name))
            return self._use(next(reversed(holders))) if holders else None

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
        for name in set(kept.names):
            holders = self._holders[key[0], name]
            del holders[key]
            if not holders:
                del self._holders[key[0], name]
        return True
