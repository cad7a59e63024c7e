"""``InferenceService``: what clients call over gRPC, in front of a router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from grpc import aio

from cluster.errors import InvalidRequestError, RequestCancelledError
from cluster.rpc.chat import chat, conversation_fields
from cluster.rpc.chat_messages import conversation_from_proto, tools_from_proto
from cluster.rpc.convert import generate_call_from_proto
from cluster.rpc.guard import caller
from cluster.rpc.resumption import ROUTER_HEADER
from cluster.rpc.status import abort
from cluster.security.refusals import Refusal
from cluster.tracing import incoming_traceparent
from cluster.v1 import inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    from cluster.rpc.router import RouterServer

_Chunk = inference_pb2.GenerateResponse | inference_pb2.ChatResponse


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Serves a router's clients; belongs to the router's event loop."""

    def __init__(self, router: RouterServer) -> None:
        self._router = router

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: aio.ServicerContext
    ) -> None:
        """Streams the request's chunks."""
        try:
            call = generate_call_from_proto(request)
            self._router.check_model(call.model)
            _take_place(context)
            headers = ((ROUTER_HEADER, self._router.router_id),)
            stream = self._router.generate(
                call,
                context.time_remaining(),
                caller(),
                on_admitted=lambda: context.send_initial_metadata(headers),
            )
            await self._write_all(context, stream)
        except Exception as error:
            await abort(context, error)

    async def Chat(self, request: inference_pb2.ChatRequest, context: aio.ServicerContext) -> None:
        """Streams a conversation's answers."""
        try:
            _take_place(context)
            stream = chat(self._router, request, context.time_remaining(), caller())
            await self._write_all(context, stream)
        except Exception as error:
            await abort(context, error)

    async def GetStatus(
        self, request: inference_pb2.GetStatusRequest, context: aio.ServicerContext
    ) -> inference_pb2.GetStatusResponse:
        """Answers from the replicas' latest reports."""
        return self._router.status()

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: aio.ServicerContext
    ) -> inference_pb2.TokenizeResponse | None:
        """Token ids, as Generate and Chat have them."""
        try:
            self._router.key_limits.count(caller())
            return await self._tokenize(request)
        except Exception as error:
            await abort(context, error)
            return None

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: aio.ServicerContext
    ) -> inference_pb2.DetokenizeResponse | None:
        """Text of token ids."""
        try:
            self._router.key_limits.count(caller())
            text = self._router.encoder.decode(request.token_ids, field="token_ids")
            return inference_pb2.DetokenizeResponse(text=text)
        except Exception as error:
            await abort(context, error)
            return None

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: aio.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        """The one that is served."""
        model = inference_pb2.ListModelsResponse.Model(
            id=self._router.model_name,
            max_model_len=self._router.max_model_len,
            has_chat_template=self._router.chat_template.is_there,
        )
        return inference_pb2.ListModelsResponse(models=[model])

    async def _tokenize(
        self, request: inference_pb2.TokenizeRequest
    ) -> inference_pb2.TokenizeResponse:
        router = self._router
        kind = request.WhichOneof("input")
        if kind is None:
            raise InvalidRequestError("input", "is required")
        text = request.text
        if kind == "conversation":
            with conversation_fields():
                text = await router.chat_template.render(
                    conversation_from_proto(request.conversation),
                    tools_from_proto(request.conversation.tools),
                )
        with_special = kind == "text"
        if request.HasField("add_special_tokens"):
            with_special = request.add_special_tokens
        token_ids = await router.encoder.encode(text, add_special_tokens=with_special, field=kind)
        strings = router.encoder.strings(token_ids) if request.return_token_strings else []
        return inference_pb2.TokenizeResponse(
            token_ids=token_ids, token_strings=strings, max_model_len=router.max_model_len
        )

    async def _write_all(
        self, context: aio.ServicerContext, stream: AsyncGenerator[_Chunk, None]
    ) -> None:
        """Sends all chunks. Raises: RequestCancelledError: the client does not read."""
        async with aclosing(stream) as chunks:
            async for chunk in chunks:
                await self._write(context, chunk)

    async def _write(self, context: aio.ServicerContext, chunk: _Chunk) -> None:
        timeout_s = self._router.slow_reader_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await context.write(chunk)
        except TimeoutError:
            self._router.authenticator.refusals.count(Refusal.SLOW_READER, context.peer())
            raise RequestCancelledError(
                f"the client has read nothing for {timeout_s:g} s"
            ) from None


def _take_place(context: aio.ServicerContext) -> None:
    """The client's span, if it has one, is the parent of the request's."""
    place = dict(context.invocation_metadata() or ()).get("traceparent", "")
    incoming_traceparent.set(place if isinstance(place, str) else "")
