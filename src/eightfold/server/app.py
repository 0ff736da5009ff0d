"""The application: which path is answered by whom."""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from eightfold.server.chat import ChatCompletions
from eightfold.server.completions import Completions
from eightfold.server.endpoints import Endpoints
from eightfold.server.gateway import Gateway
from eightfold.server.page import Page
from eightfold.server.service import Service


def create_app(service: Service) -> ASGIApp:
    """Return the ASGI application of a service."""
    small = Endpoints(service)
    routes = [
        Route("/", Page(), methods=["GET"]),
        Route("/v1/chat/completions", ChatCompletions(service), methods=["POST"]),
        Route("/v1/completions", Completions(service), methods=["POST"]),
        Route("/v1/models", small.models, methods=["GET"]),
        Route("/v1/models/{name:path}", small.model, methods=["GET"]),
        Route("/tokenize", small.tokenize, methods=["POST"]),
        Route("/detokenize", small.detokenize, methods=["POST"]),
        Route("/health", small.health, methods=["GET"]),
        Route("/metrics", small.metrics, methods=["GET"]),
        Route("/version", small.version, methods=["GET"]),
    ]
    app: ASGIApp = Gateway(Router(routes, redirect_slashes=False), service, (route.path for route in routes))
    origins = service.settings.cors_origins
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id", "Retry-After"],
    )
