"""Broken messages: a short form of `dspark bench fuzz`, and its parts."""

from __future__ import annotations

import importlib.util
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.bench.fuzz_mutators import dump_document, mutate_bytes, mutate_document
from cluster.bench.fuzz_surfaces import ACCEPTED, SURFACES, UNDECODABLE
from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.section import parse_yaml

LOADED = {name: surface.load() for name, surface in SURFACES.items()}
NAMES = sorted(LOADED)
TYPED = {ACCEPTED, UNDECODABLE, "InvalidRequestError", "MalformedProposalError", "ConfigError"}


def test_valid_inputs_are_accepted() -> None:
    for name in ("client", "http", "drafter"):
        check, seeds, _ = LOADED[name]
        assert [check(seed) for seed in seeds] == [ACCEPTED] * len(seeds)
    for seed in LOADED["config"].seeds[:2]:
        ClusterConfig.parse(parse_yaml("seed", seed))


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 2**32), data=st.none() | st.binary(max_size=200))
def test_whatever_comes_is_accepted_or_refused_by_type(name, seed, data) -> None:
    check, seeds, mutate = LOADED[name]
    rng = random.Random(seed)
    given = rng.choice(seeds) if data is None else data
    for _ in range(5):
        assert check(given) in TYPED
        given = mutate(given, rng) if rng.random() < 0.7 else mutate_bytes(given, rng)


@pytest.mark.parametrize("name", ["client", "drafter"])
def test_the_mutators_reach_behind_the_decoder(name) -> None:
    check, seeds, mutate = LOADED[name]
    rng = random.Random(1)
    outcomes = {check(mutate(rng.choice(seeds), rng)) for _ in range(500)}
    assert {ACCEPTED, "InvalidRequestError"} <= outcomes
    assert UNDECODABLE not in outcomes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 2024-13-45", "is not YAML"),
        ("a: " + "9" * 5000, "is not YAML"),
        ("[" * 20_000, "nested too deeply"),
        ("{a: [}", "line 1"),
        (b"\xff\xfe\xfa", "is not YAML"),
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


@pytest.mark.full  # alone: beside other tests its child processes are taken for hanging
@pytest.mark.timeout(300)
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is for Linux")
def test_twenty_thousand_broken_messages_each() -> None:
    from cluster.bench import fuzz

    report = fuzz.run(surfaces=NAMES, num_messages=20_000, num_live_messages=1_000)
    assert report.passed, report.to_json()
    assert report.figures["messages"] >= 83_000
    for row in report.figures["in_process"]:
        assert row["messages"] >= 20_000
        assert row["branches"] > 0.15 * row["all_branches"]
