"""Errors as gRPC statuses, and back.

Every status carries ``google.rpc.ErrorInfo`` (a reason, this domain, and the field's name where a
field is wrong), and a full queue carries ``google.rpc.RetryInfo``:

======================  ====================  ==================
error                   code                  reason
======================  ====================  ==================
InvalidRequestError     INVALID_ARGUMENT      INVALID_REQUEST
ModelNotFoundError      NOT_FOUND             MODEL_NOT_FOUND
QueueFullError          RESOURCE_EXHAUSTED    QUEUE_FULL
UnauthenticatedError    UNAUTHENTICATED       UNAUTHENTICATED
PermissionDeniedError   PERMISSION_DENIED     PERMISSION_DENIED
ReplicaLostError        UNAVAILABLE           REPLICA_LOST
RouterStoppingError     UNAVAILABLE           ROUTER_STOPPING
DeadlineExceededError   DEADLINE_EXCEEDED     DEADLINE_EXCEEDED
RequestCancelledError   CANCELLED             CANCELLED
any other               INTERNAL              INTERNAL
======================  ====================  ==================

The message of an error that is not a DsparkError stays on the server: it might quote the prompt.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import NamedTuple

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from cluster.errors import (
    DeadlineExceededError,
    DsparkError,
    InvalidRequestError,
    ModelNotFoundError,
    PermissionDeniedError,
    QueueFullError,
    ReplicaLostError,
    RequestCancelledError,
    RouterStoppingError,
    UnauthenticatedError,
)
from cluster.v1 import replica_pb2

logger = logging.getLogger(__name__)

DOMAIN = "dspark-cluster"


class _Kind(NamedTuple):
    error: type[DsparkError]
    code: grpc.StatusCode
    reason: str
    rebuild: Callable[[str, str, float], DsparkError]  # from message, field, retry_after_s


_KINDS = (
    _Kind(  # before the class that it is one of
        ModelNotFoundError,
        grpc.StatusCode.NOT_FOUND,
        "MODEL_NOT_FOUND",
        lambda message, field, _: ModelNotFoundError(field, message.removeprefix(f"{field}: ")),
    ),
    _Kind(
        InvalidRequestError,
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        lambda message, field, _: InvalidRequestError(field, message.removeprefix(f"{field}: ")),
    ),
    _Kind(
        QueueFullError,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "QUEUE_FULL",
        lambda message, _, retry_after_s: QueueFullError(message, retry_after_s),
    ),
    _Kind(
        UnauthenticatedError,
        grpc.StatusCode.UNAUTHENTICATED,
        "UNAUTHENTICATED",
        lambda message, _, __: UnauthenticatedError(message),
    ),
    _Kind(
        PermissionDeniedError,
        grpc.StatusCode.PERMISSION_DENIED,
        "PERMISSION_DENIED",
        lambda message, _, __: PermissionDeniedError(message),
    ),
    _Kind(  # before the class that it is one of
        RouterStoppingError,
        grpc.StatusCode.UNAVAILABLE,
        "ROUTER_STOPPING",
        lambda message, _, __: RouterStoppingError(message),
    ),
    _Kind(
        ReplicaLostError,
        grpc.StatusCode.UNAVAILABLE,
        "REPLICA_LOST",
        lambda message, _, __: ReplicaLostError(message),
    ),
    _Kind(
        DeadlineExceededError,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "DEADLINE_EXCEEDED",
        lambda message, _, __: DeadlineExceededError(message),
    ),
    _Kind(
        RequestCancelledError,
        grpc.StatusCode.CANCELLED,
        "CANCELLED",
        lambda message, _, __: RequestCancelledError(message),
    ),
)
_INTERNAL = _Kind(
    DsparkError, grpc.StatusCode.INTERNAL, "INTERNAL", lambda message, _, __: DsparkError(message)
)
# What gRPC itself ends a call with, without our details.
_BY_CODE = {
    kind.code: kind
    for kind in _KINDS
    if kind.error in (ReplicaLostError, DeadlineExceededError, RequestCancelledError)
}


# gRPC ends a call without our details where they do not fit the 8 KiB of a peer's headers, in which
# a byte of a message may take three.
_MAX_MESSAGE_BYTES = 1000


def to_status(error: Exception) -> status_pb2.Status:
    """The status that ends a client's call."""
    if isinstance(error, DecodeError):  # protobuf's, of a stream's message
        error = InvalidRequestError("message", "cannot be decoded")
    kind = _kind_of(error)
    info = error_details_pb2.ErrorInfo(reason=kind.reason, domain=DOMAIN)
    if isinstance(error, InvalidRequestError):
        info.metadata["field"] = _cut(error.field)
    status = status_pb2.Status(code=kind.code.value[0], message=_cut(client_message(error)))
    status.details.append(_packed(info))
    if isinstance(error, QueueFullError):
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status


def _cut(text: str) -> str:
    """The beginning of what may quote a client at length."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= _MAX_MESSAGE_BYTES:
        return text
    return encoded[:_MAX_MESSAGE_BYTES].decode(errors="ignore") + "…"


async def abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    """Ends the call with the status of ``error``; does not return."""
    await context.abort_with_status(rpc_status.to_status(to_status(error)))


def from_rpc_error(error: grpc.RpcError) -> DsparkError:
    """The exception behind a failed call, of ``grpc`` or of ``grpc.aio``.

    Without our details (gRPC ended the call itself) it goes by the code: UNAVAILABLE is a
    ReplicaLostError, what has no class of its own a plain DsparkError.
    """
    code, message = error.code(), error.details() or ""
    info, retry_after_s = _details(error)
    if info is None:
        kind = _BY_CODE.get(code)
        if kind is None:
            return DsparkError(f"{code.name}: {message}")
        if kind.error is DeadlineExceededError:  # of which gRPC tells how its stream ended
            message = "the request's deadline passed"
        return kind.rebuild(message, "", 0.0)
    kind = next((kind for kind in _KINDS if kind.reason == info.reason), _INTERNAL)
    return kind.rebuild(message, info.metadata.get("field", ""), retry_after_s)


def has_details(error: grpc.RpcError) -> bool:
    """Whether the call was ended by a part of the cluster, not by gRPC."""
    return _details(error)[0] is not None


def to_request_error(error: Exception) -> replica_pb2.ConnectResponse.RequestError:
    """The same inside a replica's stream, where one request's error must not end the stream."""
    kind = _kind_of(error)
    message = replica_pb2.ConnectResponse.RequestError(
        code=kind.code.value[0], message=client_message(error)
    )
    if isinstance(error, InvalidRequestError):
        message.field = error.field
    if isinstance(error, QueueFullError):
        message.retry_after_seconds = error.retry_after_s
    return message


def from_request_error(message: replica_pb2.ConnectResponse.RequestError) -> DsparkError:
    """The exception that ``to_request_error`` was given."""
    kinds = (kind for kind in _KINDS if kind.error is not RouterStoppingError)  # a replica is none
    kind = next((kind for kind in kinds if kind.code.value[0] == message.code), _INTERNAL)
    return kind.rebuild(message.message, message.field, message.retry_after_seconds)


def _kind_of(error: Exception) -> _Kind:
    return next((kind for kind in _KINDS if isinstance(error, kind.error)), _INTERNAL)


def client_message(error: Exception) -> str:
    """What a client is told; of an error that is not ours, which the log gets, its class alone."""
    if isinstance(error, DsparkError):
        return str(error)
    # Where it happened, but not what it says.
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request failed with %s\n%s", type(error).__name__, frames)
    return f"internal error ({type(error).__name__})"


def _packed(detail: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed


def _details(error: grpc.RpcError) -> tuple[error_details_pb2.ErrorInfo | None, float]:
    """Our ErrorInfo, or None, and RetryInfo's delay in seconds, or 0."""
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # details that contradict the status are none
        return None, 0.0
    found = None
    retry_after_s = 0.0
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            found = info
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return found, retry_after_s
