"""An engine that finds prompts' beginnings in its cache: outputs, drafts and memory."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.bench.judge import Judgement, judge
from cluster.engine.engine import Engine
from cluster.engine.load import PrefixCacheStats
from cluster.engine.profile import StepProbe
from cluster.engine.target_config import load_tokenizer
from cluster.request import Request, SamplingParams, SpeculationStats
from tests.engine_tools import Completion, make_config, make_engine, run
from tests.models import DRAFTER, TARGET, save_tiny_drafter, save_tiny_target
from tests.scripted_drafts import ScriptedDrafts
from tests.target_models import TARGETS, save_target
from tests.test_engine_swap import RecordingClient, Swapping

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
SEEDED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=11, max_tokens=24)
PROMPT = tuple((7 * k * k + 3) % 96 for k in range(50))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    target = save_tiny_target(folder / "target")
    return target, save_tiny_drafter(folder / "drafter", target)


def ask(name: str, prompt: tuple[int, ...] = PROMPT, params: SamplingParams = GREEDY) -> Request:
    return Request(request_id=name, prompt_token_ids=prompt, sampling=params)


def num_cached(completion: Completion) -> int:
    assert completion.usage is not None
    return completion.usage.cached_prompt_tokens


def judge_all(target: str, requests: list[Request], done: dict[str, Completion]) -> Judgement:
    reference = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    total = Judgement()
    for request in requests:
        total += judge(
            reference,
            prompt_token_ids=list(request.prompt_token_ids),
            output_token_ids=done[request.request_id].token_ids,
            params=request.sampling,
        )
    return total


@pytest.mark.parametrize("speculate", [False, True], ids=["plain", "speculative"])
def test_beginnings_of_prompts_are_found_and_change_no_output(
    pair: tuple[str, str], speculate: bool
) -> None:
    target, drafter = pair
    engine = make_engine(make_config(target, drafter if speculate else None))
    first = run(engine, [ask("first")])
    text = (*PROMPT, *first["first"].token_ids)
    requests = [
        ask("again"),
        ask("seeded", params=SEEDED),
        ask("continued", (*text, 1, 2)),  # a turn later: of the answer only the last page misses
        ask("shorter", PROMPT[:33]),
        ask("other", PROMPT[:20] + PROMPT[:20]),
        ask("elsewhere", PROMPT[1:]),
    ]
    done = run(engine, requests)
    expected = {
        "again": 48,
        "seeded": 48,
        "continued": 64,
        "shorter": 32,
        "other": 16,
        "elsewhere": 0,
    }
    assert {name: num_cached(completion) for name, completion in done.items()} == expected
    load = engine.load()
    assert load.prefix_cache.num_hit_tokens == sum(expected.values())
    assert load.prefix_cache.num_queried_tokens == 50 + sum(
        len(r.prompt_token_ids) for r in requests
    )
    verdict = judge_all(target, requests, done)
    assert verdict.num_positions == 24 * len(requests)
    assert verdict.num_mismatches == 0


@pytest.mark.parametrize("chunk", [512, 40], ids=["in-one-pass", "in-chunks"])
def test_equal_prompts_that_come_together_are_computed_once(
    pair: tuple[str, str], chunk: int
) -> None:
    target, drafter = pair
    config = make_config(target, drafter, max_num_batched_tokens=chunk, max_num_seqs=8)
    engine = make_engine(config)
    requests = [
        ask(f"{params.seed}/{k}", params=params) for params in (GREEDY, SEEDED) for k in "ab"
    ]
    requests += [ask("longer", (*PROMPT, *PROMPT))]
    done = run(engine, requests)
    assert [num_cached(done[r.request_id]) for r in requests] == [0, 48, 48, 48, 48]
    verdict = judge_all(target, requests, done)
    assert verdict.num_positions == 24 * len(requests)
    assert verdict.num_mismatches == 0


def test_requests_that_run_together_hold_an_equal_beginning_once(pair: tuple[str, str]) -> None:
    target, _ = pair
    peaks = {}
    for is_shared in (True, False):
        engine = make_engine(make_config(target, enable_prefix_caching=is_shared))
        for number in range(6):
            engine.add_request(ask(str(number)))
        engine.step()
        peaks[is_shared] = round(engine.load().kv_cache_usage * engine._pages.num_pages)
        while engine.has_work:
            engine.check()
            engine.step()
        engine.check()
    assert peaks == {True: 3 + 6, False: 6 * 4}


def test_deterministic_mode_gives_the_same_bits_behind_a_match(pair: tuple[str, str]) -> None:
    """The first time in chunks of a busy engine, the second time from the cache."""
    target, drafter = pair
    params = SamplingParams(temperature=0.0, max_tokens=16, logprobs=3)
    requests = [ask(name, PROMPT[start:], params) for name, start in (("a", 0), ("b", 13))]
    limits = {"deterministic": True, "max_num_batched_tokens": 24, "max_num_seqs": 4}
    config = make_config(target, drafter, enable_prefix_caching=False, **limits)
    expected = run(make_engine(config), requests)
    engine = make_engine(make_config(target, drafter, **limits))
    run(engine, requests)
    found = run(engine, [requests[1], requests[0]])
    assert {name: num_cached(completion) for name, completion in found.items()} == {
        "a": 48,
        "b": 32,
    }
    for name, completion in expected.items():
        assert found[name].token_ids == completion.token_ids
        assert found[name].logprobs == completion.logprobs


def test_drafters_get_the_features_of_what_is_found(pair: tuple[str, str]) -> None:
    target, drafter = pair
    config = make_config(target, drafter)
    output = run(make_engine(make_config(target)), [ask("first")])["first"].token_ids
    texts = {name: [*PROMPT, *output] for name in ("first", "again")}
    drafts = ScriptedDrafts(texts, vocab_size=96)
    engine = make_engine(config, drafts)
    done = {name: run(engine, [ask(name)])[name] for name in texts}
    assert (num_cached(done["first"]), num_cached(done["again"])) == (0, 48)
    first, again = (drafts.features[name] for name in texts)
    assert first.keys() == again.keys() >= set(range(len(PROMPT)))
    for position, row in first.items():
        assert row.norm() > 0.1
        torch.testing.assert_close(again[position], row, rtol=1e-4, atol=1e-4)


def test_a_trained_drafter_guesses_as_well_behind_a_match() -> None:
    engine = make_engine(make_config(TARGET, DRAFTER))
    prompts = {
        str(start): tuple((31 * start + 17 * k * k + k) % 4000 + 64 for k in range(80))
        for start in range(4)
    }
    lengths = []
    for num_found in (0, 64):
        params = SamplingParams(temperature=0.0, max_tokens=32)
        before = engine.load().stats
        counted = before.num_drafts, before.num_accepted_tokens
        done = run(engine, [ask(name, prompt, params) for name, prompt in prompts.items()])
        assert {num_cached(completion) for completion in done.values()} == {num_found}
        stats = engine.load().stats
        lengths.append((stats.num_accepted_tokens - counted[1]) / (stats.num_drafts - counted[0]))
    assert lengths[0] > 0.5
    assert abs(lengths[1] / lengths[0] - 1) < 0.03


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("speculate", [False, True], ids=["plain", "speculative"])
def test_a_prompt_of_800_tokens_is_answered_sooner_the_second_time(speculate: bool) -> None:
    engine = make_engine(make_config(TARGET, DRAFTER if speculate else None))
    first_token_s: dict[str, list[float]] = {"first": [], "again": []}
    for start in range(7):
        prompt = tuple((31 * start + 17 * k * k + k) % 4000 + 64 for k in range(800))
        for name, seconds in first_token_s.items():
            started = time.perf_counter()
            engine.add_request(ask(name, prompt))
            while not any(output.token_ids for output in engine.step()):
                pass
            seconds.append(time.perf_counter() - started)
            while engine.has_work:
                engine.step()
    medians = {name: statistics.median(seconds) for name, seconds in first_token_s.items()}
    assert medians["again"] <= 0.2 * medians["first"], medians


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.timeout(300)
def test_code_prompts_are_guessed_as_well_behind_a_match(shared_dir: Path) -> None:
    engine = make_engine(make_config(TARGET, DRAFTER, max_num_seqs=32))
    path = shared_dir / "data" / "prompts" / "humaneval.jsonl"
    texts = [json.loads(line)["turns"][0] for line in path.read_text().splitlines()[:64]]
    tokenizer = load_tokenizer(TARGET)
    prompts = {str(k): tuple(tokenizer.encode(text)) for k, text in enumerate(texts)}
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    lengths = []
    for _ in range(2):
        done = run(engine, [ask(name, prompt, params) for name, prompt in prompts.items()])
        total = SpeculationStats()
        for completion in done.values():
            assert completion.usage is not None
            total.num_drafts += completion.usage.speculation.num_drafts
            total.num_accepted_tokens += completion.usage.speculation.num_accepted_tokens
        lengths.append(total.acceptance_length)
    cached = engine.load().prefix_cache
    assert cached.num_hit_tokens > 0.4 * cached.num_queried_tokens
    assert lengths[0] > 2
    assert abs(lengths[1] / lengths[0] - 1) < 0.03, lengths


def test_a_preempted_request_goes_on_behind_what_is_left_of_it(pair: tuple[str, str]) -> None:
    target, drafter = pair
    engine = make_engine(make_config(target, drafter))
    expected = run(engine, [ask("first", PROMPT[1:])])["first"].token_ids
    engine.add_request(ask("r", PROMPT[1:]))
    for _ in range(4):
        engine.step()
    (sequence,) = engine._scheduler.running
    computed = sequence.num_computed_tokens
    assert computed > 49
    engine._scheduler.preempt(sequence)
    assert sequence.pages == []
    engine.check()
    (entry,) = engine._scheduler.schedule(0, {})
    assert sequence.num_computed_tokens == computed // 16 * 16
    assert entry.num_tokens <= 16
    engine.check()
    while engine.has_work:
        engine.step()
    assert sequence.token_ids[49:] == expected
    assert sequence.usage().cached_prompt_tokens == 48  # when it first started


def test_a_crowded_cache_forgets_what_was_used_longest_ago(pair: tuple[str, str]) -> None:
    """Prompts with a common beginning and ends of their own, more than the cache holds."""
    target, drafter = pair
    config = make_config(target, drafter, num_pages=1 + 16, max_model_len=128, max_num_seqs=4)
    engine = make_engine(config)
    requests = [ask(str(k), (*PROMPT[:32], *PROMPT[k : k + 18])) for k in range(12)]
    done = run(engine, requests)
    assert judge_all(target, requests, done).num_mismatches == 0
    load = engine.load()
    assert load.prefix_cache.num_evicted_pages > 0
    assert load.prefix_cache.num_cached_pages <= 16
    # The common beginning is used all the time, so it stays: all but the first ones find it.
    assert [num_cached(done[str(k)]) for k in range(4, 12)] == [32] * 8


def test_what_is_cached_goes_with_the_features_that_a_drafter_reads(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    target, drafter = pair
    other = save_tiny_drafter(tmp_path / "other", target, seed=2, target_layer_ids=[1, 2])
    configs = {
        "first": make_config(target, drafter),
        "other": make_config(target, other),
        "ngram": make_config(
            target,
            speculative={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1},
        ),
    }
    alone = Swapping(configs["other"])
    run(alone.engine, [ask("r")])
    assert alone.client is not None
    swapping = Swapping(configs["first"])
    run(swapping.engine, [ask("r")])
    # In turn: no features are read, others, the same once more, and those of the beginning.
    for name, num_found in (("ngram", 48), ("other", 0), ("other", 48), ("first", 0)):
        swapping.swap(configs[name])
        done = run(swapping.engine, [ask("r")])
        assert num_cached(done["r"]) == num_found
        if name == "other":
            assert isinstance(swapping.client, RecordingClient)
            assert swapping.client.proposals == alone.client.proposals


def test_deepseek_v4_shares_no_pages(tmp_path: Path) -> None:
    engine = make_engine(make_config(save_target(TARGETS["deepseek-v4"], tmp_path)))
    prompt = tuple(range(40))
    outputs = [run(engine, [ask("r", prompt)])["r"] for _ in range(2)]
    assert outputs[0].token_ids == outputs[1].token_ids
    load = engine.load()
    assert load.prefix_cache == PrefixCacheStats(num_queried_tokens=80)


def test_it_can_be_switched_off(pair: tuple[str, str]) -> None:
    engine = make_engine(make_config(pair[0], enable_prefix_caching=False))
    for _ in range(2):
        assert num_cached(run(engine, [ask("r")])["r"]) == 0
    assert engine.load().prefix_cache.num_cached_pages == 0


def test_measuring_a_full_cache_leaves_what_is_cached(pair: tuple[str, str]) -> None:
    config = make_config(pair[0], num_pages=1 + 32, max_model_len=128, max_num_seqs=4)
    engine: Engine = make_engine(config)
    run(engine, [ask("r", PROMPT * 2)])
    num_pages = engine.load().prefix_cache.num_cached_pages
    assert num_pages == 7
    probe = StepProbe(engine._runner, engine._pages, config.target, engine.max_model_len)
    shape = probe.shape(4, 400)
    assert shape is not None
    for _ in range(5):
        probe.measure(shape)
        engine.check()
    assert engine.load().prefix_cache.num_cached_pages == num_pages
