"""Broken messages: a short form of `dspark bench fuzz`, and its parts."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import re
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from cluster.api.app import create_app
from cluster.api.chat import ChatCompletionRequest
from cluster.api.completions import CompletionRequest
from cluster.api.tokens import DetokenizeRequest, TokenizeRequest
from cluster.bench import fuzz_http
from cluster.bench.fuzz_bodies import HTTP_BODIES
from cluster.bench.fuzz_json import mutate_json, splice_json
from cluster.bench.fuzz_mutators import dump_document, mutate_bytes, mutate_document
from cluster.bench.fuzz_router import make_router
from cluster.bench.fuzz_sockets import LIVE_SURFACES, fuzz_sockets
from cluster.bench.fuzz_surfaces import ACCEPTED, SURFACES, UNDECODABLE
from cluster.config import ClusterConfig, SpeculativeConfig
from cluster.errors import ConfigError
from cluster.rpc.drafter_client import GrpcDraftClient
from cluster.rpc.raw_server import RawServer, Read, Write
from cluster.section import parse_yaml

LOADED = {name: surface.load() for name, surface in SURFACES.items()}
NAMES = sorted(LOADED)
TYPED = {
    ACCEPTED,
    UNDECODABLE,
    "ConfigError",
    "InvalidRequestError",
    "MalformedProposalError",
    "MismatchError",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "400 invalid_request_error",
    "404 invalid_request_error",
}
PATH = "/v1/completions"
# Of what decodes and checks them: a short run reaches so much of it.
LEAST_BRANCHES = {"client": 0.7, "config": 0.3, "drafter": 0.3, "http": 0.7, "proposals": 0.5}
REFUSED = {
    "client": "INVALID_ARGUMENT",
    "drafter": "InvalidRequestError",
    "http": "400 invalid_request_error",
    "proposals": "MalformedProposalError",
}
BODIES = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


def test_valid_inputs_are_accepted() -> None:
    for name, loaded in LOADED.items():
        for seed in loaded.seeds:
            assert loaded.check(seed) == ACCEPTED, (name, seed)


@pytest.mark.parametrize("path", BODIES)
def test_the_valid_bodies_hold_every_documented_field(path) -> None:
    kinds = {model.__name__: model for model in _with_inner(BODIES[path])}
    held = {name for body in HTTP_BODIES[path] for name in _names(body)}
    documented = {
        field.alias or name for kind in kinds.values() for name, field in kind.model_fields.items()
    }
    assert documented <= held


def _with_inner(kind) -> set[type[BaseModel]]:
    """A model, and those of its fields at any depth."""
    found: set[type[BaseModel]] = set()

    def visit(annotation) -> None:
        is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        if is_model and annotation not in found:
            found.add(annotation)
            for field in annotation.model_fields.values():
                visit(field.annotation)
        for inner in get_args(annotation):
            visit(inner)

    visit(kind)
    return found


def _names(value) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(_names, value.values()))
    return set().union(*map(_names, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 2**32), data=st.none() | st.binary(max_size=200))
def test_whatever_comes_is_accepted_or_refused_by_type(name, seed, data) -> None:
    check, seeds, mutate, *_ = LOADED[name]
    rng = random.Random(seed)
    given = rng.choice(seeds) if data is None else data
    for _ in range(5):
        assert check(given) in TYPED
        given = mutate(given, rng) if rng.random() < 0.7 else mutate_bytes(given, rng)


@pytest.mark.parametrize("name", REFUSED)
def test_the_mutators_reach_behind_the_decoder(name) -> None:
    check, seeds, mutate, *_ = LOADED[name]
    rng = random.Random(1)
    outcomes = Counter(check(mutate(rng.choice(seeds), rng)) for _ in range(500))
    assert outcomes[ACCEPTED] > 50, outcomes
    assert outcomes[REFUSED[name]] > 50, outcomes
    # JSON is also written as no library would.
    assert outcomes[UNDECODABLE] < (200 if name == "http" else 1), outcomes


def test_json_is_written_strangely_too() -> None:
    rng = random.Random(5)
    body = b'{"a": [1, "x"], "b": {"c": 2.5}}'
    found = {"twice": 0, "deep": 0, "not UTF-8": 0, "valid": 0}
    for _ in range(2000):
        changed = mutate_json(body, rng)
        found["twice"] += len(re.findall(rb'"[abc]":', changed)) > 3
        found["deep"] += changed.count(b"[") > 100 or changed.count(b"{") > 100
        try:
            json.loads(changed.decode())
            found["valid"] += 1
        except UnicodeDecodeError:
            found["not UTF-8"] += 1
        except (ValueError, RecursionError):
            pass
    assert min(found.values()) > 20, found
    assert found["valid"] > 1000


def test_fields_of_two_objects_are_put_together() -> None:
    rng = random.Random(5)
    spliced = [splice_json(b'{"a": {"b": 1}}', b'{"c": 2, "d": [3]}', rng) for _ in range(200)]
    documents = [json.loads(text) for text in spliced]
    assert {"a": {"b": 1}, "c": 2, "d": [3]} in documents
    assert any("c" in document["a"] for document in documents)
    assert splice_json(b"[1", b"{}", rng) == b"[1"


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b'{"prompt": "\xff"}', "bytes are not UTF-8", None),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "a number has too many digits", None),
        (b"[" * 20_000, "is nested too deeply", None),
        (b'{"prompt": "a", "": 1}', "is not known here", "''"),
        (b'{"prompt": "a", "": "\\ud800"}', "lone surrogate", "''"),
    ],
)
def test_bodies_that_cannot_be_read_are_refused_by_name(body, message, param) -> None:
    status, answer = asyncio.run(fuzz_http.post(create_app(make_router()), PATH, body))
    assert status == 400
    error = json.loads(answer)["error"]
    assert message in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 2024-13-45", "is not YAML"),
        ("a: " + "9" * 5000, "is not YAML"),
        ("[" * 20_000, "nested too deeply"),
        ("{a: [}", "line 1"),
        (b"\xff\xfe\xfa", "is not YAML"),
        ('a: "\\U88888888"', "is not YAML"),
        ("!!int ", "is not YAML"),
        ("a: !!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_files_that_are_no_yaml_are_refused_by_type(text, message) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_yaml("the file", text)
    assert caught.value.key == "the file"
    assert len(str(caught.value)) < 300


def test_aliases_that_multiply_are_not_written_out() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    document = parse_yaml("bomb", "\n".join(lines))
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.parse({"target": document["a11"]})
    assert len(str(caught.value)) < 500


def test_mutated_documents_are_yaml() -> None:
    rng = random.Random(3)
    for _ in range(200):
        document = mutate_document({"target": {"model": "m", "max_num_seqs": 8}}, rng)
        parse_yaml("mutated", dump_document(document))


@pytest.mark.parametrize(
    "surface",
    [pytest.param(s, marks=pytest.mark.slow) if s == "engine" else s for s in LIVE_SURFACES],
)
@pytest.mark.timeout(300)
def test_live_servers_stand_a_few_broken_messages(surface) -> None:
    row = fuzz_sockets(surface, 100, seed=3)
    assert row["failures"] == []
    assert row["messages"] >= 100


@pytest.mark.parametrize("data", [b"\xff\xff", b"\x0a\x05a"])
def test_a_drafter_whose_bytes_are_no_message_is_left_alone(data) -> None:
    async def answer(read: Read, write: Write) -> None:
        await read()
        await write(data)
        await read()

    async def run() -> None:
        server = RawServer("cluster.v1.DrafterService", {"Draft": answer, "Feed": answer})
        port = await server.start("127.0.0.1")
        client = GrpcDraftClient(
            replica_id="r",
            digests={},
            vocab_size=96,
            config=SpeculativeConfig(method="ngram", num_speculative_tokens=4),
            event_loop=asyncio.get_running_loop(),
        )
        client.set_drafters([("d", f"127.0.0.1:{port}")])
        try:
            async with asyncio.timeout(20):
                while client.stats.num_malformed == 0:
                    await asyncio.sleep(0.01)
            [status] = client.status()
            assert status.state == "quarantined"
            assert status.reason == "a message that cannot be decoded"
        finally:
            await asyncio.to_thread(client.close)
            await server.stop()

    asyncio.run(run())


@pytest.mark.full  # alone: beside other tests its child processes are taken for hanging
@pytest.mark.timeout(300)
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is for Linux")
def test_ten_thousand_broken_messages_each() -> None:
    from cluster.bench import fuzz

    report = fuzz.run(surfaces=NAMES, num_messages=10_000, num_live_messages=1_000)
    assert report.passed, report.to_json()
    for row in report.figures["in_process"]:
        assert row["messages"] >= 10_000
        assert row["branches"] > LEAST_BRANCHES[row["surface"]] * row["all_branches"]
    for row in report.figures["live"]:
        assert row["messages"] == "n/a" or row["messages"] >= 1_000
