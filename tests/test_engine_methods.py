"""Every way of drafting serves: outputs are the target's own, in this process and over gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.engine.draft_factory import build_draft_engine
from cluster.engine.engine import Engine
from cluster.request import Request, SamplingParams
from tests.drafter_rpc_tools import DIGESTS, LoopThread, PatientDraftClient, served, wait_for
from tests.engine_tools import Completion, make_config, make_engine, run
from tests.models import save_tiny_drafter, save_tiny_eagle3, save_tiny_target

METHODS = ("dflash", "eagle3", "draft_model", "ngram")
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.stop()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def settings(target: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The ``speculative`` part of each method; the language model drafts for itself."""
    folder = tmp_path_factory.mktemp("drafters")
    no_head = {"enable_confidence_head": False, "confidence_head_with_markov": False}
    several = {"num_speculative_tokens": 4}
    return {
        "dflash": {"model": save_tiny_drafter(folder / "dflash", target, markov_rank=0, **no_head)},
        "eagle3": {"model": save_tiny_eagle3(folder / "eagle3", target), **several},
        "draft_model": {"model": target, **several},
        "ngram": {"prompt_lookup_min": 1, "prompt_lookup_max": 3, **several},
    }


def config_of(target: str, settings: dict[str, dict[str, Any]], method: str) -> ClusterConfig:
    # Prompts come in several chunks, and no round is ever late.
    speculative = {"method": method, "draft_timeout_ms": 60_000, **settings[method]}
    return make_config(target, speculative=speculative, max_num_batched_tokens=48, max_num_seqs=16)


def requests() -> list[Request]:
    made = []
    for index in range(3):
        prompt = tuple((7 * index + 3 * place) % 96 for place in range(3 + 40 * index))
        for name, params in (
            ("greedy", {"temperature": 0.0}),
            ("seeded", {"temperature": 0.9, "top_k": 40, "seed": index}),
            ("sampled", {"temperature": 0.9, "top_p": 0.95}),
        ):
            sampling = SamplingParams(max_tokens=NUM_TOKENS, **params)
            request_id = f"{name}-{index}"
            made.append(Request(request_id=request_id, prompt_token_ids=prompt, sampling=sampling))
    return made


@pytest.fixture(scope="module")
def expected(target: str) -> dict[str, list[int]]:
    """What plain decoding says, where it says the same each time."""
    plain = run(make_engine(make_config(target)), requests())
    return {k: c.token_ids for k, c in plain.items() if not k.startswith("sampled")}


def check(engine: Engine, done: dict[str, Completion], expected: dict[str, list[int]]) -> None:
    assert {key: done[key].token_ids for key in expected} == expected
    assert all(len(c.token_ids) == NUM_TOKENS for c in done.values())
    stats = engine.load().stats
    assert stats.num_drafts > 20
    assert stats.num_late_proposals == stats.num_stale_proposals == 0


@pytest.mark.parametrize("method", METHODS)
def test_outputs_are_those_of_plain_decoding(
    method: str, target: str, settings: dict[str, Any], expected: dict[str, list[int]]
) -> None:
    engine = make_engine(config_of(target, settings, method))
    done = run(engine, requests())
    check(engine, done, expected)
    stats = engine.load().stats
    if method == "draft_model":  # which knows the target's law exactly
        accepted = sum(stats.num_accepted_tokens_per_pos)
        assert accepted > 0.95 * stats.num_draft_tokens


@pytest.mark.parametrize("method", METHODS)
def test_outputs_over_grpc_are_those_of_plain_decoding(
    method: str,
    loop: LoopThread,
    target: str,
    settings: dict[str, Any],
    expected: dict[str, list[int]],
) -> None:
    config = config_of(target, settings, method)
    speculative = config.speculative
    assert speculative is not None
    client = PatientDraftClient(
        replica_id="replica", digests=DIGESTS, vocab_size=96, config=speculative
    )
    draft_engine = build_draft_engine(config)
    try:
        with served(loop, draft_engine, method=method) as (_, address):
            client.set_drafters([("d0", address)])
            assert wait_for(client.is_ready)
            assert client.block_size == 4
            engine = make_engine(config, client)
            done = run(engine, requests())
            check(engine, done, expected)
            assert wait_for(lambda: draft_engine.num_sessions == 0)
            draft_engine.check_integrity()
        # The drafter restarts: requests go on meanwhile, and are drafted for again behind it.
        assert wait_for(lambda: not client.is_ready())
        assert run(engine, requests()[:2])["greedy-0"].token_ids == expected["greedy-0"]
        num_drafts = engine.load().stats.num_drafts
        with served(loop, build_draft_engine(config), method=method) as (_, address):
            client.set_drafters([("d1", address)])
            assert wait_for(client.is_ready)
            check(engine, run(engine, requests()), expected)
            assert engine.load().stats.num_drafts > num_drafts
        assert client.stats.num_malformed == 0
    finally:
        client.close()


@pytest.mark.parametrize("method", METHODS)
def test_sessions_that_were_evicted_change_no_output(
    method: str, target: str, settings: dict[str, Any], expected: dict[str, list[int]]
) -> None:
    config = config_of(target, settings, method)
    # Three sessions for nine requests that all run at once.
    config = config.model_copy(
        update={"drafter": config.drafter.model_copy(update={"max_sessions": 3})}
    )
    engine = make_engine(config)
    done = run(engine, requests())
    assert {key: done[key].token_ids for key in expected} == expected
    assert engine.load().stats.num_drafts > 0
