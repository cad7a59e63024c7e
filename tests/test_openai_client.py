"""The official OpenAI client, unchanged, against our HTTP door, with and without speculation."""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from statistics import fmean
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.api_tools import ApiServer, serving
from tests.engine_tools import make_config
from tests.models import DRAFTER, TARGET

pytestmark = pytest.mark.timeout(300)

MODEL = "stdlib-7m"
PROMPT = "def read_json(path):\n    "
MESSAGES: list[Any] = [{"role": "user", "content": "Write a function that reads a file."}]
GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 11}
# Both of a kind are much the same to the code; each is there with --run-slow.
ONE_FAST = [
    pytest.param(SEEDED, id="seeded"),
    pytest.param(GREEDY, id="greedy", marks=pytest.mark.slow),
]
MAX_QUEUED_TOKENS = 6000
CITY_TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Rome", "Oslo"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
CLOCK_TOOL: Any = {"type": "function", "function": {"name": "get_time"}}
SET_SCHEMA = {"type": "array", "uniqueItems": True}


class Person(BaseModel):
    role: Literal["admin", "user"]
    active: bool


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    config = make_config(TARGET, DRAFTER, max_model_len=512, max_num_seqs=16)
    limits = {"max_queued_tokens": MAX_QUEUED_TOKENS}
    with serving(config, router=limits, chat_template="chatml") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ApiServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client: OpenAI, prompt: Any = PROMPT, **fields: Any) -> Any:
    extra = {name: fields.pop(name) for name in EXTENSIONS if name in fields}
    return client.completions.create(
        model=MODEL, prompt=prompt, extra_body=extra or None, **{"max_tokens": 12, **fields}
    )


EXTENSIONS = (
    "prompt_logprobs",
    "allowed_token_ids",
    "bad_words",
    "ignore_eos",
    "include_stop_str_in_output",
    "min_p",
    "min_tokens",
    "num_speculative_tokens",
    "repetition_penalty",
    "return_speculation_stats",
    "return_token_ids",
    "return_token_sources",
    "return_tokens_as_token_ids",
    "skip_special_tokens",
    "speculation",
    "stop_token_ids",
    "structured_outputs",
    "timeout_seconds",
    "top_k",
    "truncate_prompt_tokens",
)


def post(server: ApiServer, path: str, body: Any) -> tuple[int, Any, dict[str, str]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        server.url + path, data, {"Content-Type": "application/json"}, method="POST"
    )
    return send(request)


def send(request: urllib.request.Request | str) -> tuple[int, Any, dict[str, str]]:
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
            return answer.status, json.loads(text) if text else None, dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), dict(error.headers)


# ----------------------------------------------------------------- on and off, feature by feature

GRAMMAR = "([a-c]{2}-[0-9]{3} ){4}"
FEATURES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "seed": SEEDED,
    "penalties": {
        **SEEDED,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.9,
        "repetition_penalty": 1.2,
    },
    "logprobs": {**GREEDY, "logprobs": 3},
    "grammar": {**SEEDED, "structured_outputs": {"regex": GRAMMAR}, "max_tokens": 40},
    "grammar_ignoring_eos": {
        **SEEDED,
        "structured_outputs": {"regex": "[a-c]{2}-[0-9]{3} "},
        "ignore_eos": True,
        "max_tokens": 40,
    },
    "stop": {**GREEDY, "stop": ["(", "\n"]},
    "n": {**SEEDED, "n": 3},
    "min_p": {**SEEDED, "min_p": 0.2},
    "logit_bias": {**SEEDED, "logit_bias": {"357": 4.0, "5": -100}},
    "top_k": {**SEEDED, "top_k": 5, "top_p": 0.9},
    "min_tokens": {**GREEDY, "min_tokens": 8, "stop_token_ids": [220]},
    "allowed_token_ids": {**SEEDED, "allowed_token_ids": list(range(300, 900))},
    "bad_words": {**SEEDED, "bad_words": ["return", "self", "self."]},
    "whole_text": {
        **GREEDY,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "stop": ["(", "\n"],
    },
}
MATRIX = [
    *(pytest.param(feature, fields, id=feature) for feature, fields in FEATURES.items()),
    # The greedy ones seeded, and the other way round.
    *(
        pytest.param(
            feature,
            {**fields, **(SEEDED if fields["temperature"] == 0 else GREEDY)},
            id=f"{feature}-other",
            marks=pytest.mark.slow,
        )
        for feature, fields in FEATURES.items()
        if feature not in ("greedy", "seed")
    ),
]


@pytest.mark.parametrize(("feature", "fields"), MATRIX)
def test_speculation_changes_no_answer(
    client: OpenAI, feature: str, fields: dict[str, Any]
) -> None:
    answers = {}
    for mode in ("auto", "off"):
        answer = complete(
            client,
            speculation=mode,
            return_token_ids=True,
            return_speculation_stats=True,
            **fields,
        )
        assert len(answer.choices) == fields.get("n", 1)
        answers[mode] = answer
    on, off = answers["auto"], answers["off"]
    assert off.usage.speculation["num_draft_tokens"] == 0
    assert on.usage.speculation["num_draft_tokens"] > 0
    assert on.usage.completion_tokens == off.usage.completion_tokens
    for mine, theirs in zip(on.choices, off.choices, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert (mine.text, mine.finish_reason) == (theirs.text, theirs.finish_reason)
        if feature == "logprobs":
            assert mine.logprobs.tokens == theirs.logprobs.tokens
            assert mine.logprobs.token_logprobs == pytest.approx(
                theirs.logprobs.token_logprobs, abs=1e-4
            )


@pytest.mark.slow
def test_features_do_what_they_say(client: OpenAI) -> None:
    base = complete(client, **GREEDY).choices[0].text
    assert complete(client, temperature=1.0, min_p=1.0).choices[0].text == base
    assert complete(client, temperature=1.0, top_k=1).choices[0].text == base
    assert complete(client, temperature=1.0, top_p=1e-6).choices[0].text == base
    assert (
        complete(client, **FEATURES["penalties"]).choices[0].text
        != complete(client, **SEEDED).choices[0].text
    )
    stopped = complete(client, **GREEDY, stop="(").choices[0]
    assert (stopped.text, stopped.finish_reason) == (base.split("(")[0], "stop")
    biased = complete(client, **GREEDY, logit_bias={"95": 100}, max_tokens=3).choices[0]
    assert biased.text == "}}}"
    many = complete(client, **SEEDED, n=4).choices
    assert [choice.index for choice in many] == [0, 1, 2, 3]
    assert len({choice.text for choice in many}) > 1
    matched = complete(client, **FEATURES["grammar"]).choices[0]
    assert re.fullmatch(GRAMMAR, matched.text)
    assert matched.finish_reason == "stop"
    beyond = complete(client, **FEATURES["grammar_ignoring_eos"], return_token_ids=True).choices[0]
    assert re.match("[a-c]{2}-[0-9]{3} ", beyond.text)
    assert (len(beyond.token_ids), beyond.finish_reason) == (40, "length")
    short = complete(client, **GREEDY, max_tokens=2)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 2
    assert short.usage.total_tokens == short.usage.prompt_tokens + 2


def test_what_an_answer_may_hold(client: OpenAI) -> None:
    """Tokens, words, its end and special tokens; the model's own answer is the base."""
    base = complete(client, **GREEDY, return_token_ids=True).choices[0]
    word = next(word for word in re.findall(r"[a-z]{2,}", base.text))
    without = complete(client, **GREEDY, bad_words=[word], max_tokens=64).choices[0].text
    assert not re.search(rf"(^|[ \W]){word}\b", without)
    ids = sorted(set(base.token_ids))[:3]
    only = complete(
        client,
        **SEEDED,
        allowed_token_ids=ids,
        return_token_ids=True,
        return_speculation_stats=True,
    )
    assert set(only.choices[0].token_ids) <= set(ids)
    assert len(only.choices[0].token_ids) == 12  # no end among them
    for included in (False, True):
        choice = complete(
            client, **GREEDY, stop=[word], include_stop_str_in_output=included
        ).choices[0]
        assert choice.finish_reason == "stop"
        assert choice.text == base.text[: base.text.index(word) + included * len(word)]
    ended: dict[str, Any] = {**GREEDY, "structured_outputs": {"choice": ["yes"]}}
    assert complete(client, **ended).choices[0].text == "yes"
    whole = complete(client, **ended, skip_special_tokens=False).choices[0].text
    assert re.fullmatch(r"yes<\|?[a-z_]+\|?>", whole)


def test_log_probabilities_are_the_target_s(client: OpenAI) -> None:
    choice = complete(client, **GREEDY, logprobs=2).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    for index, (token, value) in enumerate(
        zip(logprobs.tokens, logprobs.token_logprobs, strict=True)
    ):
        assert value <= 0
        top = logprobs.top_logprobs[index]
        assert len(top) == 2
        assert max(top, key=top.get) == token  # greedy takes the best
        assert choice.text[logprobs.text_offset[index] :].startswith(token)
    biased = complete(client, **GREEDY, logprobs=1, logit_bias={"95": 100}, max_tokens=1).choices[0]
    assert biased.logprobs.token_logprobs[0] < -1  # before bias and temperature


# -------------------------------------------------------------------------------------- prompts


@pytest.mark.slow
def test_every_kind_of_prompt(server: ApiServer, client: OpenAI) -> None:
    texts = [PROMPT, "import os\n"]
    token_ids = [post(server, "/tokenize", {"prompt": text})[1]["tokens"] for text in texts]
    one = [complete(client, text, **SEEDED, n=2).choices for text in texts]
    expected = [choice.text for choices in one for choice in choices]
    for prompt in (texts, token_ids):
        choices = complete(client, prompt, **SEEDED, n=2).choices
        assert [choice.index for choice in choices] == [0, 1, 2, 3]
        assert [choice.text for choice in choices] == expected
    alone = complete(client, token_ids[0], **SEEDED)
    assert alone.choices[0].text == expected[0]
    assert alone.usage.prompt_tokens == len(token_ids[0])


def test_the_best_of_several_are_answered(client: OpenAI) -> None:
    prompts = [PROMPT, "import os\n"]
    made = complete(client, prompts, **SEEDED, n=4, logprobs=0).choices
    expected = []
    for choices in (made[:4], made[4:]):
        ranked = sorted(choices, key=lambda choice: -fmean(choice.logprobs.token_logprobs))
        expected += [choice.text for choice in ranked[:2]]
    answer = complete(client, prompts, **SEEDED, n=2, best_of=4)
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.logprobs for choice in answer.choices] == [None] * 4
    assert answer.usage.completion_tokens == sum(len(c.logprobs.tokens) for c in made)
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, n=1, best_of=2, stream=True)
    assert caught.value.param == "best_of"


@pytest.mark.slow
def test_echo_begins_with_the_prompt(client: OpenAI) -> None:
    plain = complete(client, **GREEDY).choices[0].text
    assert complete(client, **GREEDY, echo=True).choices[0].text == PROMPT + plain
    pieces = complete(client, **GREEDY, echo=True, stream=True)
    assert "".join(p.choices[0].text for p in pieces) == PROMPT + plain


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_only_a_prompt_s_end_is_kept(client: OpenAI, mode: str) -> None:
    fields: dict[str, Any] = {**SEEDED, "speculation": mode, "return_token_ids": True}
    whole = complete(client, **fields, max_tokens=1).choices[0].prompt_token_ids
    expected = complete(client, whole[-3:], **fields, echo=True)
    for prompt in (PROMPT, whole):
        answer = complete(client, prompt, **fields, echo=True, truncate_prompt_tokens=3)
        assert answer.choices[0].prompt_token_ids == whole[-3:]
        assert answer.choices[0].text == expected.choices[0].text
        assert answer.usage.prompt_tokens == 3
    pieces = list(complete(client, **fields, truncate_prompt_tokens=3, stream=True))
    first = pieces[0].choices[0]
    assert first.prompt_token_ids == whole[-3:]
    assert not any(hasattr(piece.choices[0], "prompt_token_ids") for piece in pieces[1:])
    # As much as leaves room: of a text of any length, and of a conversation.
    long = "word " * 5000 + PROMPT
    answer = complete(client, long, **fields, truncate_prompt_tokens=-1)
    assert answer.usage.prompt_tokens == 512 - 12
    assert answer.choices[0].prompt_token_ids[-len(whole) + 1 :] == whole[1:]
    talk = chat(
        client,
        **fields,
        messages=[{"role": "user", "content": "word " * 1000}],
        truncate_prompt_tokens=-1,
    )
    assert talk.usage.prompt_tokens == len(talk.prompt_token_ids) == 512 - 12
    open_end = {"max_completion_tokens": None, "truncate_prompt_tokens": -1}
    assert chat(client, **fields, **open_end).usage.prompt_tokens > 12


def test_tokens_of_log_probabilities_may_be_ids(client: OpenAI) -> None:
    fields: dict[str, Any] = {**GREEDY, "return_tokens_as_token_ids": True, "max_tokens": 3}
    choice = complete(client, **fields, logprobs=1, echo=True, return_token_ids=True).choices[0]
    names = [f"token_id:{i}" for i in (*choice.prompt_token_ids, *choice.token_ids)]
    assert choice.logprobs.tokens == names
    assert choice.logprobs.top_logprobs[-1].keys() == {names[-1]}
    del fields["max_tokens"]
    spoken = chat(client, **fields, logprobs=True, top_logprobs=1, return_token_ids=True).choices[0]
    entries = spoken.logprobs.content
    assert [entry.token for entry in entries] == [f"token_id:{i}" for i in spoken.token_ids]
    assert entries[0].top_logprobs[0].token == entries[0].token
    text = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
    assert text.startswith(spoken.message.content)


def test_tokens_and_text(server: ApiServer) -> None:
    status, answer, _ = post(server, "/tokenize", {"prompt": "a b", "return_token_strs": True})
    assert status == 200
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    status, text, _ = post(server, "/detokenize", {"tokens": answer["tokens"]})
    assert text == {"prompt": "a b"}
    status, chat, _ = post(server, "/tokenize", {"messages": MESSAGES})
    _, prompt, _ = post(server, "/detokenize", {"tokens": chat["tokens"]})
    assert prompt["prompt"].endswith("<|im_start|>assistant\n")
    assert post(server, "/detokenize", {"tokens": [10**9]})[1]["error"]["param"] == "tokens"
    assert post(server, "/tokenize", {})[1]["error"]["param"] == "prompt"
    _, told, _ = post(server, "/tokenize", {"messages": MESSAGES, "tools": [CITY_TOOL]})
    _, prompt, _ = post(server, "/detokenize", {"tokens": told["tokens"]})
    assert '"name": "get_weather"' in prompt["prompt"]
    refused = post(server, "/tokenize", {"prompt": "x", "tools": [CITY_TOOL]})[1]["error"]
    assert refused["param"] == "tools"


# -------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("fields", [GREEDY, {**SEEDED, "n": 2, "logprobs": 1}], ids=["one", "n"])
def test_a_stream_is_the_answer_in_pieces(client: OpenAI, fields: dict[str, Any]) -> None:
    whole = complete(client, **fields)
    pieces = list(complete(client, **fields, stream=True, stream_options={"include_usage": True}))
    assert pieces[-1].choices == []
    assert pieces[-1].usage == whole.usage
    assert all(piece.usage is None for piece in pieces[:-1])
    assert len({piece.id for piece in pieces}) == 1
    for choice in whole.choices:
        mine = [p.choices[0] for p in pieces[:-1] if p.choices[0].index == choice.index]
        assert len(mine) > 1
        assert "".join(piece.text for piece in mine) == choice.text
        assert [piece.finish_reason for piece in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == choice.finish_reason
        if choice.logprobs is not None:
            offsets = [o for piece in mine for o in piece.logprobs.text_offset]
            assert offsets == choice.logprobs.text_offset


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_echo_has_the_prompt_s_log_probabilities(client: OpenAI, stream: bool) -> None:
    """Those of the output are as without an echo; those of the prompt go on as the output does."""
    longer = PROMPT + complete(client, **GREEDY, max_tokens=8).choices[0].text
    fields: dict[str, Any] = {**GREEDY, "logprobs": 2, "max_tokens": 4, "echo": True}
    if stream:
        pieces = [p.choices[0] for p in complete(client, longer, **fields, stream=True)]
        text = "".join(piece.text for piece in pieces)
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        found = {n: [v for p in pieces for v in getattr(p.logprobs, n)] for n in names}
    else:
        choice = complete(client, longer, **fields).choices[0]
        text, found = choice.text, vars(choice.logprobs)
    plain = complete(client, longer, **{**fields, "echo": False}).choices[0]
    assert text == longer + plain.text
    assert "".join(found["tokens"]) == text
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert text[offset:].startswith(token)
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert found["token_logprobs"][-4:] == pytest.approx(plain.logprobs.token_logprobs, abs=1e-4)
    # The last eight or so of the prompt are what the model itself says.
    said = found["token_logprobs"][-10:-4]
    best = [max(top.values()) for top in found["top_logprobs"][-10:-4]]
    assert said == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_a_prompt_can_be_scored_alone(client: OpenAI, mode: str) -> None:
    fields: dict[str, Any] = {**GREEDY, "speculation": mode, "max_tokens": 0}
    scores: dict[str, Any] = {**fields, "echo": True, "logprobs": 2, "prompt_logprobs": 1, "n": 2}
    longer = complete(client, **{**scores, "max_tokens": 3}).choices[0]
    num_tokens = len(longer.prompt_logprobs)
    scored = complete(client, **scores)
    assert (scored.usage.completion_tokens, scored.usage.prompt_tokens) == (0, num_tokens)
    for choice in scored.choices:
        assert (choice.text, choice.finish_reason) == (PROMPT, "length")
        assert choice.logprobs.tokens == longer.logprobs.tokens[:num_tokens]
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(
            longer.logprobs.token_logprobs[1:num_tokens], abs=1e-4
        )
        assert len(choice.prompt_logprobs) == num_tokens
    (piece,) = (p.choices[0] for p in complete(client, **{**scores, "n": 1}, stream=True))
    assert (piece.text, piece.finish_reason) == (PROMPT, "length")
    assert piece.logprobs == scored.choices[0].logprobs
    for more in ({}, {"best_of": 2}, {"logprobs": 1}):
        bare = complete(client, **fields, **more)
        assert (bare.choices[0].text, bare.choices[0].finish_reason) == ("", "length")
        assert bare.usage.completion_tokens == 0
    answer = chat(client, **GREEDY, speculation=mode, max_completion_tokens=0, prompt_logprobs=0)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "length")
    assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens == answer.usage.total_tokens


def test_events_of_equal_length_tell_less(server: ApiServer) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "stream": True, **GREEDY}
    texts, lengths = [], []
    for pads in (False, True):
        fields = {**body, "stream_options": {"include_obfuscation": pads}}
        request = urllib.request.Request(
            f"{server.url}/v1/completions",
            json.dumps(fields).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            lines = answer.read().split(b"\n\n")[:-2]
        events = [json.loads(line.removeprefix(b"data: ")) for line in lines]
        assert all(("obfuscation" in event) is pads for event in events)
        texts.append("".join(event["choices"][0]["text"] for event in events))
        lengths.append({len(line) for line in lines})
    assert texts[0] == texts[1]
    assert len(lengths[0]) > 1
    assert len(lengths[1]) == 1


def test_sources_and_counts_are_there_when_asked_for(client: OpenAI) -> None:
    pieces = list(
        complete(
            client,
            **GREEDY,
            stream=True,
            stream_options={"include_usage": True},
            return_token_sources=True,
            return_token_ids=True,
            return_speculation_stats=True,
        )
    )
    choices = [piece.choices[0] for piece in pieces[:-1]]
    sources = [source for choice in choices for source in choice.token_sources]
    assert len(sources) == 12 == sum(len(choice.token_ids) for choice in choices)
    assert "accepted" in sources
    for choice in choices:
        assert sum(choice.text_lengths) <= len(choice.text)
    counts = pieces[-1].usage.speculation
    assert counts["num_accepted_tokens"] == sources.count("accepted")
    assert counts["acceptance_length"] > 1
    assert not hasattr(complete(client, **GREEDY).choices[0], "token_ids")


def test_requests_as_vllm_s_benchmark_sends_them(server: ApiServer) -> None:
    body = {
        "model": MODEL,
        "prompt": PROMPT,
        "repetition_penalty": 1.0,
        "temperature": 0.0,
        "max_tokens": 12,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "best_of": 1,
        "use_beam_search": False,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": "Bearer none"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        lines = answer.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert all("text" in event["choices"][0] for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 12


# ------------------------------------------------------------------------------------------- chat


def chat(client: OpenAI, **fields: Any) -> Any:
    extra = {name: fields.pop(name) for name in EXTENSIONS if name in fields}
    return client.chat.completions.create(
        model=MODEL,
        extra_body=extra or None,
        **{"messages": MESSAGES, "max_completion_tokens": 12, **fields},
    )


@pytest.mark.parametrize("fields", ONE_FAST)
def test_chat_does_not_depend_on_speculation(client: OpenAI, fields: dict[str, Any]) -> None:
    on = chat(client, **fields, n=2, logprobs=True, top_logprobs=2)
    off = chat(client, **fields, n=2, logprobs=True, top_logprobs=2, speculation="off")
    for mine, theirs in zip(on.choices, off.choices, strict=True):
        assert mine.message.content == theirs.message.content
        assert mine.message.role == "assistant"
        assert mine.finish_reason == theirs.finish_reason
        entries = mine.logprobs.content
        joined = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
        assert joined.startswith(mine.message.content)
        assert all(len(entry.top_logprobs) == 2 for entry in entries)
        assert [e.logprob for e in entries] == pytest.approx(
            [e.logprob for e in theirs.logprobs.content], abs=1e-4
        )


@pytest.mark.slow
def test_a_chat_stream_is_the_answer_in_pieces(client: OpenAI) -> None:
    whole = chat(client, **GREEDY)
    pieces = list(chat(client, **GREEDY, stream=True, stream_options={"include_usage": True}))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].usage == whole.usage
    deltas = [piece.choices[0] for piece in pieces[:-1]]
    text = "".join(choice.delta.content or "" for choice in deltas)
    assert text == whole.choices[0].message.content
    assert deltas[-1].finish_reason == whole.choices[0].finish_reason


def test_roles_and_parts_of_messages(server: ApiServer, client: OpenAI) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    conversation = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "c", "refusal": None, "annotations": []},
        {"role": "user", "content": "d"},
        {"role": "assistant", "refusal": "e"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "f"}]},
    ]
    _, answer, _ = post(server, "/tokenize", {"messages": conversation})
    _, text, _ = post(server, "/detokenize", {"tokens": answer["tokens"]})
    assert text["prompt"] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nab<|im_end|>\n"
        "<|im_start|>assistant\nc<|im_end|>\n<|im_start|>user\nd<|im_end|>\n"
        "<|im_start|>assistant\ne<|im_end|>\n<|im_start|>assistant\nf<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, messages=[{"role": "user", "content": image}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("fields", ONE_FAST)
def test_an_answer_follows_its_schema(client: OpenAI, fields: dict[str, Any]) -> None:
    texts = set()
    for mode in ("auto", "off"):
        answer = client.chat.completions.parse(
            model=MODEL,
            messages=MESSAGES,
            response_format=Person,
            max_completion_tokens=100,
            extra_body={"speculation": mode},
            **fields,
        )
        assert isinstance(answer.choices[0].message.parsed, Person)
        texts.add(answer.choices[0].message.content)
    assert len(texts) == 1


@pytest.mark.slow
def test_any_json_object(client: OpenAI) -> None:
    answer = chat(
        client, **SEEDED, response_format={"type": "json_object"}, max_completion_tokens=4
    )
    assert answer.choices[0].message.content.lstrip().startswith("{")
    assert chat(client, **GREEDY, response_format={"type": "text"}).choices[0].message.content


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param("required"),
        pytest.param(NAMED, id="named"),
        pytest.param(
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}},
            id="allowed",
        ),
    ],
)
@pytest.mark.slow
@pytest.mark.parametrize("fields", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_calls_that_must_be_made(client: OpenAI, choice: Any, fields: dict[str, Any]) -> None:
    tools = [CITY_TOOL] if choice == "required" else [CITY_TOOL, CLOCK_TOOL]
    request = {
        **fields,
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_completion_tokens": 120,
    }
    found = []
    for mode in ("auto", "off"):
        answer = chat(client, **request, speculation=mode).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        (call,) = answer.message.tool_calls
        assert call.function.name == "get_weather"
        arguments = json.loads(call.function.arguments)
        assert arguments["city"] in ("Rome", "Oslo")
        assert 1 <= arguments["days"] <= 9
        found.append(arguments)
    assert found[0] == found[1]
    deltas = [piece.choices[0] for piece in chat(client, **request, stream=True)]
    (streamed,) = [call for d in deltas for call in d.delta.tool_calls or []]
    assert (streamed.index, streamed.function.name) == (0, "get_weather")
    assert json.loads(streamed.function.arguments) == found[0]
    assert deltas[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("fields", ONE_FAST)
def test_content_follows_its_schema_where_tools_may_be_called(
    server: ApiServer, client: OpenAI, fields: dict[str, Any]
) -> None:
    """Its first token makes an answer one or the other."""
    closed = Person.model_json_schema() | {"additionalProperties": False}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": closed}}
    request = {**fields, "tools": [CITY_TOOL], "response_format": schema}
    for begin, calls in (("{", False), ("<", True)):
        first = post(server, "/tokenize", {"prompt": begin})[1]["tokens"][0]
        found = set()
        for mode in ("auto", "off"):
            message = (
                chat(
                    client,
                    **request,
                    logit_bias={str(first): 100.0},
                    parallel_tool_calls=False,
                    max_completion_tokens=120,
                    speculation=mode,
                )
                .choices[0]
                .message
            )
            if calls:
                assert message.content is None
                (call,) = message.tool_calls
                assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
                found.add(call.function.arguments)
            else:
                assert message.tool_calls is None
                Person.model_validate_json(message.content)
                found.add(message.content)
        assert len(found) == 1


@pytest.mark.slow
def test_calls_that_may_be_made(server: ApiServer, client: OpenAI) -> None:
    """The small model never calls; a conversation goes on behind calls and their results."""
    answer = chat(client, **GREEDY, tools=[CITY_TOOL, CLOCK_TOOL]).choices[0]
    assert answer.message.content
    assert answer.message.tool_calls is None
    conversation = [
        *MESSAGES,
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
    assert chat(client, messages=conversation, tools=[CITY_TOOL], **GREEDY).choices
    _, tokens, _ = post(server, "/tokenize", {"messages": conversation})
    _, text, _ = post(server, "/detokenize", {"tokens": tokens["tokens"]})
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}' in text["prompt"]
    with_none = chat(client, **GREEDY, tools=[CITY_TOOL], tool_choice="none")
    assert with_none.choices[0].message.content == chat(client, **GREEDY).choices[0].message.content


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_former_functions_and_custom_tools(client: OpenAI, mode: str) -> None:
    function = CITY_TOOL["function"]
    former: dict[str, Any] = {
        **GREEDY,
        "functions": [function],
        "function_call": {"name": "get_weather"},
        "max_completion_tokens": 120,
        "speculation": mode,
    }
    choice = chat(client, **former).choices[0]
    assert choice.finish_reason == "function_call"
    assert choice.message.function_call.name == "get_weather"
    assert json.loads(choice.message.function_call.arguments)["city"] in ("Rome", "Oslo")
    deltas = [piece.choices[0] for piece in chat(client, **former, stream=True)]
    (streamed,) = [d.delta.function_call for d in deltas if d.delta.function_call]
    assert vars(streamed) == vars(choice.message.function_call)
    assert deltas[-1].finish_reason == "function_call"
    spoken = [
        *MESSAGES,
        {"role": "assistant", "function_call": vars(streamed), "content": None},
        {"role": "function", "name": "get_weather", "content": "sunny"},
    ]
    plain = {"function_call": "none", "max_completion_tokens": 4}
    assert chat(client, **{**former, **plain}, messages=spoken).choices[0].finish_reason == "length"

    for syntax, definition, wanted in (
        (None, "", r"(?s).*"),
        ("regex", "[ab]{3}c", "[ab]{3}c"),
        ("lark", 'start: "\\"" NAME ("," NAME)* "\\""\nNAME: /[ab]{2}/', '"[ab]{2}(,[ab]{2})*"'),
    ):
        pattern = {"type": "grammar", "grammar": {"syntax": syntax, "definition": definition}}
        given = {"format": pattern} if syntax else {}
        choice = chat(
            client,
            **SEEDED,
            tools=[{"type": "custom", "custom": {"name": "run", **given}}],
            tool_choice={"type": "custom", "custom": {"name": "run"}},
            max_completion_tokens=200,
            speculation=mode,
        ).choices[0]
        if choice.finish_reason == "length" and not given:
            continue  # a text of any length need not end
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, call.type, call.custom.name) == (
            "tool_calls",
            "custom",
            "run",
        )
        assert re.fullmatch(wanted, call.custom.input)


# ------------------------------------------------------------------------------- refusals and ends

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": 2**40}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"seed": 2**70}, "seed"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**40}, "max_tokens"),
    ({"min_tokens": 99}, "min_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5000000": 1}}, "logit_bias"),
    ({"stop": [""]}, "stop"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": ["x"] * 129}, "bad_words"),
    ({"allowed_token_ids": [5_000_000]}, "allowed_token_ids"),
    ({"n": 3, "best_of": 2}, "best_of"),
    ({"n": 0, "best_of": 2}, "n"),
    ({"n": -1, "best_of": 3, "echo": True}, "n"),
    ({"best_of": 17}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [5_000_000]}, "prompt"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"prompt": "word " * 5000}, "prompt"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 2**70}, "truncate_prompt_tokens"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"temprature": 1}, "temprature"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"store": True}, "store"),
    ({"speculation": "maybe"}, "speculation"),
    ({"num_speculative_tokens": -1}, "num_speculative_tokens"),
    ({"timeout_seconds": 0}, "timeout_seconds"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"uniqueItems": True}},
            }
        },
        "response_format",
    ),
    ({"response_format": {"type": "xml"}}, "response_format"),
]
REFUSED_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "word " * 5000}]}, "messages"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"functions": [{"name": "a b"}]}, "functions"),
    ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call"),
    ({"functions": [{"name": "f"}], "tools": [CITY_TOOL]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
    (
        {
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "strict": True, "parameters": SET_SCHEMA},
                }
            ]
        },
        "tools",
    ),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({"tools": [CITY_TOOL, CITY_TOOL]}, "tools"),
    (
        {
            "tools": [CITY_TOOL],
            "tool_choice": {"type": "function", "function": {"name": "other"}},
        },
        "tool_choice",
    ),
    (
        {
            "tools": [CITY_TOOL],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"uniqueItems": True}},
            },
        },
        "response_format",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "foo"}}}]},
        "tools",
    ),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (
        {
            "tools": [CITY_TOOL],
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "auto",
                    "tools": [{"type": "function", "function": {"name": "other"}}],
                },
            },
        },
        "tool_choice",
    ),
    (
        {
            "tools": [
                {
                    "type": "custom",
                    "custom": {
                        "name": "f",
                        "format": {
                            "type": "grammar",
                            "grammar": {"syntax": "lark", "definition": "start: nothing"},
                        },
                    },
                }
            ]
        },
        "tools",
    ),
    ({"modalities": ["audio"]}, "modalities"),
    ({"moderation": {"model": "x"}}, "moderation"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
]
WITHOUT_EFFECT: dict[str, Any] = {
    "spaces_between_special_tokens": False,
    "user": "me",
    "store": False,
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_options": {"mode": "implicit"},
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "suffix": None,
    "best_of": 1,
    "temprature": None,
    "top_k": -1,
}


def test_bad_input_names_its_field(server: ApiServer) -> None:
    for path, base, cases in (
        ("/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": 8}, REFUSED),
        ("/v1/chat/completions", {"model": MODEL, "messages": MESSAGES}, REFUSED_CHATS),
    ):
        for fields, name in cases:
            for stream in (False, True):
                body = {**base, "stream": stream, **fields}
                if name == "stream_options":
                    body["stream"] = False
                status, answer, _ = post(server, path, body)
                assert status == 400, fields
                assert answer["error"]["param"] == name, (fields, answer)
                assert answer["error"]["type"] == "invalid_request_error"
    assert server.engine_loop.load().num_running == 0
    misspelt = post(server, "/v1/completions", {"prompt": "x", "temprature": 1})[1]["error"]
    assert "did you mean 'temperature'?" in misspelt["message"]


def test_a_wrong_tool_is_told_among_many(server: ApiServer) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"strict": True, "parameters": SET_SCHEMA}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"parameters": {"type": "string", "pattern": "^(?!x)"}}, "look-around"),
    ]
    for fields, why in cases:
        wrong = {"type": "function", "function": {"name": "wrong", **fields}}
        body = {"messages": MESSAGES, "tools": [CLOCK_TOOL, wrong, CITY_TOOL]}
        status, answer, _ = post(server, "/v1/chat/completions", body)
        message = answer["error"]["message"]
        assert (status, answer["error"]["param"]) == (400, "tools")
        assert message.startswith("tools: 'wrong': failed to compile JSON schema")
        assert why in message
        assert "tool_call" not in message


def test_what_asks_for_nothing_is_taken(server: ApiServer) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 2, **WITHOUT_EFFECT}
    assert post(server, "/v1/completions", body)[0] == 200


def test_what_is_no_request(server: ApiServer) -> None:
    assert post(server, "/v1/completions", b"{")[0] == 400
    assert post(server, "/v1/completions", b"[1]")[0] == 400
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Length", str(17 << 20))
    connection.endheaders()
    assert connection.getresponse().status == 413  # unread
    connection.close()
    status, answer, _ = send(f"{server.url}/v1/nothing")
    assert (status, answer["error"]["type"]) == (404, "invalid_request_error")
    assert send(f"{server.url}/v1/completions")[0] == 405


def test_models_and_probes(server: ApiServer, client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="x")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    assert send(f"{server.url}/health")[:2] == (200, None)
    assert send(f"{server.url}/ready")[:2] == (200, {"status": "ready"})
    assert send(f"{server.url}/version")[0] == 200
    paths = send(f"{server.url}/openapi.json")[1]["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/ready"} <= paths.keys()


def test_a_full_queue_says_when_to_come_again(server: ApiServer, client: OpenAI) -> None:
    fields: dict[str, Any] = {"n": 8, "max_tokens": 400, "ignore_eos": True}
    with closing(complete(client, **fields, stream=True)) as running:
        next(iter(running))
        with pytest.raises(openai.RateLimitError) as caught:
            complete(client, **fields)
    assert caught.value.code == "queue_full"
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    idle(server)


def test_a_deadline_is_504(server: ApiServer, client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        complete(client, max_tokens=480, n=8, ignore_eos=True, timeout_seconds=0.1)
    assert caught.value.status_code == 504
    idle(server)


def test_a_client_that_leaves_ends_its_request(server: ApiServer, client: OpenAI) -> None:
    fields: dict[str, Any] = {"max_tokens": 480, "n": 8, "ignore_eos": True}
    before = server.engine_loop.load().num_output_tokens
    stream = complete(client, **fields, stream=True)
    next(iter(stream))
    assert server.engine_loop.load().num_running > 0
    stream.close()
    idle(server)
    with pytest.raises(openai.APITimeoutError):
        complete(client, **fields, timeout=0.3)
    idle(server)
    # Neither came to its end.
    assert server.engine_loop.load().num_output_tokens - before < 8 * 480


def idle(server: ApiServer) -> None:
    deadline = time.monotonic() + 60
    while server.router.num_active_requests or server.engine_loop.load().kv_cache_usage:
        assert time.monotonic() < deadline
        time.sleep(0.02)
