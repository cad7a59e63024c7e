"""``/v1/chat/completions``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic import Field

from cluster.api.answers import (
    ChoiceRecord,
    Envelope,
    UsageCounter,
    check_model,
    client_fields,
    extensions,
    generated,
)
from cluster.api.fields import GenerationFields
from cluster.api.logprobs import TokenTexts, chat_logprobs
from cluster.chat.template import ChatFields
from cluster.chat.tool_calls import AnswerReader, ToolCall
from cluster.chat.tools import Tool, ToolChoice
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
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True


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
        self._grammar_field = "tools" if prompt.may_call else fields.grammar_field
        kind = "chat.completion.chunk" if fields.stream else "chat.completion"
        self._envelope = Envelope.new("chatcmpl", kind, router.model_name)
        self._texts = TokenTexts(router.vocabulary)
        self._usage = UsageCounter(
            [len(prompt.token_ids)], with_speculation=fields.return_speculation_stats
        )

    @classmethod
    async def of(
        cls, router: RouterServer, fields: ChatCompletionRequest, key: ApiKey
    ) -> ChatCompletions:
        """Checks, renders and tokenises. Raises: InvalidRequestError, ModelNotFoundError."""
        check_model(router, fields.model)
        fields.check_together()
        if fields.top_logprobs is not None and not fields.logprobs:
            raise InvalidRequestError("top_logprobs", "needs logprobs: true")
        sampling = fields.to_sampling(
            max_tokens=_max_tokens(fields, router.max_model_len),
            logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
            grammar=fields.to_grammar(),
        )
        with client_fields({**_FIELD_NAMES, "sampling.grammar": fields.grammar_field}):
            prompt = await ChatPrompt.of(
                fields,
                sampling,
                template=router.chat_template,
                encoder=router.encoder,
                tools=fields.tools,
                tool_choice=fields.tool_choice,
                parallel_tool_calls=fields.parallel_tool_calls,
            )
        return cls(router, fields, prompt, key)

    async def complete(self) -> dict[str, Any]:
        """The whole answer. Raises: DsparkError."""
        records: dict[int, ChoiceRecord] = defaultdict(ChoiceRecord)
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                records[chunk.choice_index].add(chunk)
        choices = [self._choice(index, record) for index, record in sorted(records.items())]
        return self._envelope.of(choices, self._usage.usage())

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer piece by piece. Raises: DsparkError."""
        options = self._fields.stream_options
        with_usage = options is not None and options.continuous_usage_stats
        streams: dict[int, _ChoiceStream] = {}
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                index = chunk.choice_index
                if index not in streams:
                    streams[index] = _ChoiceStream(reads_calls=self._prompt.may_call)
                    first = {"role": "assistant", "content": ""}
                    yield self._event(index, first, {}, with_usage)
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
            field_names={**_FIELD_NAMES, "sampling.grammar": self._grammar_field},
        )
        async with aclosing(stream) as chunks:
            async for _, chunk in chunks:
                self._usage.add(0, chunk)
                yield chunk

    def _event(
        self, index: int, delta: dict[str, Any], extra: dict[str, Any], with_usage: bool
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._envelope.of([choice | extra], self._usage.usage() if with_usage else None)

    def _choice(self, index: int, record: ChoiceRecord) -> dict[str, Any]:
        parts = AnswerReader(reads_calls=self._prompt.may_call).push(record.text, is_last=True)
        calls = [part.to_json() for part in parts if isinstance(part, ToolCall)]
        content = "".join(part for part in parts if isinstance(part, str))
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self._prompt.may_call and not content else content,
            "refusal": None,
        }
        reason = record.finish_reason
        if calls:
            message["tool_calls"] = calls
            reason = "tool_calls" if reason == "stop" else reason
        choice = {"index": index, "message": message, "finish_reason": reason, "logprobs": None}
        if self._fields.logprobs:
            choice["logprobs"] = chat_logprobs(record.logprobs, self._texts)
        return choice | extensions(self._fields, record)


class _ChoiceStream:
    """One choice's deltas."""

    def __init__(self, *, reads_calls: bool) -> None:
        self._reader = AnswerReader(reads_calls=reads_calls)
        self._num_calls = 0

    def push(self, chunk: Chunk) -> tuple[list[dict[str, Any]], str | None]:
        """The deltas that a piece brings, and why the choice ends if it does."""
        reason = None if chunk.finish_reason is None else chunk.finish_reason.name.lower()
        deltas: list[dict[str, Any]] = []
        for part in self._reader.push(chunk.text, is_last=reason is not None):
            if isinstance(part, str):
                deltas.append({"content": part})
            else:
                deltas.append({"tool_calls": [{"index": self._num_calls, **part.to_json()}]})
                self._num_calls += 1
        return deltas, "tool_calls" if reason == "stop" and self._num_calls else reason


def _max_tokens(fields: ChatCompletionRequest, max_model_len: int) -> int:
    """What was asked for; the router cuts it to what the context leaves."""
    for value in (fields.max_completion_tokens, fields.max_tokens):
        if value is not None:
            return value
    return max_model_len
