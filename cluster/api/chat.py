"""``/v1/chat/completions``."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.api.answers import (
    ChoiceRecord,
    Envelope,
    UsageCounter,
    client_fields,
    extensions,
    generated,
)
from cluster.api.fields import GenerationFields
from cluster.api.logprobs import TokenTexts, chat_logprobs, prompt_logprobs
from cluster.chat.template import ChatFields
from cluster.chat.tool_calls import CUSTOM_INPUT, AnswerReader, ToolCall
from cluster.chat.tools import (
    AnyTool,
    CustomTool,
    FunctionTool,
    NamedFunction,
    NamedToolChoice,
    Tool,
    ToolChoice,
)
from cluster.errors import InvalidRequestError
from cluster.rpc.chat_prompt import ChatPrompt
from cluster.rpc.chunk import Chunk
from cluster.rpc.router import RouterServer
from cluster.security.api_keys import ApiKey

_FIELD_NAMES = {
    "prompt": "messages",
    "prompt.token_ids": "messages",
    "sampling.logprobs": "top_logprobs",
}


class ChatCompletionRequest(GenerationFields, ChatFields):
    """The body of ``/v1/chat/completions``."""

    max_completion_tokens: int | None = Field(
        default=None, description="unset: what the context leaves"
    )
    max_tokens: int | None = Field(default=None, description="former name of max_completion_tokens")
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, description="0 to 20; needs logprobs: true")
    tools: Annotated[list[AnyTool], Field(fail_fast=True)] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    functions: Annotated[list[FunctionTool], Field(fail_fast=True)] = Field(
        default_factory=list, description="former form of tools"
    )
    function_call: Literal["none", "auto"] | NamedFunction | None = Field(
        default=None, description="former form of tool_choice"
    )

    def to_tools(self) -> tuple[Sequence[Tool | CustomTool], ToolChoice | None, bool]:
        """Tools, the choice of them, and whether there may be several calls.

        Raises:
            InvalidRequestError: they are there in both forms, or a choice is without functions.
        """
        if not self.functions:
            if self.function_call is not None:
                raise InvalidRequestError("function_call", "needs functions")
            return self.tools, self.tool_choice, self.parallel_tool_calls
        if self.tools or self.tool_choice is not None:
            raise InvalidRequestError("functions", "cannot go with tools")
        if self.parallel_tool_calls and "parallel_tool_calls" in self.model_fields_set:
            raise InvalidRequestError(
                "parallel_tool_calls", "needs tools: one call is made of functions at most"
            )
        choice: Any = self.function_call
        if isinstance(choice, NamedFunction):
            choice = NamedToolChoice(type="function", function=choice)
        return [Tool(type="function", function=f) for f in self.functions], choice, False


class ChatCompletions:
    """One request's way through a router and back."""

    def __init__(
        self,
        router: RouterServer,
        fields: ChatCompletionRequest,
        prompt: ChatPrompt,
        key: ApiKey,
    ) -> None:
        self._router = router
        self._fields = fields
        self._prompt = prompt
        self._key = key
        self._names = _names(fields)
        if prompt.use is not None:
            self._names["sampling.grammar"] = "functions" if fields.functions else "tools"
        kind = "chat.completion.chunk" if fields.stream else "chat.completion"
        self._envelope = Envelope.new("chatcmpl", kind, router.model_name)
        self._texts = TokenTexts(router.vocabulary, as_ids=fields.return_tokens_as_token_ids)
        self._usage = UsageCounter(
            [len(prompt.token_ids)], with_speculation=fields.return_speculation_stats
        )

    @classmethod
    async def of(
        cls, router: RouterServer, fields: ChatCompletionRequest, key: ApiKey
    ) -> ChatCompletions:
        """Checks, renders and tokenises. Raises: InvalidRequestError, ModelNotFoundError."""
        router.check_model(fields.model)
        fields.check_together()
        if fields.top_logprobs is not None and not fields.logprobs:
            raise InvalidRequestError("top_logprobs", "needs logprobs: true")
        sampling = fields.to_sampling(
            max_tokens=_max_tokens(fields, router.max_model_len),
            logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
            grammar=fields.to_grammar(),
        )
        tools, tool_choice, parallel_tool_calls = fields.to_tools()
        with client_fields(_names(fields)):
            prompt = await ChatPrompt.of(
                router,
                fields,
                sampling,
                tools=tools,
                tool_choice=tool_choice,
                parallel_tool_calls=parallel_tool_calls,
                max_prompt_tokens=fields.kept_tokens(sampling, router.max_model_len),
            )
        return cls(router, fields, prompt, key)

    async def complete(self) -> dict[str, Any]:
        """The whole answer. Raises: DsparkError."""
        records: dict[int, ChoiceRecord] = defaultdict(ChoiceRecord)
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                records[chunk.choice_index].add(chunk)
        choices = [self._choice(index, record) for index, record in sorted(records.items())]
        body = self._envelope.of(choices, self._usage.usage())
        return body | self._of_prompt(records[0])

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer piece by piece. Raises: DsparkError."""
        options = self._fields.stream_options
        with_usage = options is not None and options.continuous_usage_stats
        streams: dict[int, _ChoiceStream] = {}
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                index = chunk.choice_index
                if index not in streams:
                    streams[index] = _ChoiceStream(self._fields, self._prompt.reader(self._router))
                    first = {"role": "assistant", "content": ""}
                    event = self._event(index, first, {}, with_usage)
                    yield event | (self._of_prompt(chunk) if index == 0 else {})
                extra: dict[str, Any] = {}
                if self._fields.logprobs:
                    extra["logprobs"] = chat_logprobs(chunk.logprobs, self._texts)
                extra |= extensions(self._fields, chunk)
                deltas, reason = streams[index].push(chunk)
                for delta in deltas[:-1]:
                    yield self._event(index, delta, {}, with_usage)
                extra["finish_reason"] = reason
                if deltas or reason or len(extra) > 1:
                    yield self._event(index, (deltas or [{}])[-1], extra, with_usage)
        if options is not None and options.include_usage:
            yield self._envelope.of([], self._usage.usage())

    async def _chunks(self) -> AsyncGenerator[Chunk, None]:
        stream = generated(
            self._router,
            [self._prompt.token_ids],
            self._fields,
            self._prompt.sampling,
            num_choices=self._fields.n,
            key=self._key,
            request_id=self._envelope.id,
            field_names=self._names,
        )
        async with aclosing(stream) as chunks:
            async for _, chunk in chunks:
                self._usage.add(0, chunk)
                yield chunk

    def _of_prompt(self, piece: ChoiceRecord | Chunk) -> dict[str, Any]:
        """What was asked for of the conversation; the beginning of a choice has it."""
        extra: dict[str, Any] = {}
        num_top = self._fields.prompt_logprobs
        if num_top is not None:
            scores = prompt_logprobs(piece.prompt_logprobs, num_top, self._texts)
            extra["prompt_logprobs"] = scores
        if self._fields.return_token_ids:
            extra["prompt_token_ids"] = self._prompt.token_ids
        return extra

    def _event(
        self, index: int, delta: dict[str, Any], extra: dict[str, Any], with_usage: bool
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._envelope.of([choice | extra], self._usage.usage() if with_usage else None)

    def _choice(self, index: int, record: ChoiceRecord) -> dict[str, Any]:
        reader = self._prompt.reader(self._router)
        parts = reader.push(record.text, record.token_ids, is_last=True)
        calls = [part for part in parts if isinstance(part, ToolCall)]
        content = "".join(part for part in parts if isinstance(part, str))
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self._prompt.use is not None and not content else content,
            "refusal": None,
        }
        reason = record.finish_reason
        if calls and self._fields.functions:
            message["function_call"] = _function_call(calls[0])
        elif calls:
            message["tool_calls"] = [_call(call, self._fields) for call in calls]
        if calls and reason == "stop":
            reason = _reason(self._fields)
        choice = {"index": index, "message": message, "finish_reason": reason, "logprobs": None}
        if self._fields.logprobs:
            choice["logprobs"] = chat_logprobs(record.logprobs, self._texts)
        return choice | extensions(self._fields, record)


class _ChoiceStream:
    """One choice's deltas."""

    def __init__(self, fields: ChatCompletionRequest, reader: AnswerReader) -> None:
        self._fields = fields
        self._reader = reader
        self._num_calls = 0

    def push(self, chunk: Chunk) -> tuple[list[dict[str, Any]], str | None]:
        """The deltas that a piece brings, and why the choice ends if it does."""
        reason = None if chunk.finish_reason is None else chunk.finish_reason.name.lower()
        deltas: list[dict[str, Any]] = []
        for part in self._reader.push(chunk.text, chunk.token_ids, is_last=reason is not None):
            if isinstance(part, str):
                deltas.append({"content": part})
                continue
            if self._fields.functions:
                deltas.append({"function_call": _function_call(part)})
            else:
                call = {"index": self._num_calls, **_call(part, self._fields)}
                deltas.append({"tool_calls": [call]})
            self._num_calls += 1
        if reason == "stop" and self._num_calls:
            reason = _reason(self._fields)
        return deltas, reason


def _names(fields: ChatCompletionRequest) -> dict[str, str]:
    """How the client wrote fields that are named otherwise, for errors."""
    names = {**_FIELD_NAMES, "sampling.grammar": fields.grammar_field}
    if fields.functions:
        names |= {"tools": "functions", "tool_choice": "function_call"}
    return names


def _call(call: ToolCall, fields: ChatCompletionRequest) -> dict[str, Any]:
    """As in a message."""
    for tool in fields.tools:
        if isinstance(tool, CustomTool) and tool.custom.name == call.name:
            given = {"name": call.name, "input": json.loads(call.arguments)[CUSTOM_INPUT]}
            return {"id": call.id, "type": "custom", "custom": given}
    return {"id": call.id, "type": "function", "function": _function_call(call)}


def _function_call(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments}


def _reason(fields: ChatCompletionRequest) -> str:
    """Why an answer ends that has called."""
    return "function_call" if fields.functions else "tool_calls"


def _max_tokens(fields: ChatCompletionRequest, max_model_len: int) -> int:
    """What was asked for; the router cuts it to what the context leaves.

    Raises:
        InvalidRequestError: it has two values.
    """
    limits = (fields.max_completion_tokens, fields.max_tokens)
    given = {limit for limit in limits if limit is not None}
    if len(given) > 1:
        raise InvalidRequestError("max_tokens", "is another one than max_completion_tokens")
    return given.pop() if given else max_model_len
