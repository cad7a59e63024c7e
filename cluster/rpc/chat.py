"""One ``Chat`` call: a conversation in, and its answers as content and calls of tools."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.chat.tool_calls import AnswerReader, ToolCall
from cluster.chat.tools import CustomTool, Tool
from cluster.engine.text import TextStream
from cluster.errors import InvalidRequestError
from cluster.rpc.chat_messages import (
    call_to_proto,
    conversation_from_proto,
    tool_choice_from_proto,
    tools_from_proto,
)
from cluster.rpc.chat_prompt import ChatPrompt
from cluster.rpc.convert import call_from_proto
from cluster.rpc.prompt import kept_tokens
from cluster.security.api_keys import ApiKey
from cluster.v1 import common_pb2, inference_pb2

if TYPE_CHECKING:
    from cluster.rpc.router import RouterServer

# Fields of ``cluster.chat`` as our own clients write them.
_FIELD_NAMES = {
    "chat_template": "conversation.template",
    "chat_template_kwargs": "conversation.template_variables",
    "continue_final_message": "conversation.continue_final_message",
    "messages": "conversation.messages",
    "prompt": "conversation",
    "reasoning_effort": "conversation.reasoning_effort",
    "tools": "conversation.tools",
}
_SAME_FIELDS = ("request_id", "choice_index", "attempt", "token_offset", "finish_reason")
_SAME_LISTS = ("token_ids", "token_sources", "logprobs", "text_lengths", "prompt_logprobs")


async def chat(
    router: RouterServer,
    request: inference_pb2.ChatRequest,
    timeout_s: float | None,
    key: ApiKey,
) -> AsyncGenerator[inference_pb2.ChatResponse, None]:
    """Streams the answers; however it is left, nothing of the call runs on.

    Raises:
        DsparkError: as ``RouterServer.generate``; ``InvalidRequestError`` names the client's field.
    """
    call = call_from_proto(request)
    router.check_model(call.model)
    with conversation_fields():
        sampling = call.sampling
        if not request.sampling.HasField("max_tokens"):
            sampling = replace(sampling, max_tokens=router.max_model_len)
        tools = tools_from_proto(request.conversation.tools)
        prompt = await ChatPrompt.of(
            router,
            conversation_from_proto(request.conversation),
            sampling,
            tools=tools,
            tool_choice=tool_choice_from_proto(request.tool_choice),
            parallel_tool_calls=(
                not request.HasField("parallel_tool_calls") or request.parallel_tool_calls
            ),
            max_prompt_tokens=kept_tokens(
                call.truncate_prompt_tokens,
                max_tokens=sampling.max_tokens,
                max_model_len=router.max_model_len,
            ),
        )
        call = replace(call, prompt=prompt.token_ids, sampling=prompt.sampling)
        readers: dict[int, AnswerReader] = {}
        with conversation_fields({"sampling.grammar": "conversation.tools"} if prompt.use else {}):
            async with aclosing(router.generate(call, timeout_s, key)) as chunks:
                async for chunk in chunks:
                    if chunk.choice_index not in readers:
                        reader = prompt.reader(router)
                        # What the client has already is read again, and not sent.
                        text = TextStream.of(router.tokenizer, prompt.sampling)
                        for token_id in call.resume_token_ids:
                            reader.push(text.push(token_id).text, (token_id,), is_last=False)
                        readers[chunk.choice_index] = reader
                    yield _response(chunk, readers[chunk.choice_index], tools)


@contextmanager
def conversation_fields(names: Mapping[str, str] = _FIELD_NAMES) -> Iterator[None]:
    """Errors within name fields by ``names``: those of a conversation as in ``cluster.v1``."""
    try:
        yield
    except InvalidRequestError as error:
        field = names.get(error.field, error.field)
        raise InvalidRequestError(field, error.message) from None


def _response(
    chunk: inference_pb2.GenerateResponse,
    reader: AnswerReader,
    tools: Sequence[Tool | CustomTool],
) -> inference_pb2.ChatResponse:
    response = inference_pb2.ChatResponse(
        **{name: getattr(chunk, name) for name in (*_SAME_FIELDS, *_SAME_LISTS)}
    )
    if chunk.HasField("usage"):
        response.usage.CopyFrom(chunk.usage)
    parts = reader.push(chunk.text, chunk.token_ids, is_last=bool(chunk.finish_reason))
    for part in parts:
        if isinstance(part, ToolCall):
            response.tool_calls.append(call_to_proto(part, tools))
        else:
            response.content += part
    if chunk.finish_reason == common_pb2.FINISH_REASON_STOP and reader.num_calls:
        response.finish_reason = common_pb2.FINISH_REASON_TOOL_CALLS
    return response
