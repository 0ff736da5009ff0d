"""The Responses API: POST /v1/responses, and the responses that are kept for those who build on them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from eightfold.server.answers import to_json
from eightfold.server.field_table import RESPONSES
from eightfold.server.fields import Fields, bad_request
from eightfold.server.generation import Asked
from eightfold.server.requests import read_cache_salt
from eightfold.server.response_items import Item, Placed, read_items, unknown
from eightfold.server.response_requests import read_response
from eightfold.server.response_store import Kept, ResponseStore
from eightfold.values import shown_as_json

if TYPE_CHECKING:
    from starlette.requests import Request

    from eightfold.server.logs import Record
    from eightfold.server.service import Service

MOST_LISTED = 100  # items of a response's input, at a time


class Responses:
    """Reads requests for responses, and answers those for responses that are kept."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._store = ResponseStore(service.settings.responses_kept)

    def read(self, fields: Fields, record: Record) -> Asked:
        """Return what a request for a response asks for."""
        client = _client(record, read_cache_salt(fields))
        earlier, found = self._earlier(fields, client), dict[str, Item]()

        def find(name: str) -> Item | None:
            if name not in found and (holder := self._store.holder(client, name)) is not None:
                found.update({item["id"]: item for item in holder.items})  # all at once: the next one is there too
            return found.get(name)

        given = fields.any("input")
        own = [] if given is None and earlier is not None else read_items(given, find)
        before = [] if earlier is None else [Placed("previous_response_id", item) for item in earlier.items]
        is_kept = fields.read("store") and self._service.settings.responses_kept > 0
        inputs = [item for _, item in (*before, *own)]

        def keep(response: dict[str, Any]) -> None:
            self._store.put(client, response, inputs)

        asked = read_response(fields, self._service, [*before, *own], keep if is_kept else None)
        return replace(
            asked,
            referred_bytes=sum(len(to_json(item)) for item in found.values())
            + (0 if earlier is None else earlier.size),
        )

    def _earlier(self, fields: Fields, client: str) -> Kept | None:
        name = fields.read("previous_response_id")
        if name is None:
            return None
        kept = self._store.get(client, name)
        if kept is None:
            raise unknown("previous_response_id", name)
        return kept

    async def response(self, request: Request) -> Response:
        """Answer GET /v1/responses/{id}."""
        if request.query_params.get("stream", "false").lower() not in ("false", "0"):
            raise bad_request("stream: only a new response can be streamed", param="stream")
        return Response(self._kept(request).body, media_type="application/json")

    async def delete(self, request: Request) -> Response:
        """Answer DELETE /v1/responses/{id}."""
        name = request.path_params["response_id"]
        if not self._store.delete(_asking(request), name):
            raise unknown("response_id", name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    async def inputs(self, request: Request) -> Response:
        """Answer GET /v1/responses/{id}/input_items."""
        items, asked = self._kept(request).inputs, request.query_params
        order, limit, after = asked.get("order", "desc"), asked.get("limit", "20"), asked.get("after")
        if order not in ("asc", "desc"):
            raise bad_request(f"order: got {shown_as_json(order)}, expected asc or desc", param="order")
        if not (limit.isdecimal() and len(limit) < 4 and 1 <= int(limit) <= MOST_LISTED):
            raise bad_request(f"limit: got {shown_as_json(limit)}, expected 1 to {MOST_LISTED}", param="limit")
        if order == "desc":
            items.reverse()
        if after is not None:
            places = [at for at, item in enumerate(items) if item["id"] == after]
            if not places:
                raise bad_request(f"after: got {shown_as_json(after)}, expected the id of an item", param="after")
            items = items[places[0] + 1 :]
        shown = items[: int(limit)]
        content = {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(shown) < len(items),
        }
        return JSONResponse(content)

    async def count(self, request: Request) -> Response:
        """Answer POST /v1/responses/input_tokens: how long the prompt of a request for a response is."""
        service, record = self._service, request.state.record
        fields = await service.read(request, RESPONSES)
        asked = await service.at_once_if_small(record, lambda: self.read(fields, record))
        encoded = await service.in_thread(record, lambda: asked.encode(service.tokenizer))
        return JSONResponse({"object": "response.input_tokens", "input_tokens": len(encoded.prompts[0])})

    async def cancel(self, request: Request) -> Response:
        """Answer POST /v1/responses/{id}/cancel."""
        self._kept(request)
        raise bad_request("response_id: got a response that is complete, expected one in the background")

    def _kept(self, request: Request) -> Kept:
        name = request.path_params["response_id"]
        kept = self._store.get(_asking(request), name)
        if kept is None:
            raise unknown("response_id", name)
        return kept


def _client(record: Record, salt: str) -> str:
    """Return what tells who may see a response: its client's key, and the salt that it gave."""
    return f"{record.client} {salt}"


def _asking(request: Request) -> str:
    return _client(request.state.record, request.query_params.get("cache_salt", ""))
