"""The HTTP API's surface in this process: the application itself, called without sockets.

The router behind it is the real one up to the point where a request would go to a replica.
"""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

from cluster.api.app import create_app
from cluster.bench.fuzz_bodies import HTTP_BODIES
from cluster.bench.fuzz_json import mutate_json, splice_json, words_of
from cluster.bench.fuzz_router import OfflineRouter, make_router
from cluster.bench.fuzz_surfaces import ACCEPTED, UNDECODABLE, Loaded

PATHS = tuple(HTTP_BODIES)
# Seeds, and what is fuzzed: a byte that says which path, and a body.
SEEDS = tuple(
    bytes([index]) + json.dumps(body).encode()
    for index, path in enumerate(PATHS)
    for body in HTTP_BODIES[path]
)
_WORDS = ("[a-z]+", "NaN", "1e999", "-1", "2147483648", "\\ud800", "[[[[", "}}", "null", "true")


def load() -> Loaded:
    """The surface; its application belongs to this thread."""
    events = asyncio.new_event_loop()
    app = create_app(make_router(OfflineRouter))

    def check(data: bytes) -> str:
        path = PATHS[data[0] % len(PATHS)] if data else PATHS[0]
        status, answer = events.run_until_complete(post(app, path, data[1:]))
        return http_outcome(status, answer)

    words = [word.encode() for word in _WORDS]
    bodies = [body for bodies in HTTP_BODIES.values() for body in bodies]
    return Loaded(check, list(SEEDS), mutate, splice=_splice, words=words_of(bodies) + words)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The body changed, and seldom sent to another path."""
    path = data[:1] if rng.random() < 0.95 else bytes([rng.randrange(len(PATHS))])
    return path + mutate_json(data[1:], rng)


def http_outcome(status: int, answer: bytes) -> str:
    """What became of a body: ``ACCEPTED``, ``UNDECODABLE``, or status and type of the error.

    Raises:
        AssertionError: the answer is not what a client can read, or is an error of the server's;
            or it says of an object that is refused with 400 not which field is wrong.
    """
    if status == 200:
        _check_events(answer)
        return ACCEPTED
    error = json.loads(answer)["error"]
    assert error["message"], answer
    assert error["type"], answer
    # 504: the body has asked for a deadline, and it has passed.
    assert status < 500 or (status == 504 and error["type"] == "timeout_error"), answer
    if status == 400 and error["message"].startswith("the body"):
        return UNDECODABLE
    assert status != 400 or error["param"], answer
    return f"{status} {error['type']}"


def _check_events(answer: bytes) -> None:
    """Of a stream, which says 200 before it has failed."""
    if not answer.startswith(b"data: "):
        assert isinstance(json.loads(answer), dict), answer
        return
    *events, last, rest = answer.split(b"\n\n")
    assert (last, rest) == (b"data: [DONE]", b""), answer[-200:]
    for event in events:
        error = json.loads(event.removeprefix(b"data: ")).get("error")
        assert error is None or error["type"] != "server_error", event


def _splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[:1] + splice_json(data[1:], other[1:], rng)


async def post(app: Any, path: str, body: bytes) -> tuple[int, bytes]:
    """Sends a body to an application; returns the status and the whole answer.

    Raises:
        Exception: the application's, which should never raise any.
    """
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    statuses: list[int] = []
    parts: list[bytes] = []
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])
        else:
            parts.append(message["body"])

    await app(scope, receive, send)
    return statuses[0], b"".join(parts)
