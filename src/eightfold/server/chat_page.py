"""The chat page: put together from its parts, under a policy that lets nothing else run, and what renders for it."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

from eightfold.server.answers import to_json
from eightfold.server.fields import Fields, bad_request, demand
from eightfold.server.service import Service
from eightfold.values import STRING

MAX_CHARS = 2**17  # of the texts of one request; the slowest that are known take 4 s

_SCRIPTS = ("storage.js", "rendering.js", "server.js", "turns.js", "answers.js", "page.js")


class ChatPage:
    """Answers with the page and renders for it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        html = _put_together()
        self._html = html.encode()
        self._headers = {
            "content-type": "text/html; charset=utf-8",
            "content-security-policy": policy(html),
            "cache-control": "no-cache",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }

    async def show(self, request: Request) -> Response:
        return Response(self._html, headers=self._headers)

    async def render(self, request: Request) -> Response:
        """Answer {"texts": [...]} with {"rendered": [...]}, for each text its blocks."""
        texts = _texts(await self._service.read(request))
        body = await self._service.in_thread(request.state.record, lambda: _rendered(texts))
        return Response(body, media_type="application/json")


def _texts(fields: Fields) -> list[str]:
    texts = [demand(f"texts[{at}]", text, STRING) for at, text in enumerate(fields.items("texts", 4096))]
    size = sum(map(len, texts))
    if size > MAX_CHARS:
        raise bad_request(f"texts: got {size} characters, expected at most {MAX_CHARS}", param="texts")
    return texts


def _rendered(texts: list[str]) -> bytes:
    from eightfold.server.markdown import blocks_of  # the server starts without it

    return to_json({"rendered": [blocks_of(text) for text in texts]})


def _put_together() -> str:
    """Return the page with its style and scripts inside."""
    folder = resources.files("eightfold.server").joinpath("page")
    style, *scripts = (folder.joinpath(name).read_text("utf-8") for name in ("page.css", *_SCRIPTS))
    html = folder.joinpath("page.html").read_text("utf-8")
    html = html.replace("<style></style>", f"<style>\n{style}</style>")
    return html.replace("<script></script>", '<script>\n"use strict";\n' + "\n".join(scripts) + "</script>")


def policy(html: str) -> str:
    """Return a content security policy that lets exactly this page's own script and style run."""
    allowed = {
        "default-src": "'none'",
        "script-src": _hash(html, "script"),
        "style-src": _hash(html, "style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in allowed.items())


def _hash(html: str, tag: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
