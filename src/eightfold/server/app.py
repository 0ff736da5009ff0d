"""The application: what answers each path, and what surrounds every request: its id, the key, its errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eightfold import __version__
from eightfold.server.answers import in_parts
from eightfold.server.chat_page import ChatPage
from eightfold.server.conversations import read_conversation
from eightfold.server.field_table import CHAT, COMPLETIONS, DETOKENIZE, RESPONSES, TOKENIZE
from eightfold.server.fields import ApiError, Fields, bad_request, internal, wrong
from eightfold.server.generation import Asked, answer_stream, answer_whole, send_json
from eightfold.server.keys import Keys
from eightfold.server.logs import GONE, Record, request_id
from eightfold.server.metrics import CONTENT_TYPE
from eightfold.server.not_served import instead
from eightfold.server.openapi import description
from eightfold.server.requests import read_chat, read_completion
from eightfold.server.responses import Responses
from eightfold.server.service import Service
from eightfold.server.tools import read_tools
from eightfold.values import STRING, SWITCH, Kind

log = logging.getLogger("eightfold.server")

_PROMPTS = {CHAT: "messages", COMPLETIONS: "prompt", RESPONSES: "input"}  # where each endpoint finds a prompt
_VERSION = "/v1"  # before paths of OpenAI's API, and left out by clients whose base URL has none
_OPEN = frozenset({"/", "/health"})  # what needs no key: the page asks for it
_TOKEN = Kind((int,), "the id of a token", least=0, most=2**31 - 1, outside="the id of a token")


class Generating:
    """Answers prompts, as the fields of a request ask for it."""

    def __init__(self, service: Service, path: str, read: Callable[[Fields, Record], Asked]) -> None:
        self._service, self._path, self._read = service, path, read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, service = Request(scope, receive), self._service
        record: Record = request.state.record
        fields = await service.read(request, self._path)
        asked = await service.at_once_if_small(record, lambda: self._read(fields, record))
        record.ignored = fields.ignored
        service.limiter.hold(record, asked.referred_bytes)
        with service.limiter.admitted(asked.params.n * asked.prompts):
            prompts, answer, params = await service.in_thread(record, lambda: asked.encode(service.tokenizer))
            asked = asked if params is None else replace(asked, params=params)
            service.limiter.let_go(record)
            service.require_fit(prompts, _PROMPTS[self._path])
            service.limiter.hold_entries(record, asked.entries(prompts, service.max_model_len))
            respond = answer_stream if asked.streams else answer_whole
            with service.in_flight(asked, prompts, record) as running:
                await respond(running, answer, receive, send)


class Endpoints:
    """Models, tokens, health, metrics, version and what is served."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.served: list[tuple[str, str]] = []  # methods and paths

    async def models(self, request: Request) -> Response:
        names = self._service.settings.model_names
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._service.settings.model_names:
            raise self._service.unknown_model(name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        service = self._service
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "eightfold",
            "root": service.settings.model_names[0],
            "max_model_len": service.max_model_len,
            "has_chat_template": service.template is not None,
        }

    async def tokenize(self, request: Request) -> Response:
        return await self._in_thread(request, TOKENIZE, self._tokenized)

    async def detokenize(self, request: Request) -> Response:
        return await self._in_thread(request, DETOKENIZE, self._detokenized)

    async def _in_thread(self, request: Request, path: str, work: Callable[[Fields], dict[str, Any]]) -> Response:
        """Answer with what work on the fields of a request returns; both may be long."""
        fields = await self._service.read(request, path)
        body = await self._service.in_thread(request.state.record, lambda: b"".join(in_parts(work(fields))))
        return Response(body, media_type="application/json")

    def _tokenized(self, fields: Fields) -> dict[str, Any]:
        service, tokenizer = self._service, self._service.tokenizer
        text, with_texts = fields.read("prompt", STRING), fields.read("return_token_strs", SWITCH, False)
        if text is not None:
            ids = tokenizer.encode(text, special_tokens=fields.read("add_special_tokens", SWITCH, True))
        elif fields.any("messages") is not None:
            tools = read_tools(fields, service.tool_family)
            conversation = read_conversation(fields, service.template, tools.shown)
            ids = conversation.prompt(tokenizer, service.thinking).token_ids
        else:
            raise bad_request("prompt: expected a text, or messages", param="prompt")
        content = {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids}
        return content | ({"token_strs": [service.texts.of(token) for token in ids]} if with_texts else {})

    def _detokenized(self, fields: Fields) -> dict[str, Any]:
        if fields.any("tokens") is None:
            raise bad_request("tokens: expected a list of token ids", param="tokens")
        ids, keep = fields.items("tokens", 2**18), not fields.read("skip_special_tokens", SWITCH, False)
        tokenizer = self._service.tokenizer
        for at, token in enumerate(ids):
            if not _TOKEN.fits(token) or tokenizer.piece(token) is None:  # the library would leave it out in silence
                raise wrong(f"tokens[{at}]", token, _TOKEN.name)
        return {"prompt": tokenizer.decode(ids, keep_special=keep)}

    async def tokenizer_info(self, request: Request) -> Response:
        service = self._service
        known = await service.in_thread(request.state.record, service.tokenizer.description)
        return JSONResponse({**known, "model_max_length": service.max_model_len, "chat_template": service.template})

    async def openapi(self, request: Request) -> Response:
        needs_key = bool(self._service.settings.api_keys)
        return JSONResponse(description(self.served, needs_key=needs_key, open_paths=_OPEN))

    async def health(self, request: Request) -> Response:
        if self._service.limiter.is_draining:
            return JSONResponse({"status": "stopping"}, 503)
        if not self._service.engine.is_healthy:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})


def create_app(service: Service) -> ASGIApp:
    """Return the ASGI application of a service."""
    small, page, responses = Endpoints(service), ChatPage(service), Responses(service)

    def chat(fields: Fields, record: Record) -> Asked:
        return read_chat(fields, service)

    def completion(fields: Fields, record: Record) -> Asked:
        return read_completion(fields, service)

    routes = [
        Route("/", page.show, methods=["GET"]),
        Route("/v1/chat/completions", Generating(service, CHAT, chat), methods=["POST"]),
        Route("/v1/completions", Generating(service, COMPLETIONS, completion), methods=["POST"]),
        Route("/v1/responses", Generating(service, RESPONSES, responses.read), methods=["POST"]),
        Route("/v1/responses/input_tokens", responses.count, methods=["POST"]),
        Route("/v1/responses/{response_id}", responses.response, methods=["GET"]),
        Route("/v1/responses/{response_id}", responses.delete, methods=["DELETE"]),
        Route("/v1/responses/{response_id}/input_items", responses.inputs, methods=["GET"]),
        Route("/v1/responses/{response_id}/cancel", responses.cancel, methods=["POST"]),
        Route("/v1/models", small.models, methods=["GET"]),
        Route("/v1/models/{name:path}", small.model, methods=["GET"]),
        Route("/tokenize", small.tokenize, methods=["POST"]),
        Route("/detokenize", small.detokenize, methods=["POST"]),
        Route("/render", page.render, methods=["POST"]),
        Route("/tokenizer_info", small.tokenizer_info, methods=["GET"]),
        Route("/openapi.json", small.openapi, methods=["GET"]),
        Route("/health", small.health, methods=["GET"]),
        Route("/metrics", small.metrics, methods=["GET"]),
        Route("/version", small.version, methods=["GET"]),
    ]
    small.served = [(method, route.path) for route in routes for method in sorted(route.methods or ())]
    routes += [_without_version(route) for route in routes if route.path.startswith(_VERSION)]
    app: ASGIApp = Gateway(Router(routes, redirect_slashes=False), service, (route.path for route in routes))
    origins = service.settings.cors_origins
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id", "Retry-After"],
    )


def _without_version(route: Route) -> Route:
    return Route(route.path.removeprefix(_VERSION), route.endpoint, methods=sorted(route.methods or ()))


class Gateway:
    """Lets requests through to the application and takes note of them."""

    def __init__(self, app: ASGIApp, service: Service, paths: Iterable[str]) -> None:
        self._app, self._service, self._paths = app, service, frozenset(paths)
        self._keys = Keys(service.settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        settings = self._service.settings
        record = Record(
            request_id(headers.get(b"x-request-id")),
            scope["method"],
            scope["path"],
            tells_cached=settings.report_cached_tokens or settings.cache_salt_per_key,
        )
        scope.setdefault("state", {})["record"] = record
        scope["app"] = self._app  # with it the routes raise what they would else answer in plain text
        id_header = (b"x-request-id", record.id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), id_header]
            await send(message)

        try:
            await self._answer(scope, receive, send_with_id, headers)
        finally:
            self._note(record)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Mapping[bytes, str]) -> None:
        record: Record = scope["state"]["record"]
        try:
            self._service.hosts.require(scope["headers"])
            if scope["path"] not in _OPEN:
                record.client = self._keys.client(headers)
                record.cache_salt = record.client if self._service.settings.cache_salt_per_key else ""
            await self._app(scope, receive, send)
        except ClientDisconnect:
            record.status = GONE
        except HTTPException as problem:
            if scope["method"] == "OPTIONS" and problem.status_code == 405:
                await Response(status_code=204, headers=problem.headers)(scope, receive, send)
            else:
                await _send_problem(record, send, _routing_problem(problem, scope))
        except ApiError as problem:
            await _send_problem(record, send, problem)
        except asyncio.CancelledError:  # the server has to end
            record.error = "cancelled"
            raise
        except Exception:
            log.exception("a request failed", extra={"request_id": record.id})
            await _send_problem(record, send, internal())

    def _note(self, record: Record) -> None:
        self._service.limiter.let_go(record)
        self._service.limiter.let_go_entries(record)
        path = record.path if record.path in self._paths else "other"
        self._service.metrics.answered(path, record.status)
        quiet = path in ("/health", "/metrics", "/render") and record.status == 200
        log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"record": record})


async def _send_problem(record: Record, send: Send, problem: ApiError) -> None:
    record.error = problem.code
    if record.status == 0:
        await send_json(send, problem.body(), problem.status, problem.headers)


def _routing_problem(error: HTTPException, scope: Scope) -> ApiError:
    """Return the 404 or 405 of a path or method that is not served."""
    where = f"{scope['method']} {scope['path'][:80]!r}"
    if error.status_code == 405:
        return ApiError(405, f"{where} is not allowed", code="method_not_allowed", headers=dict(error.headers or {}))
    return ApiError(error.status_code, f"{where} is not served here. {instead(scope['path'])}", code="not_found")
