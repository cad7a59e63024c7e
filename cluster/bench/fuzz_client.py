"""The clients' gRPC surface in this process: the service itself, called without sockets.

The router behind it is the real one up to the point where a request would go to a replica.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from cluster.bench.fuzz_mutators import mutate_encoded
from cluster.bench.fuzz_router import OfflineRouter, make_router
from cluster.bench.fuzz_surfaces import ACCEPTED, UNDECODABLE, Loaded
from cluster.rpc.inference_service import InferenceService
from cluster.v1 import chat_pb2, common_pb2, inference_pb2

# What is called, with its message; a first byte of what is fuzzed says which.
METHODS: tuple[tuple[str, type[Message]], ...] = (
    ("Generate", inference_pb2.GenerateRequest),
    ("Chat", inference_pb2.ChatRequest),
    ("Tokenize", inference_pb2.TokenizeRequest),
    ("Detokenize", inference_pb2.DetokenizeRequest),
)
_WORDS = (b'{"type": "object"}', b"[a-z]+", b'start: "a"', b"fuzz", b"{{ x }}", b"\xff\xff\xff\xff")


def load() -> Loaded:
    """The surface; its service belongs to this thread."""
    events = asyncio.new_event_loop()
    service = InferenceService(make_router(OfflineRouter))

    def check(data: bytes) -> str:
        name, kind = METHODS[data[0] % len(METHODS)] if data else METHODS[0]
        try:
            message = kind.FromString(data[1:])
        except DecodeError:
            return UNDECODABLE
        return events.run_until_complete(_call(service, name, message))

    return Loaded(check, valid_calls(), mutate, words=_WORDS)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Fields of the message changed."""
    index = data[0] % len(METHODS) if data else 0
    return bytes([index]) + mutate_encoded(METHODS[index][1], data[1:], rng)


def valid_calls() -> list[bytes]:
    """That are accepted, and hold every field between them."""
    numbers = {kind: index for index, (_, kind) in enumerate(METHODS)}
    return [
        bytes([numbers[type(message)]]) + message.SerializeToString()
        for message in (*_generate_requests(), *_chat_requests(), *_token_requests())
    ]


async def _call(service: InferenceService, name: str, message: Message) -> str:
    """``ACCEPTED``, or the code of the status.

    Raises:
        AssertionError: the status is of a mistake of ours, or does not name the field.
    """
    try:
        await getattr(service, name)(message, _Context())
    except _AbortedError as aborted:
        code, details = aborted.args
        info = error_details_pb2.ErrorInfo()
        assert details.details, details
        assert details.details[0].Unpack(info), details
        # No client is late here: there is no deadline.
        assert code in ("INVALID_ARGUMENT", "NOT_FOUND"), (code, details.message)
        assert info.metadata["field"], details.message
        return str(code)
    return ACCEPTED


class _AbortedError(Exception):
    """A call was ended: its code's name, and its ``google.rpc.Status``."""


class _Context:
    """As much of gRPC's as the service uses."""

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer(self) -> str:
        return "fuzz"

    async def send_initial_metadata(self, _: Any) -> None:
        return None

    async def write(self, message: Message) -> None:
        message.SerializeToString()

    async def abort_with_status(self, status: Any) -> None:
        details = status_pb2.Status.FromString(dict(status.trailing_metadata).popitem()[1])
        raise _AbortedError(status.code.name, details)


def _sampling(**fields: Any) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        seed=7,
        stop_token_ids=[3, 4],
        stop=["a", "bc"],
        max_tokens=20,
        min_tokens=2,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.2,
        logit_bias={5: 1.0, 6: -2.0},
        ignore_eos=True,
        logprobs=3,
        prompt_logprobs=1,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        bad_words=["x", "yz"],
        **fields,
    )


def _generate_requests() -> list[inference_pb2.GenerateRequest]:
    make = inference_pb2.GenerateRequest
    ids = inference_pb2.TokenIds(ids=[1, 2, 3])
    speculation = common_pb2.SpeculationParams(mode=common_pb2.SPECULATION_MODE_OFF)
    speculation.num_speculative_tokens = 3
    grammars = (
        common_pb2.Grammar(json_schema='{"type": "object"}'),
        common_pb2.Grammar(json_object=common_pb2.Grammar.JsonObject()),
        common_pb2.Grammar(regex="[a-z]+"),
        common_pb2.Grammar(lark='start: "a"'),
    )
    return [
        make(text="def f(x):", model="fuzz", truncate_prompt_tokens=4),
        make(token_ids=ids, sampling=_sampling(), n=2, request_id="r", attempt=1),
        make(token_ids=ids, sampling=common_pb2.SamplingParams(allowed_token_ids=[7, 8])),
        make(
            token_ids=ids,
            speculation=speculation,
            resume_token_ids=inference_pb2.TokenIds(ids=[4, 5]),
            priority=common_pb2.PRIORITY_BATCH,
        ),
        *(
            make(text="a", sampling=common_pb2.SamplingParams(grammar=grammar))
            for grammar in grammars
        ),
    ]


def _conversation(**fields: Any) -> chat_pb2.Conversation:
    make = chat_pb2.Message
    call = chat_pb2.ToolCall(id="c1", name="add", arguments='{"a": 1}')
    custom = chat_pb2.ToolCall(id="c2", name="words", input="x y")
    messages = [
        make(role=chat_pb2.ROLE_SYSTEM, content="be brief"),
        make(role=chat_pb2.ROLE_USER, content="add", name="ann"),
        make(role=chat_pb2.ROLE_ASSISTANT, tool_calls=[call, custom], reasoning_content="why"),
        make(role=chat_pb2.ROLE_TOOL, content="2", tool_call_id="c1"),
        make(role=chat_pb2.ROLE_USER, content="go on"),
    ]
    return chat_pb2.Conversation(messages=messages, **fields)


def _chat_requests() -> list[inference_pb2.ChatRequest]:
    make = inference_pb2.ChatRequest
    tools = [
        chat_pb2.Tool(name="add", description="two numbers", parameters='{"type": "object"}'),
        chat_pb2.Tool(name="plain", input=common_pb2.Grammar()),
        chat_pb2.Tool(name="words", input=common_pb2.Grammar(regex="[a-z]+")),
        chat_pb2.Tool(name="lines", input=common_pb2.Grammar(lark='start: "a"+')),
    ]
    template = {
        "template": "{{ messages[0].content }}{{ reasoning_effort }}{{ mood }}",
        "template_variables": '{"mood": "x"}',
        "reasoning_effort": "low",
    }
    choice = chat_pb2.ToolChoice
    return [
        make(conversation=_conversation(), sampling=_sampling(), n=2, truncate_prompt_tokens=9),
        make(
            conversation=_conversation(tools=tools),
            tool_choice=choice(mode=choice.MODE_REQUIRED, names=["add", "lines"]),
            parallel_tool_calls=True,
            resume_token_ids=inference_pb2.TokenIds(ids=[97]),
            attempt=1,
            request_id="c",
        ),
        make(conversation=_conversation(tools=tools), tool_choice=choice(mode=choice.MODE_NONE)),
        make(conversation=_conversation(tools=tools), model="fuzz", priority="PRIORITY_BATCH"),
        make(conversation=_conversation(**template, add_generation_prompt=True)),
        make(conversation=_conversation(add_generation_prompt=False, continue_final_message=True)),
    ]


def _token_requests() -> list[Message]:
    return [
        inference_pb2.TokenizeRequest(
            text="a b", add_special_tokens=False, return_token_strings=True
        ),
        inference_pb2.TokenizeRequest(conversation=_conversation()),
        inference_pb2.DetokenizeRequest(token_ids=[40, 41, 42]),
    ]
