"""The HTTP door without any engine behind it: keys, probes, and what cannot be served."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import ValidationError

from cluster.api.app import create_app
from cluster.api.chat import ChatCompletionRequest
from cluster.api.completions import CompletionRequest
from cluster.api.errors import error_response
from cluster.api.fields import StructuredOutputs
from cluster.api.tokens import DetokenizeRequest, TokenizeRequest
from cluster.chat.fields import NOT_SERVED, REFUSALS, Fields
from cluster.chat.template import CHATML, ChatFields, ChatTemplate, read_template
from cluster.chat.tool_calls import ToolCall, ToolCallReader
from cluster.chat.tools import AllowedToolsChoice, FunctionTool, Tool, ToolUse, tool_use
from cluster.engine.grammar import GrammarCompiler
from cluster.engine.vocabulary import Vocabulary
from cluster.errors import (
    ConfigError,
    DeadlineExceededError,
    InvalidRequestError,
    QueueFullError,
    ReplicaLostError,
)
from cluster.grammar import Grammar, GrammarKind
from cluster.request import Priority
from cluster.rpc.router import RouterServer
from cluster.security.api_keys import hash_key
from cluster.security.authenticator import Authenticator
from tests.test_security import entry, write_keys
from tests.test_text import small_tokenizer

MESSAGES = [{"role": "user", "content": "x"}]


@asynccontextmanager
async def door(
    authenticator: Authenticator | None = None,
    *,
    chat_template: str | None = None,
    trust: bool = False,
    **app: Any,
) -> AsyncIterator[httpx.AsyncClient]:
    router = RouterServer(
        tokenizer=small_tokenizer(),
        model_name="small",
        vocab_size=300,
        max_model_len=64,
        wait_s=0.05,
        authenticator=authenticator,
        chat_template=chat_template,
        trust_request_chat_template=trust,
    )
    transport = httpx.ASGITransport(app=create_app(router, **app), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
        yield client
    assert router.num_active_requests == 0


async def test_without_a_replica_nothing_is_ready() -> None:
    async with door() as client:
        assert (await client.get("/health")).status_code == 200
        ready = await client.get("/ready")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "replica_unavailable")
        for stream in (False, True):
            body = {"prompt": "x", "stream": stream}
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 503
            assert answer.json()["error"]["type"] == "unavailable_error"


async def test_a_model_without_a_template_has_no_chat() -> None:
    async with door() as client:
        answer = await client.post("/v1/chat/completions", json={"messages": MESSAGES})
        assert answer.status_code == 400
        assert "no chat template" in answer.json()["error"]["message"]
    async with door(chat_template="{{ messages[0].content }}") as client:
        tokens = (await client.post("/tokenize", json={"messages": MESSAGES})).json()["tokens"]
        assert small_tokenizer().decode(tokens) == "x"
        tool = {"type": "function", "function": {"name": "f"}}
        answer = await client.post(
            "/v1/chat/completions", json={"messages": MESSAGES, "tools": [tool]}
        )
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    effort = "{{ messages[0].content }}{{ reasoning_effort }}"
    async with door(chat_template=effort) as client:
        body = {"messages": MESSAGES, "reasoning_effort": "high"}
        tokens = (await client.post("/tokenize", json=body)).json()["tokens"]
        assert small_tokenizer().decode(tokens) == "xhigh"
    async with door(chat_template="{{ raise_exception('only one message') }}") as client:
        answer = await client.post("/v1/chat/completions", json={"messages": MESSAGES})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
        assert "only one message" in answer.json()["error"]["message"]


def test_chatml_is_only_for_tokenizers_without_a_template(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    fields = ChatFields.model_validate({"messages": MESSAGES})
    chatml = ChatTemplate(tokenizer, "chatml")
    assert chatml.calls_tools(fields)
    assert chatml.stop(fields) == ("<|im_end|>",)
    other = fields.model_copy(update={"chat_template": "{{ messages[0].content }}"})
    assert not chatml.calls_tools(other)
    assert chatml.stop(other) == ()
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ConfigError):
        ChatTemplate(tokenizer, "chatml")
    (tmp_path / "own.jinja").write_text(CHATML)
    assert read_template(str(tmp_path / "own.jinja")) == CHATML
    with pytest.raises(ConfigError) as caught:
        read_template(str(tmp_path / "missing.jinja"))
    assert caught.value.key == "router.chat_template"


async def test_keys_are_asked_for_where_there_are_any(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    entry = {"name": "me", "sha256": hash_key("secret"), "max_concurrent_requests": 0}
    file.write_text(yaml.safe_dump({"keys": [{**entry, "max_concurrent_requests": 1}]}))
    async with door(Authenticator(str(file))) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            calls = (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics"))
            for method, path in calls:
                answer = await client.request(method, path, headers=headers, json={"prompt": "x"})
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert answer.json()["error"]["type"] == "authentication_error"
        good = {"Authorization": "Bearer secret"}
        assert (await client.get("/v1/models", headers=good)).status_code == 200
        assert (await client.get("/health")).status_code == 200
        scrape = await client.get("/metrics", headers=good)
        assert scrape.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert 'dspark:refusals_total{model_name="small",reason="unknown_key"} 3.0' in scrape.text
        # Its limit of one request at a time holds here as well.
        answer = await client.post(
            "/v1/completions", headers=good, json={"prompt": ["x", "y"], "max_tokens": 2}
        )
        assert answer.status_code == 429


async def test_without_a_key_no_byte_of_a_body_is_read(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", entry("me", "secret"))
    open_paths = {"/health", "/ready", "/version"}
    num_read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal num_read
        num_read += 1
        yield b"{bad json"

    headers = {"Content-Type": "application/json"}
    async with door(Authenticator(keys)) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
        asked = [
            (method, path)
            for path, methods in paths.items()
            if path not in open_paths
            for method in methods
        ]
        assert len(asked) >= 8
        for method, path in asked:
            answer = await client.request(method, path, content=body(), headers=headers)
            assert answer.status_code == 401, path
            assert num_read == 0, path
        headers["Authorization"] = "Bearer secret"
        answer = await client.post("/tokenize", content=body(), headers=headers)
        assert (answer.status_code, num_read) == (400, 1)


async def test_tokens_are_held_to_the_key_s_rate(tmp_path: Path) -> None:
    limits = {"requests_per_second": 0.001}
    keys = write_keys(tmp_path / "keys.yaml", entry("a", "a", **limits), entry("b", "b", **limits))
    bodies: list[dict[str, Any]] = [{"prompt": "x"}, {"tokens": [1]}]
    async with door(Authenticator(keys)) as client:
        for key, path, body in zip("ab", ("/tokenize", "/detokenize"), bodies, strict=True):
            headers = {"Authorization": f"Bearer {key}"}
            for status in (200, 429):
                answer = await client.post(path, headers=headers, json=body)
                assert answer.status_code == status, path
            assert int(answer.headers["Retry-After"]) > 900


def test_of_very_many_errors_few_are_looked_for() -> None:
    """Each would cost time of the event loop, and memory."""
    many = 20_000
    cases: list[tuple[type[Fields], dict[str, Any]]] = [
        (CompletionRequest, {"prompt": [[None] * many]}),
        (CompletionRequest, {"prompt": [[None]] * many}),
        (CompletionRequest, {"prompt": [None] * many}),
        (CompletionRequest, {"prompt": [1] + [None] * many}),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": [None] * many}),
        (CompletionRequest, {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(many)))}),
        (CompletionRequest, {"prompt": "x", "bad_words": [None] * many}),
        (CompletionRequest, {"prompt": "x", "stop": [None] * many}),
        (ChatCompletionRequest, {"messages": [None] * many}),
        (ChatCompletionRequest, {"messages": MESSAGES, "tools": [None] * many}),
        (TokenizeRequest, {"messages": [None] * many}),
        (DetokenizeRequest, {"tokens": [None] * many}),
    ]
    for fields, body in cases:
        with pytest.raises(ValidationError) as caught:
            fields.model_validate(body)
        assert caught.value.error_count() < 10, body.keys()


async def test_a_body_of_very_many_fields_is_refused() -> None:
    async with door() as client:
        answer = await client.post("/tokenize", json={f"a{i}": 1 for i in range(300)})
        assert answer.status_code == 400
        assert "has 300 fields" in answer.json()["error"]["message"]
        answer = await client.post("/v1/completions", json={"prompt": [[1]] * 257})
        error = answer.json()["error"]
        assert (error["param"], error["message"]) == (
            "prompt",
            "prompt: at most 256 prompts in one request",
        )


async def test_a_body_is_read_no_further_than_it_may_be() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"x" * 100

    async with door(max_body_bytes=1000) as client:
        for content in (b"x" * 1001, pieces()):  # announced, and not
            answer = await client.post("/v1/completions", content=content)
            assert answer.status_code == 413
            assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("spelling", ["escaped", "raw", "utf-16"])
async def test_a_lone_surrogate_is_no_text(spelling: str) -> None:
    """JSON can write one, UTF-8 and so a tokenizer cannot; a pair of them is one character."""
    half, emoji = "\ud83d", "\N{GRINNING FACE}"

    def encoded(body: Any) -> bytes:
        text = json.dumps(body, ensure_ascii=spelling == "escaped")
        return text.encode("utf-16" if spelling == "utf-16" else "utf-8", "surrogatepass")

    message = {"role": "user", "content": [{"type": "text", "text": half}]}
    tool = {"type": "function", "function": {"name": "f", "parameters": {half: {}}}}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/completions", {"prompt": half}, "prompt"),
        ("/v1/completions", {"prompt": ["x", half + "y" * 5000]}, "prompt"),
        ("/v1/completions", {"prompt": "x", "model": half}, "model"),
        ("/v1/completions", {"prompt": "x", "stop": [half]}, "stop"),
        ("/v1/completions", {"prompt": "x", "bad_words": [half]}, "bad_words"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {half: 1}}, "logit_bias"),
        ("/v1/completions", {"prompt": "x", half: 1}, "\\ud83d"),
        ("/v1/chat/completions", {"messages": [message]}, "messages"),
        ("/v1/chat/completions", {"messages": MESSAGES, "tools": [tool]}, "tools"),
        ("/tokenize", {"prompt": half}, "prompt"),
        ("/detokenize", {"tokens": [1], "model": half}, "model"),
    ]
    json_type = {"Content-Type": "application/json"}
    async with door(chat_template="chatml") as client:
        for path, body, field in cases:
            answer = await client.post(path, content=encoded(body), headers=json_type)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, field), (body, error)
            assert "not valid Unicode text" in error["message"]
        content = encoded({"prompt": emoji})
        answer = await client.post("/tokenize", content=content, headers=json_type)
        assert small_tokenizer().decode(answer.json()["tokens"]) == emoji
        # A text that holds JSON is not looked into, and what comes of it is.
        call = {"type": "function", "function": {"name": "f", "arguments": '{"a": "\\ud83d"}'}}
        spoken = [*MESSAGES, {"role": "assistant", "tool_calls": [{"id": "1", **call}]}]
        answer = await client.post("/tokenize", json={"messages": spoken})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


async def test_a_body_is_a_json_object_and_says_so() -> None:
    cases = [
        (b"", "application/json", 400, "empty"),
        (b"{", "application/json", 400, "not JSON"),
        (b"[1]", "application/json", 400, "not a JSON object"),
        (b'"x"', "application/json; charset=utf-8", 400, "not a JSON object"),
        (b'{"prompt": "x"}', "text/plain", 415, "text/plain"),
        (b'{"prompt": "x"}', "application/x-www-form-urlencoded", 415, "Content-Type"),
        (b'{"prompt": "x"}', None, 415, "Content-Type"),
    ]
    async with door() as client:
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            for content, kind, status, words in cases:
                headers = {} if kind is None else {"Content-Type": kind}
                answer = await client.post(path, content=content, headers=headers)
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (status, None), (content, kind)
                assert words in error["message"]
                assert error["type"] == "invalid_request_error"
                assert not error["message"].startswith(":")
        problem = {"Content-Type": "application/vnd.mine+json; charset=utf-8"}
        content = b'{"prompt": "x"}'
        assert (await client.post("/tokenize", content=content, headers=problem)).is_success


async def test_what_is_nested_too_deeply_is_refused() -> None:
    """At any depth: some can be parsed and not be rendered, or not be written into a grammar."""
    async with door(chat_template=CHATML + "{{ mood | default(0) | tojson }}") as client:
        for depth in (*range(300, 900, 100), *range(900, 1000, 5), 100_000):
            deep = '{"a":' * depth + "1" + "}" * depth
            call = {"id": "1", "function": {"name": "f", "arguments": deep}}
            spoken = json.dumps([{"role": "assistant", "tool_calls": [call]}])
            tool = f'{{"type": "function", "function": {{"name": "f", "parameters": {deep}}}}}'
            for fields in (
                f'"messages": {spoken}',
                f'"messages": {json.dumps(MESSAGES)}, "tools": [{tool}]',
                f'"messages": {json.dumps(MESSAGES)}, "chat_template_kwargs": {{"mood": {deep}}}',
            ):
                answer = await client.post(
                    "/v1/chat/completions",
                    content=f"{{{fields}}}",
                    headers={"Content-Type": "application/json"},
                )
                assert answer.status_code in (400, 503), (depth, fields[:60], answer.text)


async def test_lists_of_tokens_have_a_length_each() -> None:
    """Not more than is documented, and so much is taken: then only a replica is missing."""
    body = {"prompt": "x", "max_tokens": 2}
    long: list[tuple[str, int, Any]] = [
        ("stop_token_ids", 1024, lambda n: [1] * n),
        ("logit_bias", 300, lambda n: {str(i): 1 for i in range(n)}),  # each token of the model
        ("allowed_token_ids", 300, lambda n: [1] * n),
    ]
    async with door() as client:
        for name, most, make in long:
            answer = await client.post("/v1/completions", json={**body, name: make(most)})
            assert answer.status_code == 503, answer.text
            answer = await client.post("/v1/completions", json={**body, name: make(2000)})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, name)
            assert error["message"].endswith("got 2000")


async def test_an_unknown_field_is_told_where_it_belongs() -> None:
    chat, completion = {"messages": MESSAGES}, {"prompt": "x"}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/chat/completions", {**chat, "echo": True}, "it belongs to /v1/completions"),
        ("/v1/chat/completions", {**chat, "best_of": 2}, "it belongs to /v1/completions"),
        (
            "/v1/completions",
            {**completion, "messages": MESSAGES},
            "it belongs to /v1/chat/completions and /tokenize",
        ),
        ("/v1/completions", {**completion, "temprature": 1}, "did you mean 'temperature'?"),
        ("/v1/chat/completions", {**chat, "tool": []}, "did you mean 'tools'?"),
        ("/tokenize", {**completion, "temperature": 1}, "it belongs to /v1/completions and"),
        ("/detokenize", {"tokens": [1], "token": 1}, "did you mean 'tokens'?"),
    ]
    async with door() as client:
        for path, body, words in cases:
            answer = await client.post(path, json=body)
            (name,) = body.keys() - {"messages", "prompt", "tokens"} or {"messages"}
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, name)
            assert words in error["message"]
            assert f"'{name}'" not in error["message"]


TOOL = {"type": "function", "function": {"name": "f"}}
CALL_BEFORE = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALL_WITHOUT_ARGUMENTS = {"id": "1", "function": {"name": "f", "arguments": ""}}
SCHEMA_FORMAT = {"name": "x", "schema": {"type": "object"}}
# Messages without what their role needs.
INCOMPLETE: list[dict[str, Any]] = [
    {"role": "user"},
    {"role": "user", "content": None},
    {"role": "system", "name": "me"},
    {"role": "developer"},
    {"role": "assistant"},
    {"role": "assistant", "content": None, "tool_calls": []},
    {"role": "tool", "content": "x"},
    {"role": "tool", "tool_call_id": "1"},
    {"role": "function", "content": "x"},
]
NOT_IGNORED: list[tuple[str, dict[str, Any], str]] = [
    # What needs something that is not there.
    ("/v1/chat/completions", {"tools": [TOOL], "function_call": "none"}, "function_call"),
    ("/v1/chat/completions", {"function_call": "auto"}, "function_call"),
    (
        "/v1/chat/completions",
        {"functions": [{"name": "f"}], "parallel_tool_calls": True},
        "parallel_tool_calls",
    ),
    ("/tokenize", {"prompt": "x", "tools": [TOOL]}, "tools"),
    ("/tokenize", {"prompt": "x", "chat_template_kwargs": {"mood": 1}}, "chat_template_kwargs"),
    ("/tokenize", {"prompt": "x", "reasoning_effort": "high"}, "reasoning_effort"),
    ("/tokenize", {"prompt": "x", "continue_final_message": True}, "continue_final_message"),
    ("/tokenize", {"prompt": "x", "add_generation_prompt": False}, "add_generation_prompt"),
    (
        "/v1/completions",
        {"response_format": {"type": "text", "json_schema": SCHEMA_FORMAT}},
        "response_format",
    ),
    (
        "/v1/completions",
        {"response_format": {"type": "json_object", "json_schema": SCHEMA_FORMAT}},
        "response_format",
    ),
    # Lists that hold nothing and do not mean everything.
    ("/v1/completions", {"allowed_token_ids": []}, "allowed_token_ids"),
    (
        "/v1/completions",
        {"structured_outputs": {"choice": [], "regex": "a"}},
        "structured_outputs",
    ),
    # Names that are taken on the outside, and not within.
    ("/v1/completions", {"stream": True, "stream_options": {"user": "me"}}, "stream_options"),
    ("/v1/completions", {"structured_outputs": {"regex": "a", "store": 0}}, "structured_outputs"),
    ("/v1/chat/completions", {"messages": [{**MESSAGES[0], "metadata": 5}]}, "messages"),
    ("/v1/chat/completions", {"messages": [{**MESSAGES[0], "annotations": [1]}]}, "messages"),
    ("/v1/chat/completions", {"annotations": []}, "annotations"),
    ("/tokenize", {"prompt": "x", "user": "me"}, "user"),
    # Variables that the template would not be told, or does not ask for.
    *(
        ("/v1/chat/completions", {"chat_template_kwargs": {name: value}}, "chat_template_kwargs")
        for name, value in {
            "add_generation_prompt": False,
            "continue_final_message": True,
            "conversations": [],
            "enable_thinking": False,
            "max_length": 3,
            "messages": [],
            "padding": True,
            "reasoning_effort": "high",
            "return_dict": True,
            "return_tensors": "pt",
            "self": 1,
            "tools": [],
            "truncation": True,
        }.items()
    ),
    *(
        ("/v1/chat/completions", {"messages": [*MESSAGES, message]}, "messages")
        for message in INCOMPLETE
    ),
]


async def test_an_error_tells_of_what_was_meant() -> None:
    """Of a value that may be of several kinds, by its place in the body."""
    image = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}]
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/completions", {"prompt": [1, "x"]}, "prompt: Input should be a valid integer (at p"),
        ("/v1/completions", {"prompt": 5}, "prompt: Input should be a valid string; or: Input sh"),
        ("/v1/completions", {"priority": "high"}, "priority: Input should be 'interactive', 'de"),
        ("/v1/chat/completions", {"tool_choice": "f"}, "tool_choice: Input should be 'none', 'au"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": image}]},
            "messages: a part of type 'image_url' is not served: text only (at messages.0.conten",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages: Field required (at messages.0.content.0.text)",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
            "messages: Field required (at messages.0.tool_calls.0.function.arguments)",
        ),
        (
            "/v1/chat/completions",
            {"tool_choice": {"type": "function", "name": "f"}},
            "tool_choice: Field required (at tool_choice.function)",
        ),
        (
            "/v1/chat/completions",
            {"tools": [{"type": "function", "function": {}}]},
            "tools: Field required (at tools.0.function.name)",
        ),
    ]
    async with door(chat_template="chatml") as client:
        for path, fields, message in cases:
            base = {"messages": MESSAGES} if "chat" in path else {"prompt": "x"}
            answer = await client.post(path, json=base | fields)
            error = answer.json()["error"]
            assert error["message"].startswith(message), error
            assert "tagged-union" not in error["message"]
            assert "literal[" not in error["message"]


async def test_a_prompt_beyond_the_context_is_told_as_gateways_know_it() -> None:
    """Which then try a model with a longer one."""
    async with door(chat_template="chatml") as client:
        for text in ("x " * 64, "x" * 100_000):
            for path, field, prompt in (
                ("/v1/completions", "prompt", text),
                ("/v1/chat/completions", "messages", [{"role": "user", "content": text}]),
            ):
                answer = await client.post(path, json={field: prompt})
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (400, field)
                assert error["code"] == "context_length_exceeded"
                assert "this model's maximum context length is 64 tokens" in error["message"]


async def test_nothing_is_ignored() -> None:
    bases: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "x"},
        "/v1/chat/completions": {"messages": MESSAGES},
        "/tokenize": {},
    }
    async with door(chat_template="{{ messages[0].content }}{{ mood }}{{ max_length }}") as client:
        for path, fields, param in NOT_IGNORED:
            answer = await client.post(path, json={**bases[path], **fields})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, param), (fields, error)
            assert "multiple values" not in error["message"]


async def test_what_asks_for_nothing_within_is_taken() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "x", "prompt_cache_breakpoint": {}}]},
        {"role": "assistant", "content": "", "annotations": []},
        {"role": "assistant", "content": None, "tool_calls": [CALL_BEFORE]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "tool_calls": [CALL_WITHOUT_ARGUMENTS]},
        {"role": "function", "content": None, "name": "f"},
    ]
    template = (
        "{% generation %}{{ messages[0].content }}{{ mood | default('') }}{% endgeneration %}"
    )
    body = {"messages": messages, "chat_template_kwargs": {"mood": "y"}}
    async with door(chat_template=template) as client:
        answer = await client.post("/tokenize", json=body)
        assert small_tokenizer().decode(answer.json()["tokens"]) == "xy"
        plain = {"prompt": "x", "add_generation_prompt": True, "tools": [], "messages": []}
        assert (await client.post("/tokenize", json=plain)).is_success


async def test_a_template_of_a_request_needs_trust() -> None:
    body: dict[str, Any] = {
        "messages": MESSAGES,
        "chat_template": "{{ messages[0].content }}{{ y }}",
    }
    kwargs = {"chat_template_kwargs": {"y": "z"}}
    paths = ("/v1/chat/completions", "/tokenize")
    async with door(chat_template="chatml") as client:
        for path in paths:
            answer = await client.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template")
    async with door(trust=True) as client:  # the tokenizer has none
        answer = await client.post("/tokenize", json={**body, **kwargs})
        assert small_tokenizer().decode(answer.json()["tokens"]) == "xz"
        for wrong in (
            "{{",
            "{{ messages.__class__.__mro__ }}",
            "{% for x in range(10**9) %}{% endfor %}",
            "{{ messages[-1e999] }}",  # Jinja makes a name of it that there is not (fuzzed)
        ):
            answer = await client.post(
                "/v1/chat/completions", json={**body, "chat_template": wrong}
            )
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template")
        for path in paths:
            answer = await client.post(path, json={"messages": MESSAGES})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


async def test_a_minimum_beyond_the_context_says_so() -> None:
    async with door() as client:
        body = {"prompt": list(range(1, 42)), "min_tokens": 40, "max_tokens": 500}
        error = (await client.post("/v1/completions", json=body)).json()["error"]
        assert error["param"] == "min_tokens"
        assert "the model's context has 64 tokens and the prompt 41" in error["message"]
        body = {"prompt": "x", "min_tokens": 9, "max_tokens": 8}
        error = (await client.post("/v1/completions", json=body)).json()["error"]
        assert "between 0 and max_tokens (8)" in error["message"]


async def test_no_page_loads_anything_from_elsewhere() -> None:
    async with door() as client:
        for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
            assert (await client.get(path)).status_code == 404
        assert (await client.get("/openapi.json")).is_success


@pytest.mark.parametrize(
    ("request_fields", "params"),
    [(CompletionRequest, completion_create_params), (ChatCompletionRequest, chat_create_params)],
)
def test_every_field_of_the_official_client_is_known(request_fields: Any, params: Any) -> None:
    """It is served, or changes no output, or is refused with words of its own."""
    names = {
        *typing.get_type_hints(params.CompletionCreateParamsBase),
        *typing.get_type_hints(params.CompletionCreateParamsStreaming),
    }
    assert len(names) > 15
    for name in names - request_fields.model_fields.keys():
        try:
            request_fields.model_validate({"messages": MESSAGES, "prompt": "x", name: object()})
        except ValidationError as error:
            extra = {str(e["loc"][0]) for e in error.errors() if e["type"] == "extra_forbidden"}
            assert name not in extra or name in REFUSALS, name


def test_the_documentation_lists_what_is_refused() -> None:
    text = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    table = text.split("Refused by name are")[1].split("\n\n")[1]
    named = {
        name for row in table.splitlines() for name in re.findall(r"`(\w+)[`:]", row.split("|")[1])
    }
    values = {"messages", "text", "auto", "default", "medium"}
    assert named - values == {*NOT_SERVED, "chat_template"}


def test_priorities_are_names_or_vllm_s_numbers() -> None:
    wanted = {"interactive": 1, "default": 2, "batch": 3, -7: 1, 0: 2, 4: 3}
    for given, priority in wanted.items():
        fields = CompletionRequest.model_validate({"prompt": "x", "priority": given})
        assert fields.to_priority() == Priority(priority)
    for wrong in ("urgent", 1.5, True):
        with pytest.raises(ValidationError):
            CompletionRequest.model_validate({"prompt": "x", "priority": wrong})


def test_errors_have_statuses_and_tell_nothing_of_prompts() -> None:
    full = error_response(QueueFullError("full", 2.3))
    assert (full.status_code, full.headers["Retry-After"]) == (429, "3")
    assert error_response(ReplicaLostError("gone")).status_code == 503
    assert error_response(DeadlineExceededError("late")).status_code == 504
    internal = error_response(ValueError("a secret prompt"))
    assert internal.status_code == 500
    assert b"secret" not in bytes(internal.body)


# -------------------------------------------------------------------------------------- tool calls

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_read_however_their_text_comes(size: int) -> None:
    text = f"Well, 1 < 2. {CALL}\n{CALL} bye <tool_call>{{no}}</tool_call> <tool_"
    reader = ToolCallReader()
    parts: list[str | ToolCall] = []
    for start in range(0, len(text), size):
        parts += reader.push(text[start : start + size])
    parts += reader.finish()
    calls = [part for part in parts if isinstance(part, ToolCall)]
    assert [(call.name, call.arguments) for call in calls] == [("f", '{"a": 1}')] * 2
    assert len({call.id for call in calls}) == 2
    content = "".join(part for part in parts if isinstance(part, str))
    assert content == "Well, 1 < 2.  bye <tool_call>{no}</tool_call> <tool_"


@pytest.mark.parametrize(
    ("must_call", "may_repeat", "good", "bad"),
    [
        (True, True, [CALL, f"{CALL}\n{CALL}"], ["hi", f"{CALL} hi", CALL.replace('"f"', '"h"')]),
        (True, False, [CALL], [f"{CALL}\n{CALL}"]),
        (
            False,
            True,
            ["hi", "", f"hi {CALL}", f"{CALL}\n{CALL}", "a <tool b", f"{CALL} bye"],
            ["a <tool_call> b", CALL.replace('"a"', '"b"'), CALL.replace("1", '"x"')],
        ),
        (False, False, ["hi", f"hi {CALL}"], [f"{CALL}\n{CALL}"]),
    ],
)
def test_the_grammar_of_calls(
    must_call: bool, may_repeat: bool, good: list[str], bad: list[str]
) -> None:
    functions = [FunctionTool(name="f", parameters=SCHEMA), FunctionTool(name="g")]
    grammar = ToolUse(functions, must_call=must_call, may_repeat=may_repeat).to_grammar()
    tokenizer = small_tokenizer()
    end = tokenizer.eos_token_id
    compiler = GrammarCompiler(Vocabulary(tokenizer, 300, (end,)), has_end=True)
    for text in good:
        assert compiler.compile(grammar).accept([*tokenizer.encode(text), end]), text
    for text in bad:
        assert not compiler.compile(grammar).accept([*tokenizer.encode(text), end]), text


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("end", ["", "<eos>", None])
@pytest.mark.parametrize("tail", ["", "\n</tool_call>"])
def test_a_text_goes_up_to_the_answer_s_end(size: int, end: str | None, tail: str) -> None:
    """Whatever it holds; where the answer is not whole, it is content."""
    given = 'a </tool_call>\n<tool_call>\n{"b'
    text = f'{CALL}\n<tool_call>\n{{"name": "run"}}\n{given}{tail}{end or ""}'
    reader = ToolCallReader({"run"})
    parts: list[str | ToolCall] = []
    for start in range(0, len(text), size):
        parts += reader.push(text[start : start + size])
    parts += reader.finish(end)
    calls = [part for part in parts if isinstance(part, ToolCall)]
    content = "".join(part for part in parts if isinstance(part, str))
    assert [call.name for call in calls] == ["f"] + ["run"] * (end is not None)
    if end is None:
        assert content == text.removeprefix(CALL + "\n")
    else:
        assert json.loads(calls[1].arguments) == {"input": given}
        assert content == end


def test_what_cannot_be_enforced_is_left_to_the_model_unless_the_tool_is_strict() -> None:
    """As many tools' schemas hold it; what can be is enforced."""
    words = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    either = {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 1}]}
    properties = {"a": {"type": "integer", "format": "odd"}, "words": words, "either": either}
    schema = {"type": "object", "properties": properties, "not": {"required": ["b"]}}
    tokenizer = small_tokenizer()
    end = tokenizer.eos_token_id
    compiler = GrammarCompiler(Vocabulary(tokenizer, 300, (end,)), has_end=True)

    def grammar(**fields: Any) -> Grammar:
        function = FunctionTool(name="f", parameters=schema, **fields)
        return ToolUse([function], must_call=True, may_repeat=False).to_grammar()

    for fields in ({}, {"strict": False}):
        for arguments, fits in (
            ('{"a": 1, "words": ["x", "x"], "either": "y"}', True),
            ('{"a": "1"}', False),
            ('{"words": [1]}', False),
        ):
            text = CALL.replace('{"a": 1}', arguments)
            tokens = [*tokenizer.encode(text), end]
            assert compiler.compile(grammar(**fields)).accept(tokens) == fits, arguments
    with pytest.raises(InvalidRequestError):
        compiler.compile(grammar(strict=True))


TEXT = '<tool_call>\n{"name": "run"}\na+a'
END_OF_CALL = "\n</tool_call>"


@pytest.mark.parametrize(
    ("names", "must_call", "may_repeat", "good", "bad"),
    [
        (
            "f run",
            True,
            True,
            [CALL, TEXT, TEXT + END_OF_CALL, f"{CALL}\n{CALL}", f"{CALL}\n{TEXT}"],
            ["", "hi", TEXT[:-1], f"{TEXT}{END_OF_CALL}\n{CALL}", TEXT.replace("a+a", "b")],
        ),
        ("f run", True, False, [CALL, TEXT], [f"{CALL}\n{TEXT}"]),
        ("run", True, True, [TEXT], [CALL, "", f"{TEXT}{END_OF_CALL}\n{TEXT}"]),
        ("f run", False, True, ["", "hi", f"hi {TEXT}", f"{CALL} {TEXT}"], [f"{TEXT} hi"]),
        ("f run", False, False, ["", f"hi {TEXT}", f"hi {CALL}"], [f"{CALL}{TEXT}"]),
        ("run", False, True, ["", "hi", f"hi {TEXT}"], [CALL, f"hi {CALL}", f"{TEXT} hi"]),
    ],
)
def test_the_grammar_of_calls_with_a_text(
    names: str, must_call: bool, may_repeat: bool, good: list[str], bad: list[str]
) -> None:
    grammar = ToolUse(
        [FunctionTool(name=name, parameters=SCHEMA) for name in names.split()],
        must_call=must_call,
        may_repeat=may_repeat,
        text_grammars={"run": 'start: call ("+" call)*  // the same name as outside\ncall: "a"'},
    ).to_grammar()
    tokenizer = small_tokenizer()
    end = tokenizer.eos_token_id
    compiler = GrammarCompiler(Vocabulary(tokenizer, 300, (end,)), has_end=True)
    for text in good:
        assert compiler.compile(grammar).accept([*tokenizer.encode(text), end]), text
    for text in bad:
        assert not compiler.compile(grammar).accept([*tokenizer.encode(text), end]), text


ITEM = '{"x": "<tool_call>"}'


@pytest.mark.parametrize(
    ("content", "good", "bad"),
    [
        (
            Grammar(GrammarKind.JSON_SCHEMA, '{"properties": {"x": {}}, "required": ["x"]}'),
            [ITEM, CALL, f"{CALL}\n{CALL}", f"{CALL}\n{TEXT}", TEXT],
            ["", "hi", "{}", ITEM + CALL, CALL + ITEM, CALL.replace('"a"', '"b"')],
        ),
        (Grammar(GrammarKind.REGEX, "a/[bc]|d"), ["a/b", "d", CALL], ["", "ab", f"d{CALL}"]),
        (
            Grammar(GrammarKind.LARK, 'start: "call" "x"\n%ignore / +/'),
            ["call  x", CALL, TEXT],
            ["call", f"{CALL} x", "call xx"],
        ),
    ],
)
def test_an_answer_is_calls_or_what_it_must_be_without(
    content: Grammar, good: list[str], bad: list[str]
) -> None:
    functions = [FunctionTool(name=name, parameters=SCHEMA) for name in ("f", "run")]
    use = ToolUse(functions, False, True, {"run": 'start: "a+a"'}, content)
    tokenizer = small_tokenizer()
    end = tokenizer.eos_token_id
    compiler = GrammarCompiler(Vocabulary(tokenizer, 300, (end,)), has_end=True)
    for text in good:
        assert compiler.compile(use.to_grammar()).accept([*tokenizer.encode(text), end]), text
        for size in (1, 3, 1000):
            reader = use.reader()
            parts: list[str | ToolCall] = []
            for start in range(0, len(text), size):
                parts += reader.push(text[start : start + size])
            parts += reader.finish("")
            read = "".join(part for part in parts if isinstance(part, str))
            assert read == ("" if text.startswith("<tool_call>") else text)
    for text in bad:
        assert not compiler.compile(use.to_grammar()).accept([*tokenizer.encode(text), end]), text
    must = replace(use, must_call=True)
    assert must.to_grammar() == replace(must, content=None).to_grammar()


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_some_of_the_tools_may_be_called(mode: str) -> None:
    def named(name: str) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name}}

    tools = [Tool.model_validate(named(name)) for name in "fgh"]
    allowed = {"mode": mode, "tools": [named("h"), named("f")]}
    choice = AllowedToolsChoice.model_validate({"type": "allowed_tools", "allowed_tools": allowed})
    use = tool_use(tools, choice, may_repeat=True)
    assert use is not None
    assert [function.name for function in use.functions] == ["f", "h"]
    assert (use.must_call, use.may_repeat) == (mode == "required", True)


def test_choices_are_taken_literally() -> None:
    tokenizer = small_tokenizer()
    end = tokenizer.eos_token_id
    compiler = GrammarCompiler(Vocabulary(tokenizer, 300, (end,)), has_end=True)
    choices = ['a "b"\\n', "é\n", "x|y"]
    grammar = StructuredOutputs(choice=choices).to_grammar()
    for text in choices:
        assert compiler.compile(grammar).accept([*tokenizer.encode(text), end]), text
    assert not compiler.compile(grammar).accept([*tokenizer.encode("x"), end])
    with pytest.raises(InvalidRequestError):
        StructuredOutputs(choice=[]).to_grammar()
