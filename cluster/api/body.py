"""What a body must be before its fields are looked at: JSON, an object, and text throughout."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

from cluster.chat.text import check_text
from cluster.errors import InvalidRequestError

# How a lone half of a surrogate pair can get into what was parsed: escaped, raw, or as UTF-16.
_MAY_HOLD_SURROGATES = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\x00")

# Far more than any body has; of an unknown one each would be told.
_MAX_NAMES = 256


async def check_body(request: Request) -> None:
    """A dependency of every path, which refuses what no field could be read from.

    Raises:
        HTTPException: 415, the body is not said to be JSON.
        InvalidRequestError: it is no object, or a string of it, a name included, is not text: JSON
            can write lone surrogates (``"\\ud800"``), and UTF-8 cannot.
    """
    if request.method != "POST":
        return
    data = await request.body()
    if not data:
        raise InvalidRequestError("", "the body is empty; it must be a JSON object")
    _check_content_type(request.headers.get("content-type", ""))
    body = await request.json()  # what was parsed already
    if not isinstance(body, dict):
        raise InvalidRequestError("", "the body is JSON, but not a JSON object")
    if len(body) > _MAX_NAMES:
        raise InvalidRequestError("", f"the body has {len(body)} fields; there are not so many")
    if _MAY_HOLD_SURROGATES.search(data):
        # Beside the event loop: of millions of values it takes seconds.
        await asyncio.to_thread(_check_texts, body)


def _check_texts(body: dict[str, Any]) -> None:
    for name, value in body.items():
        check_text(name, name.encode(errors="backslashreplace").decode())
        check_text(value, name or "''")


def _check_content_type(given: str) -> None:
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not re.fullmatch(r"application/[^/]+\+json", kind):
        told = f"'{kind}'" if kind else "not there"
        raise HTTPException(415, f"the header Content-Type must be application/json, it is {told}")
