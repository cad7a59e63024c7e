"""The application: which paths there are."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

import cluster
from cluster.api.body import check_body
from cluster.api.body_limit import BodyLimit
from cluster.api.chat import ChatCompletionRequest, ChatCompletions
from cluster.api.completions import CompletionRequest, Completions
from cluster.api.console.routes import console_routes
from cluster.api.errors import add_error_handlers, error_response
from cluster.api.fields import GenerationFields
from cluster.api.keyed_route import keyed_route
from cluster.api.streaming import EventStream, unless_disconnected
from cluster.api.tokens import DetokenizeRequest, TokenizeRequest, detokenize, tokenize
from cluster.chat.fields import REFUSALS, Fields
from cluster.errors import ReplicaLostError
from cluster.rpc.router import RouterServer

_MB = 1 << 20
_BODIES: dict[str, type[Fields]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


def create_app(router: RouterServer, *, max_body_bytes: int = 4 * _MB) -> FastAPI:
    """The HTTP API of a router; to be served in the router's event loop.

    API keys are those of the router; probes need none.

    Args:
        max_body_bytes: larger bodies are refused unread.
    """
    # No pages of FastAPI's: they load scripts from elsewhere, onto the origin that takes API keys.
    app = FastAPI(
        title="dspark-cluster", version=cluster.__version__, docs_url=None, redoc_url=None
    )
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    add_error_handlers(
        app, REFUSALS, {path: body.model_fields.keys() for path, body in _BODIES.items()}
    )
    app.include_router(_probes(router))

    keyed = keyed_route(router.authenticator)
    checked = [Depends(check_body)]
    app.include_router(_openai(router, keyed), dependencies=checked)
    app.include_router(_tokens(router, keyed), dependencies=checked)
    app.include_router(_metrics(router, keyed), dependencies=checked)
    app.include_router(console_routes(router, keyed))
    return app


def _openai(router: RouterServer, keyed: type[APIRoute]) -> APIRouter:
    paths = APIRouter(prefix="/v1", route_class=keyed)
    model = {
        "id": router.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "dspark-cluster",
        "root": router.model_name,
        "parent": None,
    }

    @paths.get("/models")
    async def list_models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [{**model, "max_model_len": router.max_model_len}]}

    @paths.get("/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        """The model of that name."""
        router.check_model(name)
        return {**model, "max_model_len": router.max_model_len}

    @paths.post("/completions")
    async def complete(fields: CompletionRequest, request: Request) -> Response:
        """Goes on with prompts."""
        work = await Completions.of(router, fields, request.state.api_key)
        return await _answer(router, work, request, fields)

    @paths.post("/chat/completions")
    async def complete_chat(fields: ChatCompletionRequest, request: Request) -> Response:
        """Answers a conversation."""
        work = await ChatCompletions.of(router, fields, request.state.api_key)
        return await _answer(router, work, request, fields)

    return paths


def _tokens(router: RouterServer, keyed: type[APIRoute]) -> APIRouter:
    async def count(request: Request) -> None:
        router.key_limits.count(request.state.api_key)

    paths = APIRouter(route_class=keyed, dependencies=[Depends(count)])

    @paths.post("/tokenize")
    async def tokenize_prompt(fields: TokenizeRequest) -> dict[str, Any]:
        """The token ids of a prompt, or of a conversation."""
        return await tokenize(router, fields)

    @paths.post("/detokenize")
    async def detokenize_tokens(fields: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids."""
        return detokenize(router, fields)

    return paths


def _metrics(router: RouterServer, keyed: type[APIRoute]) -> APIRouter:
    paths = APIRouter(route_class=keyed)

    @paths.get("/metrics")
    async def metrics() -> Response:
        """What the router that answers exports to Prometheus."""
        # Of many replicas it is long, and streams must not wait for it.
        text = await asyncio.to_thread(router.metrics.text)
        return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return paths


def _probes(router: RouterServer) -> APIRouter:
    paths = APIRouter()

    @paths.get("/health")
    async def health() -> Response:
        """The router lives."""
        return Response()

    @paths.get("/ready")
    async def ready() -> Response:
        """Requests should come here: a target replica has been ready; 503 otherwise."""
        if router.is_ready:
            return JSONResponse({"status": "ready"})
        return error_response(ReplicaLostError("no target replica has been ready yet"))

    @paths.get("/version")
    async def version() -> dict[str, str]:
        """Of this software."""
        return {"version": cluster.__version__}

    return paths


async def _answer(
    router: RouterServer,
    work: Completions | ChatCompletions,
    request: Request,
    fields: GenerationFields,
) -> Response:
    """Runs the work, and ends it when its client leaves."""
    if not fields.stream:
        return JSONResponse(await unless_disconnected(request, work.complete()))
    events = work.events()
    try:
        first = await unless_disconnected(request, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events, router.slow_reader_timeout_s, pads=fields.pads_events)
