"""Checks in front of every call of a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from cluster.errors import DsparkError, InvalidRequestError, PermissionDeniedError
from cluster.rpc.inbox import Inbox
from cluster.rpc.status import abort
from cluster.rpc.tls import HandshakeCount, ServerTls
from cluster.security.api_keys import ApiKey
from cluster.security.authenticator import ANYBODY, Authenticator
from cluster.security.refusals import Refusal, Refusals

# Probes and tools ask these before they know a key. They tell nothing of anybody's requests.
_OPEN_SERVICES = ("/grpc.health.", "/grpc.reflection.")

_caller: ContextVar[ApiKey] = ContextVar("caller", default=ANYBODY)

Check = Callable[[Any], None]
_Generator = Callable[[Any, Any], AsyncGenerator[Any, None]]


class Guard(aio.ServerInterceptor):
    """Lets a call through when every check has.

    Guarantees: a method that is added to the service is guarded as well; a refused call never
    reaches it, and no message of it is received, beyond the 64 KiB that HTTP/2 lets a client send
    unasked. What cannot be decoded is refused as any other bad input. Health and reflection are
    open; what is received for them is bounded by itself.

    Args:
        checks: each takes the call's context and raises a ``DsparkError`` to refuse it.
        handshakes: told of every call.
        refusals: counted into.
    """

    def __init__(
        self,
        *checks: Check,
        handshakes: HandshakeCount | None = None,
        refusals: Refusals | None = None,
    ) -> None:
        self._checks = checks
        self._handshakes = handshakes
        self._inbox = Inbox(64, patience_s=5.0, refusals=refusals)
        self._open_inbox = Inbox(16, patience_s=0.0, refusals=refusals)

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Of gRPC: which handler serves a call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        is_open = method.startswith(_OPEN_SERVICES)
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            behaviour = getattr(handler, kind)
            if behaviour is None:
                continue
            if asyncio.iscoroutinefunction(behaviour):
                if handler.request_streaming:
                    return handler._replace(**{kind: self._checked(behaviour, is_open)})
                # As a stream's handler, since gRPC receives the one message of the others first.
                make = (
                    grpc.stream_stream_rpc_method_handler
                    if handler.response_streaming
                    else grpc.stream_unary_rpc_method_handler
                )
                receives = self._receiving(behaviour, is_open, handler.request_deserializer)
                return make(receives, None, handler.response_serializer)
            if is_open and kind == "stream_stream":
                return handler._replace(stream_stream=self._bounded(behaviour))
        raise TypeError(f"{method} cannot be guarded: no coroutine")

    def _check(self, context: aio.ServicerContext, is_open: bool) -> None:
        if self._handshakes is not None:
            self._handshakes.called_from(context.peer())
        for check in () if is_open else self._checks:
            check(context)

    def _checked(
        self, behaviour: Callable[[Any, Any], Awaitable[Any]], is_open: bool
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def call(requests: Any, context: aio.ServicerContext) -> Any:
            try:
                self._check(context, is_open)
            except DsparkError as error:
                await abort(context, error)
            return await behaviour(requests, context)

        return call

    def _receiving(
        self,
        behaviour: Callable[[Any, Any], Awaitable[Any]],
        is_open: bool,
        decode: Callable[[bytes], Any] | None,
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        inbox = self._open_inbox if is_open else self._inbox

        async def call(_: Any, context: aio.ServicerContext) -> Any:
            request: Any = None
            try:
                self._check(context, is_open)
                request = await inbox.receive(context)
                if request is None:
                    raise InvalidRequestError("message", "the call has none")
                if decode is not None:
                    request = decode(request)
            except (DsparkError, DecodeError) as error:
                await abort(context, error)
            return await behaviour(request, context)

        return call

    def _bounded(self, behaviour: _Generator) -> _Generator:
        async def messages(context: aio.ServicerContext) -> AsyncGenerator[Any, None]:
            while (message := await self._open_inbox.receive(context)) is not None:
                yield message

        async def call(_: Any, context: aio.ServicerContext) -> AsyncGenerator[Any, None]:
            try:
                async with aclosing(behaviour(messages(context), context)) as responses:
                    async for response in responses:
                        yield response
            except DsparkError as error:
                await abort(context, error)

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
