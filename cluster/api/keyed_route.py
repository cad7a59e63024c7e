"""Paths that need an API key."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from cluster.garbage import without_collection
from cluster.security.authenticator import Authenticator
from cluster.tracing import incoming_traceparent


class _JsonRequest(Request):
    """Its body is parsed without the garbage collector, which else looks at all that the process
    holds again and again while millions of values are made: nine tenths of the time."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            with without_collection():
                self._json = json.loads(body)
        return self._json


def keyed_route(authenticator: Authenticator) -> type[APIRoute]:
    """The class of routes that ask for a key, for ``APIRouter(route_class=...)``.

    Guarantees: of a request without a good key no byte of the body is read, which a dependency
    could not say: FastAPI reads and parses the body before it asks any. Whose request it is, is in
    ``request.state.api_key``.
    """

    class KeyedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def with_key(request: Request) -> Response:
                peer = request.client.host if request.client is not None else ""
                header = request.headers.get("authorization")
                request.state.api_key = authenticator.authenticate(header, peer)
                incoming_traceparent.set(request.headers.get("traceparent", ""))
                return await handle(_JsonRequest(request.scope, request.receive))

            return with_key

    return KeyedRoute
