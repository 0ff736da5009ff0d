"""The small endpoints."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from eightfold import __version__
from eightfold.server.chat import read_conversation
from eightfold.server.fields import Fields, wrong
from eightfold.server.metrics import CONTENT_TYPE
from eightfold.server.problems import bad_request
from eightfold.server.service import Service
from eightfold.server.tools import read_tools


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
        service = self._service
        fields = await service.read(request)
        text, with_texts = fields.text("prompt"), fields.flag("return_token_strs")
        tokenizer = service.tokenizer
        if text is not None:
            special, given = fields.flag("add_special_tokens", True), text
            ids = await service.in_thread(request.state.record, lambda: tokenizer.encode(given, special_tokens=special))
        elif fields.any("messages") is not None:
            tools = read_tools(fields, service.template or "")
            conversation = read_conversation(fields, service.template, tools.shown)
            ids = await service.in_thread(request.state.record, lambda: conversation.encode(tokenizer))
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
        ids, keep = _token_ids(fields), not fields.flag("skip_special_tokens")
        text = await service.in_thread(request.state.record, lambda: service.tokenizer.decode(ids, keep_special=keep))
        return JSONResponse({"prompt": text})

    async def health(self, request: Request) -> Response:
        """Say whether requests are answered."""
        if self._service.admission.is_draining:
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


def _token_ids(fields: Fields) -> list[int]:
    ids = fields.items("tokens", 2**18)
    if ids is None:
        raise bad_request("tokens: expected a list of token ids", param="tokens")
    for at, token in enumerate(ids):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
            raise wrong(f"tokens[{at}]", token, "a token id")
    return ids
