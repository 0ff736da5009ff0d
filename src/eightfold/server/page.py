"""The chat page: one file, which may do nothing but talk to this server."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class Page:
    """GET /."""

    def __init__(self) -> None:
        self._html = resources.files("eightfold.server").joinpath("page.html").read_bytes()
        self._headers = {
            "content-type": "text/html; charset=utf-8",
            "content-security-policy": policy(self._html.decode()),
            "cache-control": "no-cache",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the page."""
        await Response(self._html, headers=self._headers)(scope, receive, send)


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
