"""``InferenceService`` offers what the HTTP API does: chat, tools, tokens, models."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from openai import OpenAI

from cluster.errors import InvalidRequestError, ModelNotFoundError
from cluster.rpc.client import Client
from cluster.rpc.status import from_rpc_error
from cluster.v1 import chat_pb2, common_pb2, inference_pb2, inference_pb2_grpc
from tests.api_tools import ApiServer, serving
from tests.engine_tools import make_config
from tests.models import DRAFTER, TARGET

MODEL = "stdlib-7m"
QUESTION = "Write a function that reads a file."
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"name": "get_weather", "description": "The weather.", "parameters": json.dumps(PARAMETERS)}
HTTP_TOOL: Any = {"type": "function", "function": {**TOOL, "parameters": PARAMETERS}}
HTTP_RUN: Any = {"type": "custom", "custom": {"name": "run"}}
GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 11}
OFF = common_pb2.SpeculationParams(mode=common_pb2.SPECULATION_MODE_OFF)


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    config = make_config(TARGET, DRAFTER, max_model_len=512, max_num_seqs=16)
    with serving(config, chat_template="chatml") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ApiServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def stub(server: ApiServer) -> Iterator[Any]:
    with grpc.insecure_channel(server.grpc_address) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


@dataclass
class Answer:
    """One choice, joined."""

    content: str = ""
    token_ids: list[int] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    inputs: list[tuple[str, str]] = field(default_factory=list)  # of custom tools
    logprobs: list[float] = field(default_factory=list)
    num_characters: int = 0
    finish_reason: int = 0
    completion_tokens: int = 0

    def add(self, chunk: inference_pb2.ChatResponse) -> None:
        assert chunk.token_offset == len(self.token_ids) or not chunk.token_ids
        self.content += chunk.content
        self.token_ids += chunk.token_ids
        for call in chunk.tool_calls:
            if call.HasField("input"):
                self.inputs.append((call.name, call.input))
            else:
                self.calls.append((call.name, call.arguments))
        self.logprobs += [position.chosen.logprob for position in chunk.logprobs]
        self.num_characters += sum(chunk.text_lengths)
        self.finish_reason = chunk.finish_reason
        self.completion_tokens = chunk.usage.completion_tokens


def conversation(**fields: Any) -> chat_pb2.Conversation:
    message = chat_pb2.Message(role=chat_pb2.ROLE_USER, content=QUESTION)
    return chat_pb2.Conversation(messages=[message], **fields)


def chat(stub: Any, *, sampling: dict[str, Any], **fields: Any) -> list[Answer]:
    request = inference_pb2.ChatRequest(
        **{"conversation": conversation(), **fields},
        sampling=common_pb2.SamplingParams(**sampling),
    )
    answers: dict[int, Answer] = {}
    for chunk in stub.Chat(request, timeout=60):
        answers.setdefault(chunk.choice_index, Answer()).add(chunk)
    return [answer for _, answer in sorted(answers.items())]


def http_chat(client: OpenAI, **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": QUESTION}]
    return client.chat.completions.create(model=MODEL, messages=messages, **fields)


@pytest.mark.parametrize("fields", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_chat_is_as_over_http_speculated_on_and_not(
    stub: Any, client: OpenAI, fields: dict[str, Any]
) -> None:
    theirs = http_chat(
        client, **fields, n=2, max_completion_tokens=12, logprobs=True, top_logprobs=1
    ).choices
    sampling = {**fields, "max_tokens": 12, "logprobs": 1}
    for speculation in (common_pb2.SpeculationParams(), OFF):
        mine = chat(stub, sampling=sampling, n=2, speculation=speculation)
        for one, other in zip(mine, theirs, strict=True):
            assert one.content == other.message.content
            assert common_pb2.FinishReason.Name(one.finish_reason).endswith(
                other.finish_reason.upper()
            )
            assert one.completion_tokens == len(one.token_ids) == len(other.logprobs.content)
            wanted = [entry.logprob for entry in other.logprobs.content]
            assert one.logprobs == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("fields", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_calls_are_as_over_http_and_a_broken_stream_goes_on(
    stub: Any, client: OpenAI, fields: dict[str, Any]
) -> None:
    (theirs,) = http_chat(
        client,
        **fields,
        tools=[HTTP_TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        max_completion_tokens=120,
    ).choices
    request: dict[str, Any] = {
        "conversation": conversation(tools=[chat_pb2.Tool(**TOOL)]),
        "tool_choice": chat_pb2.ToolChoice(
            mode=chat_pb2.ToolChoice.MODE_REQUIRED, names=["get_weather"]
        ),
        "parallel_tool_calls": False,
        "sampling": {**fields, "max_tokens": 120},
    }
    (mine,) = chat(stub, **request)
    (call,) = theirs.message.tool_calls
    assert mine.calls == [(call.function.name, call.function.arguments)]
    assert mine.content == ""
    assert mine.finish_reason == common_pb2.FINISH_REASON_TOOL_CALLS
    assert theirs.finish_reason == "tool_calls"
    assert mine.num_characters > len(call.function.arguments)
    # The call's beginning is in the tokens that the client has, its end is not.
    held = mine.token_ids[: len(mine.token_ids) // 2]
    rest = resume(stub, request, held)
    assert rest.token_ids == mine.token_ids[len(held) :]
    assert (rest.calls, rest.content) == (mine.calls, "")
    assert rest.finish_reason == common_pb2.FINISH_REASON_TOOL_CALLS


LARK = 'start: "[" NAME ("," NAME)* "]"\nNAME: /[ab]{2}/'


@pytest.mark.parametrize("syntax", ["regex", "lark"])
def test_custom_tools_are_as_over_http(stub: Any, client: OpenAI, syntax: str) -> None:
    definition = {"regex": "[ab]{3}c", "lark": LARK}[syntax]
    wanted = {"type": "grammar", "grammar": {"syntax": syntax, "definition": definition}}
    tool: Any = {"type": "custom", "custom": {"name": "run", "format": wanted}}
    (theirs,) = http_chat(
        client,
        **SEEDED,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_completion_tokens=120,
    ).choices
    (call,) = theirs.message.tool_calls
    assert re.fullmatch({"regex": definition, "lark": r"\[.*\]"}[syntax], call.custom.input)
    mine = chat_pb2.Tool(name="run", input=common_pb2.Grammar(**{syntax: definition}))
    request: dict[str, Any] = {
        "conversation": conversation(tools=[mine]),
        "tool_choice": chat_pb2.ToolChoice(mode=chat_pb2.ToolChoice.MODE_REQUIRED),
        "parallel_tool_calls": False,
        "sampling": {**SEEDED, "max_tokens": 120},
    }
    for speculation in (common_pb2.SpeculationParams(), OFF):
        (answer,) = chat(stub, **request, speculation=speculation)
        assert answer.inputs == [("run", call.custom.input)]
        assert (answer.content, answer.calls) == ("", [])
        assert answer.finish_reason == common_pb2.FINISH_REASON_TOOL_CALLS
    rest = resume(stub, request, answer.token_ids[:-2])
    assert rest.inputs == answer.inputs
    # Cut off, it is no call, and where all must be calls no content.
    short = {"sampling": {**SEEDED, "max_tokens": len(answer.token_ids) // 2}}
    (cut,) = chat(stub, **{**request, **short})
    assert cut.inputs == []
    assert cut.content == ""


def test_only_a_prompt_s_end_is_kept_as_over_http(stub: Any, client: OpenAI) -> None:
    extra = {"truncate_prompt_tokens": 5, "return_token_ids": True}
    theirs: Any = http_chat(client, **SEEDED, max_completion_tokens=12, extra_body=extra)
    fields: dict[str, Any] = {
        "conversation": conversation(),
        "sampling": {**SEEDED, "max_tokens": 12},
        "truncate_prompt_tokens": 5,
    }
    (mine,) = chat(stub, **fields)
    assert mine.content == theirs.choices[0].message.content
    assert resume(stub, fields, mine.token_ids[:6]).token_ids == mine.token_ids[6:]
    kept = inference_pb2.TokenIds(ids=theirs.prompt_token_ids)
    whole = inference_pb2.TokenIds(ids=[*range(300, 900), *theirs.prompt_token_ids])
    found = []
    for prompt, number in ((kept, None), (whole, 5)):
        request = inference_pb2.GenerateRequest(
            token_ids=prompt,
            truncate_prompt_tokens=number,
            sampling=common_pb2.SamplingParams(**fields["sampling"]),
        )
        chunks = list(stub.Generate(request, timeout=60))
        assert chunks[-1].usage.prompt_tokens == 5
        found.append([token_id for chunk in chunks for token_id in chunk.token_ids])
    assert found == [mine.token_ids] * 2


@pytest.mark.parametrize("speculation", [common_pb2.SpeculationParams(), OFF])
def test_a_prompt_alone_is_scored_as_over_http(
    stub: Any, client: OpenAI, speculation: common_pb2.SpeculationParams
) -> None:
    theirs: Any = client.completions.create(
        model=MODEL, prompt=QUESTION, max_tokens=0, extra_body={"prompt_logprobs": 0}
    )
    sampling = common_pb2.SamplingParams(max_tokens=0, prompt_logprobs=0)
    request = inference_pb2.GenerateRequest(
        text=QUESTION, sampling=sampling, speculation=speculation
    )
    (chunk,) = stub.Generate(request, timeout=60)
    assert (chunk.text, chunk.finish_reason) == ("", common_pb2.FINISH_REASON_LENGTH)
    assert not chunk.token_ids
    assert (chunk.usage.completion_tokens, theirs.usage.completion_tokens) == (0, 0)
    wanted = [next(iter(d.values()))["logprob"] for d in theirs.choices[0].prompt_logprobs[1:]]
    found = [position.chosen.logprob for position in chunk.prompt_logprobs]
    assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("num_calls", [0, 1])
def test_a_call_that_is_cut_off_is_no_content(
    server: ApiServer, stub: Any, client: OpenAI, num_calls: int
) -> None:
    """Without an end call follows call, until max_tokens."""
    ends = dict.fromkeys(server.router.eos_token_ids, -100.0)
    max_tokens = 120 if num_calls else 12
    fields: dict[str, Any] = {
        **GREEDY,
        "tools": [HTTP_TOOL],
        "tool_choice": "required",
        "max_completion_tokens": max_tokens,
        "logit_bias": {str(token_id): bias for token_id, bias in ends.items()},
    }
    (whole,) = http_chat(client, **fields).choices
    assert whole.finish_reason == "length"
    assert whole.message.content is None
    calls = [call.function for call in whole.message.tool_calls or []]
    assert (len(calls) > 0) == (num_calls > 0)
    pieces = [piece.choices[0] for piece in http_chat(client, **fields, stream=True)]
    assert not any(piece.delta.content for piece in pieces)
    streamed = [call.function for piece in pieces for call in piece.delta.tool_calls or []]
    assert [vars(call) for call in streamed] == [vars(call) for call in calls]
    assert pieces[-1].finish_reason == "length"
    (mine,) = chat(
        stub,
        conversation=conversation(tools=[chat_pb2.Tool(**TOOL)]),
        tool_choice=chat_pb2.ToolChoice(mode=chat_pb2.ToolChoice.MODE_REQUIRED),
        sampling={**GREEDY, "max_tokens": max_tokens, "logit_bias": ends},
    )
    assert mine.content == ""
    assert mine.calls == [(call.name, call.arguments) for call in calls]
    assert mine.finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert len(mine.token_ids) == max_tokens


def test_content_follows_its_grammar_where_tools_may_be_called(stub: Any) -> None:
    (first,) = stub.Tokenize(inference_pb2.TokenizeRequest(text="a")).token_ids
    sampling = {
        **SEEDED,
        "max_tokens": 40,
        "grammar": common_pb2.Grammar(regex="[ab]{3}c"),
        "logit_bias": {first: 100.0},
    }
    told = conversation(tools=[chat_pb2.Tool(**TOOL)])
    (free,) = chat(stub, conversation=told, sampling=sampling)
    assert re.fullmatch("[ab]{3}c", free.content)
    assert (free.calls, free.finish_reason) == ([], common_pb2.FINISH_REASON_STOP)


def resume(stub: Any, fields: dict[str, Any], held: list[int]) -> Answer:
    """What comes behind the tokens that the client holds."""
    request = inference_pb2.ChatRequest(
        **{**fields, "sampling": common_pb2.SamplingParams(**fields["sampling"])},
        resume_token_ids=inference_pb2.TokenIds(ids=held),
        attempt=1,
    )
    answer = Answer()
    for chunk in stub.Chat(request, timeout=60):
        assert chunk.attempt == 1
        chunk.token_offset -= len(held)
        answer.add(chunk)
    return answer


def post(server: ApiServer, path: str, body: Any) -> Any:
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_tokens_and_models_are_as_over_http(server: ApiServer, stub: Any, client: OpenAI) -> None:
    mine = stub.Tokenize(inference_pb2.TokenizeRequest(text="a b", return_token_strings=True))
    theirs = post(server, "/tokenize", {"prompt": "a b", "return_token_strs": True})
    assert list(mine.token_ids) == theirs["tokens"]
    assert list(mine.token_strings) == theirs["token_strs"]
    assert mine.max_model_len == theirs["max_model_len"] == 512

    earlier: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    custom: Any = {"id": "call_2", "type": "custom", "custom": {"name": "run", "input": "ls"}}
    earlier[2]["tool_calls"].append(custom)
    calls = [
        chat_pb2.ToolCall(id="call_1", name="get_weather", arguments='{"city": "Rome"}'),
        chat_pb2.ToolCall(id="call_2", name="run", input="ls"),
    ]
    messages = [
        chat_pb2.Message(role=chat_pb2.ROLE_SYSTEM, content="Be brief."),
        chat_pb2.Message(role=chat_pb2.ROLE_USER, content=QUESTION),
        chat_pb2.Message(role=chat_pb2.ROLE_ASSISTANT, tool_calls=calls),
        chat_pb2.Message(role=chat_pb2.ROLE_TOOL, tool_call_id="call_1", content="sunny"),
    ]
    any_text = chat_pb2.Tool(name="run", input=common_pb2.Grammar())
    told = chat_pb2.Conversation(messages=messages, tools=[chat_pb2.Tool(**TOOL), any_text])
    mine = stub.Tokenize(inference_pb2.TokenizeRequest(conversation=told))
    theirs = post(server, "/tokenize", {"messages": earlier, "tools": [HTTP_TOOL, HTTP_RUN]})
    assert list(mine.token_ids) == theirs["tokens"]
    text = stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=mine.token_ids)).text
    assert text == post(server, "/detokenize", {"tokens": theirs["tokens"]})["prompt"]
    assert "sunny" in text

    (model,) = stub.ListModels(inference_pb2.ListModelsRequest()).models
    assert model.id == client.models.list().data[0].id
    assert (model.max_model_len, model.has_chat_template) == (512, True)


SURROGATE = json.dumps({"properties": {"\ud800": {}}})
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"conversation": chat_pb2.Conversation()}, "conversation.messages"),
    (
        {"conversation": chat_pb2.Conversation(messages=[chat_pb2.Message(content="x")])},
        "conversation.messages",
    ),
    (
        {"conversation": conversation(continue_final_message=True)},
        "conversation.continue_final_message",
    ),
    ({"conversation": conversation(template_variables="[]")}, "conversation.template_variables"),
    (
        {"conversation": conversation(template_variables='{"messages": 1}')},
        "conversation.template_variables",
    ),
    (
        {"conversation": conversation(template_variables='{"a": ["\\ud800"]}')},
        "conversation.template_variables",
    ),
    (
        {"conversation": conversation(tools=[chat_pb2.Tool(name="f", parameters=SURROGATE)])},
        "conversation.tools",
    ),
    *(
        ({"conversation": conversation(template_variables=text)}, "conversation.template_variables")
        for text in ('{"add_generation_prompt": false}', '{"padding": true}', '{"mood": 1}')
    ),
    *(
        (
            {"conversation": chat_pb2.Conversation(messages=[chat_pb2.Message(**message)])},
            "conversation.messages",
        )
        for message in (
            {"role": chat_pb2.ROLE_USER},
            {"role": chat_pb2.ROLE_ASSISTANT},
            {"role": chat_pb2.ROLE_TOOL, "content": "x"},
        )
    ),
    ({"conversation": conversation(reasoning_effort="high")}, "conversation.reasoning_effort"),
    ({"conversation": conversation(tools=[chat_pb2.Tool(name="a b")])}, "conversation.tools"),
    (
        {"conversation": conversation(tools=[chat_pb2.Tool(name="f", parameters="{")])},
        "conversation.tools",
    ),
    *(
        (
            {"conversation": conversation(tools=[chat_pb2.Tool(name="f", **fields)])},
            "conversation.tools",
        )
        for fields in (
            {"input": common_pb2.Grammar(json_schema="{}")},
            {"input": common_pb2.Grammar(lark="start: nothing")},
            {"input": common_pb2.Grammar(), "parameters": "{}"},
            {"input": common_pb2.Grammar(), "strict": True},
            {"parameters": '{"uniqueItems": true}', "strict": True},
        )
    ),
    ({"tool_choice": chat_pb2.ToolChoice(mode=chat_pb2.ToolChoice.MODE_REQUIRED)}, "tool_choice"),
    ({"tool_choice": chat_pb2.ToolChoice(mode=7)}, "tool_choice"),
    (
        {"tool_choice": chat_pb2.ToolChoice(names=["f"], mode=chat_pb2.ToolChoice.MODE_NONE)},
        "tool_choice",
    ),
    ({"n": 17}, "n"),
    ({"conversation": conversation(template="x")}, "conversation.template"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"sampling": {"temperature": -1}}, "sampling.temperature"),
    (
        {
            "conversation": conversation(tools=[chat_pb2.Tool(**TOOL)]),
            "sampling": {"grammar": common_pb2.Grammar(regex="(a")},
        },
        "sampling.grammar",
    ),
]


@pytest.mark.parametrize(("fields", "field"), REFUSED)
def test_what_is_wrong_is_named(stub: Any, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        chat(stub, **{"sampling": {}, **fields})
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidRequestError)
    assert error.field == field


def test_another_model_is_not_found(server: ApiServer, stub: Any) -> None:
    sampling = common_pb2.SamplingParams(max_tokens=1)
    for model in (MODEL, "other", ""):
        generate = inference_pb2.GenerateRequest(text="x", model=model, sampling=sampling)
        talk = inference_pb2.ChatRequest(
            conversation=conversation(), model=model, sampling=sampling
        )
        for call, request in ((stub.Generate, generate), (stub.Chat, talk)):
            if model == MODEL:
                assert list(call(request, timeout=60))
                continue
            with pytest.raises(grpc.RpcError) as caught:
                list(call(request, timeout=60))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            error = from_rpc_error(caught.value)
            assert isinstance(error, ModelNotFoundError)
            assert error.field == "model"
            assert f"'{MODEL}' is" in str(error)
    with Client(server.grpc_address) as client:
        assert client.complete("x", max_tokens=1, model=MODEL)
        with pytest.raises(ModelNotFoundError):
            client.complete("x", max_tokens=1, model="other")


def test_wrong_tokens_are_named(stub: Any) -> None:
    calls = [
        (lambda: stub.Tokenize(inference_pb2.TokenizeRequest()), "input"),
        (lambda: stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[10**9])), "token_ids"),
    ]
    for call, field_name in calls:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        error = from_rpc_error(caught.value)
        assert isinstance(error, InvalidRequestError)
        assert error.field == field_name
