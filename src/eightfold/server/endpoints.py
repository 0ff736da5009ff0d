"""What answers each path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from eightfold import __version__
from eightfold.server.chat import read_conversation
from eightfold.server.fields import STRING, Fields, bad_request, wrong
from eightfold.server.generation import Asked, answer_stream, answer_whole
from eightfold.server.logs import Record
from eightfold.server.metrics import CONTENT_TYPE
from eightfold.server.service import Service
from eightfold.server.tools import read_tools
from eightfold.values import SWITCH, Kind

_TOKEN = Kind((int,), "a token id", least=0, most=2**31 - 1, outside="a token id")


class Generating:
    """Answers prompts, as the fields of a request ask for it."""

    def __init__(self, service: Service, read: Callable[[Fields, Service], Asked]) -> None:
        self._service, self._read = service, read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request, service = Request(scope, receive), self._service
        record: Record = request.state.record
        fields = await service.read(request)
        asked = self._read(fields, service)
        record.ignored = fields.ignored
        with service.limiter.admitted(asked.params.n * asked.prompts):
            prompts, texts = await service.in_thread(record, lambda: asked.encode(service.tokenizer))
            service.require_fit(prompts)
            respond = answer_stream if asked.streams else answer_whole
            with service.in_flight(asked, prompts, record) as running:
                await respond(running, asked.answer(texts), receive, send)


class Endpoints:
    """Models, tokens, health, metrics and version."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self, request: Request) -> Response:
        """Return what is served, under all its names."""
        names = self._service.settings.model_names
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """Return one of them."""
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
        """Return the token ids of a text or of a chat."""
        service, record = self._service, request.state.record
        fields = await service.read(request)
        text, with_texts = fields.read("prompt", STRING), fields.read("return_token_strs", SWITCH, False)
        tokenizer = service.tokenizer
        if text is not None:
            special = fields.read("add_special_tokens", SWITCH, True)
            ids = await service.in_thread(record, lambda: tokenizer.encode(text, special_tokens=special))
        elif fields.any("messages") is not None:
            tools = read_tools(fields, service.template or "")
            encode = read_conversation(fields, service.template, tools.shown)
            ids = await service.in_thread(record, lambda: encode(tokenizer))
        else:
            raise bad_request("prompt: expected a text, or messages", param="prompt")
        content = {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids}
        if with_texts:
            content["token_strs"] = [service.texts.of(token) for token in ids]
        return JSONResponse(content)

    async def detokenize(self, request: Request) -> Response:
        """Return the text of token ids."""
        service = self._service
        fields = await service.read(request)
        if fields.any("tokens") is None:
            raise bad_request("tokens: expected a list of token ids", param="tokens")
        ids, keep = fields.items("tokens", 2**18), not fields.read("skip_special_tokens", SWITCH, False)
        for at, token in enumerate(ids):
            if not _TOKEN.fits(token):
                raise wrong(f"tokens[{at}]", token, _TOKEN.name)
        text = await service.in_thread(request.state.record, lambda: service.tokenizer.decode(ids, keep_special=keep))
        return JSONResponse({"prompt": text})

    async def health(self, request: Request) -> Response:
        """Say whether requests are answered."""
        if self._service.limiter.is_draining:
            return JSONResponse({"status": "stopping"}, 503)
        if not self._service.engine.is_healthy:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Return counts and times for Prometheus."""
        return Response(self._service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def version(self, request: Request) -> Response:
        """Return this program's version."""
        return JSONResponse({"version": __version__})
