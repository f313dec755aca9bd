"""The ASGI application: routes and what surrounds them."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mlakit.serving.http.endpoints import Service
from mlakit.serving.http.entrance import Entrance
from mlakit.serving.http.refusal import KINDS, Refusal


def application(
    service: Service, *, api_key: str | None = None, cors_origins: Sequence[str] = ()
) -> Starlette:
    """The server of one model.

    Args:
        service: that answers.
        api_key: that ``/v1`` asks for; without it anybody may use the model.
        cors_origins: sites whose pages may use it from a browser; ``*`` for all.
    """
    routes = [
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{id:path}", service.model),
        Route("/health", service.health),
        Route("/metrics", service.figures),
        Route("/openapi.json", service.openapi),
        Route("/", service.home),
    ]
    around = [
        Middleware(
            Entrance,
            metrics=service.metrics,
            routes=frozenset(route.path.replace("{id:path}", "{id}") for route in routes),
            api_key=api_key,
        )
    ]
    if cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
        around.insert(0, cors)
    return Starlette(
        routes=routes,
        middleware=around,
        exception_handlers={Refusal: _refused, HTTPException: _no_such_route},
    )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    request.state.record.reason = error.message
    return error.response()


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code if error.status_code in KINDS else 400
    response = Refusal(status, f"{request.method} {request.url.path}: {error.detail}").response()
    response.headers.update(error.headers or {})
    return response
