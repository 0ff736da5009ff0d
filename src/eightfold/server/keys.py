"""Keys: who may use the server, and what tells its clients from each other."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping

from eightfold.server.fields import ApiError


class Keys:
    """The keys that clients may send, as `Authorization: Bearer KEY` or as `X-Api-Key: KEY`.

    Args:
        keys: any of them is accepted; none: every client is.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(map(_digest, keys))

    def client(self, headers: Mapping[bytes, str]) -> str:
        """Return what tells the client of a request from those with other keys.

        How long it takes says nothing about the keys.

        Raises:
            ApiError: 401: there are keys, and the request has none of them.
        """
        sent = [_digest(key) for key in _sent(headers)]
        if not self._digests:
            return (sent or [_digest("")])[0].hex()
        accepted = [each for each in sent if sum(hmac.compare_digest(each, known) for known in self._digests)]
        if not accepted:
            raise _unauthorized(is_given=bool(sent))
        return accepted[0].hex()


def _sent(headers: Mapping[bytes, str]) -> list[str]:
    """Return the keys that a request sends; an Authorization of another kind is one as a whole."""
    authorization = headers.get(b"authorization", "").strip()
    scheme, _, key = authorization.partition(" ")
    is_bearer = scheme.lower() == "bearer"
    # No key has a line break, so that what is no bearer's key is none of ours.
    sent = [key.strip() if is_bearer else authorization and f"{authorization}\n", headers.get(b"x-api-key", "").strip()]
    return [each for each in sent if each]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _unauthorized(*, is_given: bool) -> ApiError:
    message = "the API key is wrong" if is_given else "an API key is needed. Send it as Authorization: Bearer KEY."
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
