"""The paths of the console: the page and its files, and the state that it shows."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from fastapi.routing import APIRoute

from cluster.rpc.cluster_status import cluster_status_from_proto
from cluster.rpc.router import RouterServer

_PAGE = "console.html"
_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# What the page says where no key is asked for, and what it says where one is.
_OPEN, _WITH_KEY = b'data-api-key="none"', b'data-api-key="needed"'
# Nothing of elsewhere, nothing inline, no text that becomes markup, in nobody's frame.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def console_routes(router: RouterServer, keyed: type[APIRoute]) -> APIRouter:
    """The page at ``/console``, which tells nothing, and ``/console/state``, which needs a key.

    Args:
        keyed: the class of routes that ask for a key.
    """
    paths, with_key = APIRouter(), APIRouter(route_class=keyed)
    files = _read_files()
    if not router.authenticator.is_open:
        files[_PAGE] = files[_PAGE].replace(_OPEN, _WITH_KEY)
    tags = {name: f'"{hashlib.sha256(data).hexdigest()[:16]}"' for name, data in files.items()}

    def answer(name: str, request: Request) -> Response:
        headers = {**_HEADERS, "ETag": tags[name]}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        media_type = _MEDIA_TYPES[name.rpartition(".")[2]]
        return Response(files[name], headers=headers, media_type=media_type)

    @paths.get("/console", include_in_schema=False)
    async def page(request: Request) -> Response:
        return answer(_PAGE, request)

    @paths.get("/console/", include_in_schema=False)
    async def page_with_slash() -> Response:
        # The page names its files as seen from /console, wherever that is mounted.
        return RedirectResponse("../console")

    @with_key.get("/console/state")
    async def state() -> dict[str, Any]:
        """Routers, replicas, shards and drafters, load, and how each replica speculates.

        The fields of ``dspark status --json``, and ``has_chat_template``.
        """
        status = cluster_status_from_proto(router.status())
        can_chat = router.chat_template.is_there
        return {**dataclasses.asdict(status), "has_chat_template": can_chat}

    paths.include_router(with_key)
    for file_name in files.keys() - {_PAGE}:
        _add_file(paths, file_name, answer)
    return paths


def _add_file(paths: APIRouter, name: str, answer: Callable[[str, Request], Response]) -> None:
    @paths.get(f"/console/{name}", include_in_schema=False)
    async def file(request: Request) -> Response:
        return answer(name, request)


def _read_files() -> dict[str, bytes]:
    """The console's files by name."""
    return {
        entry.name: entry.read_bytes()
        for entry in resources.files(__package__).iterdir()
        if entry.name.rpartition(".")[2] in _MEDIA_TYPES
    }
