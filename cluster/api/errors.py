"""Errors as OpenAI's clients expect them: a status, and a JSON object that names the field.

======================  ======  ==========================
error                   status  type
======================  ======  ==========================
InvalidRequestError     400     invalid_request_error
UnauthenticatedError    401     authentication_error
PermissionDeniedError   403     permission_error
ModelNotFoundError      404     invalid_request_error
ContextLengthError      400     invalid_request_error
RequestTooLargeError    413     invalid_request_error
RequestCancelledError   499     cancelled_error
QueueFullError          429     rate_limit_error
ReplicaLostError        503     unavailable_error
DeadlineExceededError   504     timeout_error
any other               500     server_error
======================  ======  ==========================

A full queue carries ``Retry-After``. The message of an error that is not a DsparkError stays on the
server: it might quote the prompt.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cluster.errors import (
    ContextLengthError,
    DeadlineExceededError,
    DsparkError,
    InvalidRequestError,
    ModelNotFoundError,
    PermissionDeniedError,
    QueueFullError,
    ReplicaLostError,
    RequestCancelledError,
    UnauthenticatedError,
)
from cluster.rpc.status import client_message


class RequestTooLargeError(DsparkError):
    """The request's body is larger than what is read."""


class _Kind(NamedTuple):
    error: type[Exception]
    status: int
    type: str
    code: str | None


_KINDS = (
    _Kind(ModelNotFoundError, 404, "invalid_request_error", "model_not_found"),
    _Kind(ContextLengthError, 400, "invalid_request_error", "context_length_exceeded"),
    _Kind(InvalidRequestError, 400, "invalid_request_error", None),
    _Kind(UnauthenticatedError, 401, "authentication_error", "invalid_api_key"),
    _Kind(PermissionDeniedError, 403, "permission_error", "permission_denied"),
    _Kind(RequestTooLargeError, 413, "invalid_request_error", "request_too_large"),
    _Kind(RequestCancelledError, 499, "cancelled_error", "cancelled"),
    _Kind(QueueFullError, 429, "rate_limit_error", "queue_full"),
    _Kind(ReplicaLostError, 503, "unavailable_error", "replica_unavailable"),
    _Kind(DeadlineExceededError, 504, "timeout_error", "deadline_exceeded"),
    _Kind(Exception, 500, "server_error", "internal_error"),
)


def error_body(error: Exception) -> dict[str, Any]:
    """``{"error": {...}}`` of an exception."""
    kind = _kind_of(error)
    field = error.field if isinstance(error, InvalidRequestError) else ""
    return _body(client_message(error), kind.type, field or None, kind.code)


def error_response(error: Exception) -> JSONResponse:
    """The answer to a request that failed before it began to answer."""
    headers = {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, UnauthenticatedError):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), _kind_of(error).status, headers)


def add_error_handlers(
    app: FastAPI, refusals: Mapping[str, str], known_fields: Mapping[str, Collection[str]]
) -> None:
    """Has every error of ``app`` answered in OpenAI's form.

    Args:
        refusals: why a field of a body that is known but not served is refused, by its name.
        known_fields: of each path's body, for suggestions.
    """

    async def on_error(_: Request, error: Exception) -> JSONResponse:
        return error_response(error)

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        told = _clearest(error.errors(), error.body)
        refused = _as_invalid_request(told)
        if refused is None:
            name = str(told["loc"][1])
            unknown = _why_unknown(name, request.scope["path"], known_fields)
            refused = InvalidRequestError(name or "''", refusals.get(name, unknown))
        return error_response(refused)

    async def on_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if (unread := _why_unread(error)) is not None:
            return error_response(unread)
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        body = _body(str(error.detail), kind, None, None)
        return JSONResponse(body, error.status_code, error.headers)

    async def on_nesting(_: Request, error: Exception) -> JSONResponse:
        # What is parsed just so cannot always be written again, as a schema within a grammar is.
        return error_response(InvalidRequestError("", "the body's objects are nested too deeply"))

    app.add_exception_handler(DsparkError, on_error)
    app.add_exception_handler(RecursionError, on_nesting)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_error)


def to_client_field(field: str, names: dict[str, str]) -> str:
    """A field of ``cluster.request`` as the client wrote it: by ``names``, or without section."""
    if field in names:
        return names[field]
    section, _, name = field.partition(".")
    return name if section in ("sampling", "speculation") and name else section


def _clearest(errors: Sequence[Mapping[str, Any]], body: Any) -> Mapping[str, Any]:
    """The error to tell of: the deepest one within the field that the first is in.

    Of a value that may be of several kinds pydantic tells what each of them lacks. The kind that
    goes furthest is the one that was meant; those that end at the same place are told together.
    """
    if errors[0]["type"] == "json_invalid":
        return errors[0]
    field = errors[0]["loc"][:2]
    found = [
        {**error, "loc": ("body", *_path(error, body))}
        for error in errors
        if error["loc"][:2] == field
    ]
    deepest = max(found, key=lambda error: len(error["loc"]))
    messages = [error["msg"] for error in found if error["loc"] == deepest["loc"]]
    return {**deepest, "msg": "; or: ".join(dict.fromkeys(messages))}


def _path(error: Mapping[str, Any], body: Any) -> list[Any]:
    """Where in ``body`` the error is: its location without the names of a value's kinds."""
    path: list[Any] = []
    for part in error["loc"][1:]:
        is_item = isinstance(body, list) and isinstance(part, int)
        if is_item or (isinstance(body, dict) and part in body):
            body = body[part]
        elif isinstance(body, dict) and error["type"] == "missing" and part == error["loc"][-1]:
            body = None
        else:
            continue
        path.append(part)
    return path


def _as_invalid_request(error: Mapping[str, Any]) -> InvalidRequestError | None:
    """What pydantic found, by the path of the field in the body; ``None``: an unknown field."""
    location: Sequence[Any] = error["loc"][1:]  # behind "body"
    if error["type"] == "json_invalid":
        why = error["ctx"]["error"]
        return InvalidRequestError("", f"the body is not JSON: {why} at character {location[0]}")
    if not location:
        return InvalidRequestError("", f"the body is not a JSON object: {error['msg']}")
    is_unknown = error["type"] == "extra_forbidden"
    if is_unknown and len(location) == 1:
        return None
    name = str(location[0])
    message = "is not known here" if is_unknown else error["msg"].removeprefix("Value error, ")
    path = ".".join(str(part) for part in location)
    return InvalidRequestError(name, message if path == name else f"{message} (at {path})")


def _why_unread(error: HTTPException) -> InvalidRequestError | None:
    """Of a body that is no JSON in another way than its grammar; FastAPI says nothing of it."""
    match error.__cause__:
        case UnicodeDecodeError():
            return InvalidRequestError("", "the body is not JSON: its bytes are not UTF-8")
        case RecursionError():
            return InvalidRequestError("", "the body is nested too deeply")
        case ValueError():  # the one that Python's int has
            return InvalidRequestError("", "the body is not JSON: a number has too many digits")
    return None


def _why_unknown(name: str, path: str, known: Mapping[str, Collection[str]]) -> str:
    """Of a field of the body of ``path``: where it belongs, or what is nearest to it."""
    here = next((fields for of, fields in known.items() if path.endswith(of)), ())
    found = difflib.get_close_matches(name, here, n=1)
    if others := [of for of, fields in known.items() if name in fields]:
        return f"is not known here: it belongs to {' and '.join(others)}"
    return f"is not known here (did you mean '{found[0]}'?)" if found else "is not known here"


def _kind_of(error: Exception) -> _Kind:
    return next(kind for kind in _KINDS if isinstance(error, kind.error))


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
