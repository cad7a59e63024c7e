"""Routers for fuzzing: one that takes every documented field, and one that needs no replica."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from cluster.bench.fuzz_replica import byte_tokenizer, immediate_output
from cluster.bench.fuzz_surfaces import MAX_MODEL_LEN, VOCAB_SIZE
from cluster.rpc.convert import GenerateCall, add_output
from cluster.rpc.router import RouterServer
from cluster.v1 import inference_pb2, replica_pb2


def make_router(kind: type[RouterServer] = RouterServer) -> RouterServer:
    """Of a model called ``fuzz``; it renders templates that come with requests."""
    return kind(
        tokenizer=byte_tokenizer(),
        model_name="fuzz",
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        chat_template="chatml",
        trust_request_chat_template=True,
        eos_token_ids=(2,),
        wait_s=5.0,
    )


class OfflineRouter(RouterServer):
    """Answers with one token by itself, once a request has passed every check."""

    async def generate(
        self, call: GenerateCall, *_: Any, **__: Any
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Raises: InvalidRequestError."""
        request = await self._to_request(call, None, "")
        delta = replica_pb2.ConnectResponse.Delta()
        add_output(delta, immediate_output(request))
        for index in range(call.num_choices):
            yield inference_pb2.GenerateResponse(
                request_id=request.request_id,
                choice_index=index,
                token_offset=delta.token_offset,
                token_ids=delta.token_ids,
                token_sources=delta.token_sources,
                text="a" * len(delta.token_ids),
                text_lengths=[1] * len(delta.token_ids),
                logprobs=delta.logprobs,
                prompt_logprobs=delta.prompt_logprobs,
                finish_reason=delta.finish_reason,
                usage=delta.usage,
            )
