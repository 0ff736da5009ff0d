"""What the server is told when it starts, and the sizes that it never exceeds."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

MAX_BODY_BYTES = 4 * 2**20
READ_AWAY_BYTES = 16 * MAX_BODY_BYTES  # of a body that is too large
MAX_HELD_BYTES = 256 * 2**20  # of all bodies that are being read or tokenized
BODY_SECONDS = 30.0  # a body has to have arrived by then
MAX_JSON_DEPTH = 64
MAX_JSON_VALUES = 1_000_000  # more than a body of token ids has
LARGE_BODY_BYTES = 32 * 2**10  # larger ones are parsed and tokenized where they hold up nobody else
MAX_CHOICES = 128  # n
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIASES = 1024
MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 64 * 2**10  # of a JSON schema, regex or grammar, as text


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How to serve.

    Attributes:
        model_names: what clients may call the model; answers carry the first.
        api_key: what clients have to send; None: nothing.
        max_num_seqs: how many sequences the engine runs at a time.
        max_waiting: how many more may wait for their turn.
        drain_timeout: seconds that running requests get to finish when the server is told to stop.
        cors_origins: web origins whose pages may call the API; "*" for any.
    """

    model_names: tuple[str, ...]
    api_key: str | None = None
    max_num_seqs: int = 64
    max_waiting: int = 256
    drain_timeout: float = 30.0
    cors_origins: tuple[str, ...] = ()

    def accepts_key(self, authorization: str) -> bool:
        """Return whether an Authorization header holds the key, in a time that says nothing about the key."""
        if self.api_key is None:
            return True
        scheme, _, given = authorization.partition(" ")
        matches = hmac.compare_digest(_digest(given.strip()), _digest(self.api_key))
        return matches and scheme.lower() == "bearer"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
