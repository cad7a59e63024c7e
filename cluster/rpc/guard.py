"""Checks in front of every call of a server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from cluster.errors import DsparkError, PermissionDeniedError
from cluster.rpc.status import abort
from cluster.rpc.tls import HandshakeCount, ServerTls
from cluster.security.api_keys import ApiKey
from cluster.security.authenticator import ANYBODY, Authenticator
from cluster.security.refusals import Refusal

# Probes and tools ask these before they know a key. They tell nothing of anybody's requests.
_OPEN_SERVICES = ("/grpc.health.", "/grpc.reflection.")

_caller: ContextVar[ApiKey] = ContextVar("caller", default=ANYBODY)

Check = Callable[[Any], None]


class Guard(aio.ServerInterceptor):
    """Lets a call through when every check has.

    Guarantees: a method that is added to the service is guarded as well; a refused call never
    reaches it. Nothing of a call is decoded before its checks, and what cannot be decoded is
    refused as any other bad input. Health and reflection are open.

    Args:
        checks: each takes the call's context and raises a ``DsparkError`` to refuse it.
        handshakes: told of every call.
    """

    def __init__(self, *checks: Check, handshakes: HandshakeCount | None = None) -> None:
        self._checks = checks
        self._handshakes = handshakes

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Of gRPC: which handler serves a call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        is_open = handler_call_details.method.startswith(_OPEN_SERVICES)
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            behaviour = getattr(handler, kind)
            if behaviour is not None and asyncio.iscoroutinefunction(behaviour):
                decode = None if handler.request_streaming else handler.request_deserializer
                changes: dict[str, Any] = {kind: self._guarded(behaviour, is_open, decode)}
                if decode is not None:  # else a stranger's bytes would be decoded unasked
                    changes["request_deserializer"] = None
                return handler._replace(**changes)
        if not is_open:
            raise TypeError(f"{handler_call_details.method} cannot be guarded: no coroutine")
        return handler

    def _guarded(
        self,
        behaviour: Callable[[Any, Any], Awaitable[Any]],
        is_open: bool,
        decode: Callable[[bytes], Any] | None,
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def call(request: Any, context: aio.ServicerContext) -> Any:
            if self._handshakes is not None:
                self._handshakes.called_from(context.peer())
            try:
                for check in () if is_open else self._checks:
                    check(context)
                if decode is not None:
                    request = decode(request)
            except (DsparkError, DecodeError) as error:
                await abort(context, error)
            return await behaviour(request, context)

        return call


def caller() -> ApiKey:
    """The API key of the call that the running task serves."""
    return _caller.get()


def key_check(authenticator: Authenticator) -> Check:
    """Asks for an API key; behind it ``caller`` says which one it is."""

    def check(context: aio.ServicerContext) -> None:
        header = dict(context.invocation_metadata() or ()).get("authorization")
        if isinstance(header, bytes):
            header = header.decode("latin-1")
        _caller.set(authenticator.authenticate(header, context.peer()))

    return check


def peer_check(tls: ServerTls) -> Check:
    """Asks for a certificate with the cluster's own name, whoever else its authority has signed."""

    def check(context: aio.ServicerContext) -> None:
        names = context.auth_context().get("x509_subject_alternative_name", ())
        if tls.peer_name is not None and tls.peer_name.encode() not in names:
            tls.refusals.count(Refusal.WRONG_PEER, context.peer())
            raise PermissionDeniedError("this port is for the cluster's own parts")

    return check


def internal_guard(tls: ServerTls | None) -> list[aio.ServerInterceptor]:
    """In front of the cluster's own services; none without TLS."""
    return [] if tls is None else [Guard(peer_check(tls), handshakes=tls.handshakes)]
