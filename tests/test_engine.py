"""The engine against plain transformers, with and without guesses, alone and in company."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.bench.judge import Judgement, judge
from cluster.config import ClusterConfig
from cluster.engine.engine import Engine
from cluster.errors import (
    CheckpointError,
    ConfigError,
    DeadlineExceededError,
    InvalidRequestError,
    QueueFullError,
    RequestCancelledError,
)
from cluster.request import (
    FinishReason,
    Request,
    SamplingParams,
    SpeculationMode,
    SpeculationParams,
    TokenSource,
)
from tests.engine_tools import Completion, make_config, make_engine, run, run_sharded
from tests.models import save_tiny_drafter, save_tiny_target

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
SEEDED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=11, max_tokens=24)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    target = save_tiny_target(folder / "target")
    return target, save_tiny_drafter(folder / "drafter", target)


def make_requests(params: SamplingParams, count: int = 12) -> list[Request]:
    """Prompts of mixed lengths, short and longer than a page."""
    generator = torch.Generator().manual_seed(5)
    lengths = [1 + (7 * i) % 61 for i in range(count)]
    return [
        Request(
            request_id=f"r{i}",
            prompt_token_ids=tuple(torch.randint(0, 96, (n,), generator=generator).tolist()),
            sampling=params,
        )
        for i, n in enumerate(lengths)
    ]


def judge_all(target: str, requests: list[Request], done: dict[str, Completion]) -> Judgement:
    reference = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    total = Judgement()
    for request in requests:
        total += judge(
            reference,
            prompt_token_ids=list(request.prompt_token_ids),
            output_token_ids=done[request.request_id].token_ids,
            params=request.sampling,
            choice_index=request.choice_index,
        )
    return total


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("speculate", [False, True], ids=["plain", "speculative"])
def test_outputs_agree_with_transformers(
    pair: tuple[str, str], params: SamplingParams, speculate: bool
) -> None:
    target, drafter = pair
    requests = make_requests(params)
    engine = make_engine(make_config(target, drafter if speculate else None))
    done = run(engine, requests)
    verdict = judge_all(target, requests, done)
    assert verdict.num_positions == 24 * len(requests)
    assert verdict.num_mismatches == 0
    drafts = sum(c.usage.speculation.num_draft_tokens for c in done.values() if c.usage)
    assert (drafts > 0) == speculate


def test_the_judge_sees_a_wrong_token(pair: tuple[str, str]) -> None:
    target, _ = pair
    requests = make_requests(SEEDED)
    done = run(make_engine(make_config(target)), requests)
    tokens = done["r3"].token_ids
    tokens[10] = (tokens[10] + 1) % 96
    assert judge_all(target, requests, done).num_mismatches >= 1


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_outputs_do_not_depend_on_company_or_drafter(
    pair: tuple[str, str], tmp_path: Path, params: SamplingParams
) -> None:
    target, drafter = pair
    requests = make_requests(params, count=6)
    together = run(make_engine(make_config(target, drafter)), requests)
    other = save_tiny_drafter(tmp_path / "other", target, seed=9, block_size=6)
    elsewhere = run(make_engine(make_config(target, other)), requests)
    alone = make_engine(make_config(target))
    for request in requests:
        by_itself = run(alone, [request])[request.request_id].token_ids
        assert together[request.request_id].token_ids == by_itself
        assert elsewhere[request.request_id].token_ids == by_itself


def test_choices_of_one_seed_differ(pair: tuple[str, str]) -> None:
    target, drafter = pair
    requests = [
        Request(request_id=f"c{i}", prompt_token_ids=(5, 6, 7), sampling=SEEDED, choice_index=i)
        for i in range(4)
    ]
    done = run(make_engine(make_config(target, drafter)), requests)
    assert len({tuple(c.token_ids) for c in done.values()}) == 4
    assert judge_all(target, requests, done).num_mismatches == 0


@pytest.mark.parametrize("speculate", [False, True], ids=["plain", "speculative"])
def test_deterministic_mode_equals_incremental_transformers_bit_for_bit(
    pair: tuple[str, str], speculate: bool
) -> None:
    target, drafter = pair
    params = SamplingParams(temperature=0.0, max_tokens=16, logprobs=0)
    requests = make_requests(params, count=8)
    config = make_config(target, drafter if speculate else None, deterministic=True)
    done = run(make_engine(config), requests)
    reference = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    for request in requests:
        tokens, logprobs = incremental_greedy(reference, request.prompt_token_ids, 16)
        completion = done[request.request_id]
        assert completion.token_ids == tokens
        assert [p.chosen.logprob for p in completion.logprobs] == logprobs


@torch.inference_mode()
def incremental_greedy(
    model: torch.nn.Module, prompt: tuple[int, ...], count: int
) -> tuple[list[int], list[float]]:
    """Plain transformers, one token a forward pass, prompt included."""
    cache, tokens, logprobs = None, [], []
    pending = list(prompt)
    for _ in range(count):
        for token_id in pending:
            output = model(torch.tensor([[token_id]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
        row = output.logits[0, -1].float()
        token_id = int(row.argmax())
        tokens.append(token_id)
        logprobs.append(float(row.log_softmax(-1)[token_id]))
        pending = [token_id]
    return tokens, logprobs


@pytest.mark.parametrize(
    ("tensor", "pipeline", "speculate"),
    [
        (2, 1, True),
        (1, 2, True),
        pytest.param(1, 2, False, marks=pytest.mark.slow),
        pytest.param(2, 2, True, marks=pytest.mark.slow),
    ],
    ids=["tensor-2", "pipeline-2", "pipeline-2-plain", "tensor-2-pipeline-2"],
)
def test_shards_agree_with_one(
    pair: tuple[str, str], tensor: int, pipeline: int, speculate: bool
) -> None:
    target, drafter = pair
    requests = make_requests(GREEDY, count=5) + [
        Request(request_id=f"s{i}", prompt_token_ids=(i, 3), sampling=SEEDED) for i in range(5)
    ]
    # These wait until others have gone, and find what those have computed.
    requests += [
        dataclasses.replace(request, request_id=f"{request.request_id} again")
        for request in requests[2:5]
    ]
    config = make_config(
        target,
        drafter if speculate else None,
        max_num_seqs=10,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
    )
    done = run_sharded(config, requests)
    verdict = judge_all(target, requests, done)
    assert verdict.num_positions == 24 * len(requests)
    assert verdict.num_mismatches == 0
    drafted = any(c.usage.speculation.num_draft_tokens for c in done.values() if c.usage)
    assert drafted == speculate
    cached = {k: c.usage.cached_prompt_tokens for k, c in done.items() if c.usage}
    assert {k: n for k, n in cached.items() if n} == {"r3 again": 16, "r4 again": 16}


def test_requests_join_and_leave_between_steps(pair: tuple[str, str]) -> None:
    target, drafter = pair
    engine = make_engine(make_config(target, drafter))
    requests = make_requests(GREEDY, count=6)
    late = requests[3:]
    for request in requests[:3]:
        engine.add_request(request)
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    steps = 0
    while engine.has_work or late:
        if steps >= 2 and late:
            engine.add_request(late.pop())
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
        steps += 1
    alone = make_engine(make_config(target))
    for request in requests:
        assert tokens[request.request_id] == run(alone, [request])[request.request_id].token_ids


def test_a_small_cache_preempts_and_changes_nothing(pair: tuple[str, str]) -> None:
    target, drafter = pair
    requests = make_requests(SamplingParams(temperature=0.0, max_tokens=60), count=16)
    ample = run(make_engine(make_config(target, drafter)), requests)
    config = make_config(target, drafter, num_pages=18, max_model_len=128)
    engine = make_engine(config)
    tight = run(engine, requests)
    assert engine.load().num_preemptions > 0
    assert {k: v.token_ids for k, v in tight.items()} == {k: v.token_ids for k, v in ample.items()}


def test_chunked_prompts_do_not_stall_decoding(pair: tuple[str, str]) -> None:
    target, _ = pair
    config = make_config(target, max_num_batched_tokens=16, max_num_seqs=8)
    engine = make_engine(config)
    engine.add_request(Request(request_id="short", prompt_token_ids=(1,), sampling=GREEDY))
    engine.step()
    long_prompt = tuple(i % 96 for i in range(150))
    engine.add_request(Request(request_id="long", prompt_token_ids=long_prompt, sampling=GREEDY))
    gained = [sum(len(o.token_ids) for o in engine.step()) for _ in range(8)]
    assert gained == [1] * 8  # the short one gains a token in every step of the long one's prompt
    while engine.has_work:
        engine.step()
    engine.check()


def test_token_sources_tell_accepted_recovered_and_bonus_apart(pair: tuple[str, str]) -> None:
    target, drafter = pair
    done = run(make_engine(make_config(target, drafter)), make_requests(GREEDY))
    for completion in done.values():
        assert completion.usage is not None
        stats = completion.usage.speculation
        accepted = completion.token_sources.count(TokenSource.ACCEPTED)
        assert accepted == stats.num_accepted_tokens
        assert sum(stats.num_accepted_tokens_per_pos) == accepted
        assert len(completion.token_ids) <= stats.num_steps + accepted
    plain = run(make_engine(make_config(target)), make_requests(GREEDY))
    assert {s for c in plain.values() for s in c.token_sources} == {TokenSource.TARGET}


def test_speculation_can_be_refused_and_capped_by_request(pair: tuple[str, str]) -> None:
    target, drafter = pair
    engine = make_engine(make_config(target, drafter))
    requests = [
        Request(
            request_id="off",
            prompt_token_ids=(1, 2),
            sampling=GREEDY,
            speculation=SpeculationParams(mode=SpeculationMode.OFF),
        ),
        Request(
            request_id="one",
            prompt_token_ids=(1, 2),
            sampling=GREEDY,
            speculation=SpeculationParams(num_speculative_tokens=1),
        ),
    ]
    done = run(engine, requests)
    assert done["off"].usage
    assert done["off"].usage.speculation.num_drafts == 0
    stats = done["one"].usage.speculation if done["one"].usage else None
    assert stats is not None
    assert stats.num_drafts > 0
    assert stats.num_draft_tokens == stats.num_drafts
    assert done["off"].token_ids == done["one"].token_ids


def test_stop_tokens_and_limits_cut_inside_a_block(pair: tuple[str, str]) -> None:
    target, drafter = pair
    engine = make_engine(make_config(target, drafter))
    whole = run(engine, make_requests(GREEDY, count=4))
    for request_id, completion in whole.items():
        request = next(r for r in make_requests(GREEDY, count=4) if r.request_id == request_id)
        stop = completion.token_ids[9]
        first = completion.token_ids.index(stop)
        params = SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=(stop,))
        cut = Request(request_id="cut", prompt_token_ids=request.prompt_token_ids, sampling=params)
        done = run(engine, [cut])["cut"]
        assert done.token_ids == completion.token_ids[: first + 1]
        assert done.finish_reason is FinishReason.STOP
        assert done.usage is not None
        assert done.usage.completion_tokens == first + 1
    lengths = [len(c.token_ids) for c in whole.values()]
    assert lengths == [24] * 4
    assert all(c.finish_reason is FinishReason.LENGTH for c in whole.values())


def test_the_context_ends_the_output(pair: tuple[str, str]) -> None:
    target, drafter = pair
    params = SamplingParams(temperature=0.0, max_tokens=500)
    prompt = tuple(range(90)) * 2 + tuple(range(60))
    request = Request(request_id="full", prompt_token_ids=prompt, sampling=params)
    done = run(make_engine(make_config(target, drafter)), [request])["full"]
    assert len(done.token_ids) == 256 - len(prompt)
    assert done.finish_reason is FinishReason.LENGTH


def test_resumed_requests_go_on_as_if_unbroken(pair: tuple[str, str]) -> None:
    target, drafter = pair
    engine = make_engine(make_config(target, drafter))
    for params in (GREEDY, SEEDED):
        whole = run(engine, [Request(request_id="a", prompt_token_ids=(4, 5), sampling=params)])
        tokens = whole["a"].token_ids
        rest = run(
            engine,
            [
                Request(
                    request_id="b",
                    prompt_token_ids=(4, 5),
                    resume_token_ids=tuple(tokens[:7]),
                    sampling=params,
                )
            ],
        )
        assert rest["b"].token_ids == tokens[7:]


def test_logprobs_are_the_targets_own(pair: tuple[str, str]) -> None:
    target, drafter = pair
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=12, logprobs=3)
    request = Request(request_id="lp", prompt_token_ids=(8, 9, 10), sampling=params)
    done = run(make_engine(make_config(target, drafter)), [request])["lp"]
    reference = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    with torch.inference_mode():
        logits = reference(torch.tensor([[8, 9, 10, *done.token_ids]])).logits[0, 2:-1]
    expected = logits.log_softmax(-1)
    for row, (position, token_id) in enumerate(zip(done.logprobs, done.token_ids, strict=True)):
        assert position.chosen.token_id == token_id
        assert math.isclose(position.chosen.logprob, float(expected[row, token_id]), abs_tol=1e-4)
        top = expected[row].topk(3)
        assert [t.token_id for t in position.top] == top.indices.tolist()


def test_penalties_agree_with_and_without_speculation(pair: tuple[str, str]) -> None:
    target, drafter = pair
    params = SamplingParams(
        temperature=0.0,
        max_tokens=40,
        presence_penalty=0.8,
        frequency_penalty=0.5,
        repetition_penalty=1.3,
        logit_bias={7: 2.0},
        min_tokens=10,
        stop_token_ids=(7,),
    )
    requests = make_requests(params, count=6)
    plain = run(make_engine(make_config(target)), requests)
    speculative = run(make_engine(make_config(target, drafter)), requests)
    unpenalised = run(
        make_engine(make_config(target)), make_requests(SamplingParams(temperature=0.0), count=6)
    )
    for request_id, completion in plain.items():
        assert speculative[request_id].token_ids == completion.token_ids
        assert len(completion.token_ids) >= 10
    assert any(unpenalised[k].token_ids[:40] != c.token_ids[:40] for k, c in plain.items()), (
        "the penalties must matter for this test to mean anything"
    )


def test_cancel_and_deadline_free_everything(pair: tuple[str, str]) -> None:
    target, drafter = pair
    engine = make_engine(make_config(target, drafter))
    long = SamplingParams(temperature=0.0, max_tokens=200)
    engine.add_request(Request(request_id="gone", prompt_token_ids=(1, 2), sampling=long))
    engine.add_request(
        Request(
            request_id="late",
            prompt_token_ids=(1, 2),
            sampling=long,
            deadline=time.monotonic() + 0.05,
        )
    )
    errors: dict[str, Exception] = {}
    for step in range(400):
        if step == 3:
            engine.cancel("gone", RequestCancelledError("the client left"))
        for output in engine.step():
            if output.error is not None:
                errors[output.request_id] = output.error
        if not engine.has_work:
            break
        time.sleep(0.001)
    assert isinstance(errors["gone"], RequestCancelledError)
    assert isinstance(errors["late"], DeadlineExceededError)
    engine.check()
    assert engine.load().kv_cache_usage == 0.0


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt_token_ids": ()}, "prompt"),
        ({"prompt_token_ids": tuple([1] * 256)}, "prompt"),
        ({"prompt_token_ids": (1, 96)}, "prompt.token_ids"),
        ({"prompt_token_ids": (-1,)}, "prompt.token_ids"),
        ({"sampling": SamplingParams(temperature=-0.1)}, "sampling.temperature"),
        ({"sampling": SamplingParams(temperature=math.nan)}, "sampling.temperature"),
        ({"sampling": SamplingParams(temperature=math.inf)}, "sampling.temperature"),
        ({"sampling": SamplingParams(max_tokens=-1)}, "sampling.max_tokens"),
        ({"sampling": SamplingParams(top_p=0.0)}, "sampling.top_p"),
        ({"sampling": SamplingParams(top_k=-2)}, "sampling.top_k"),
        ({"sampling": SamplingParams(min_p=1.5)}, "sampling.min_p"),
        ({"sampling": SamplingParams(stop_token_ids=(96,))}, "sampling.stop_token_ids"),
        ({"sampling": SamplingParams(stop=("",))}, "sampling.stop"),
        ({"sampling": SamplingParams(logit_bias={200: 1.0})}, "sampling.logit_bias"),
        ({"resume_token_ids": (96,)}, "resume_token_ids"),
        ({"speculation": SpeculationParams(num_speculative_tokens=-1)}, "speculation"),
    ],
)
def test_bad_input_names_the_field_and_disturbs_nobody(
    engine: Engine, change: dict[str, object], field: str
) -> None:
    good = Request(request_id="good", prompt_token_ids=(1, 2, 3), sampling=GREEDY)
    engine.add_request(good)
    engine.step()
    values: dict[str, object] = {"prompt_token_ids": (1,), "sampling": GREEDY, **change}
    with pytest.raises(InvalidRequestError) as caught:
        engine.add_request(Request(request_id="bad", **values))  # type: ignore[arg-type]
    assert caught.value.field.startswith(field)
    tokens = 1
    while engine.has_work:
        tokens += sum(len(o.token_ids) for o in engine.step())
    assert tokens >= 24
    engine.check()


@pytest.fixture(scope="module")
def engine(pair: tuple[str, str]) -> Engine:
    return make_engine(make_config(pair[0]))


def test_a_full_queue_refuses(pair: tuple[str, str]) -> None:
    engine = make_engine(make_config(pair[0], max_num_waiting=2))
    for i in range(2):
        engine.add_request(Request(request_id=str(i), prompt_token_ids=(1,), sampling=GREEDY))
    with pytest.raises(QueueFullError) as caught:
        engine.add_request(Request(request_id="x", prompt_token_ids=(1,), sampling=GREEDY))
    assert caught.value.retry_after_s > 0


def test_what_waits_too_long_is_refused_and_what_has_begun_is_not(pair: tuple[str, str]) -> None:
    engine = make_engine(make_config(pair[0], max_num_seqs=1))
    for name in ("first", "second"):
        engine.add_request(
            Request(
                request_id=name,
                prompt_token_ids=(1, 2),
                sampling=GREEDY,
                queue_deadline=time.monotonic() + 0.1,
            )
        )
    errors: dict[str, Exception | None] = {}
    while engine.has_work:
        errors |= {o.request_id: o.error for o in engine.step() if o.is_last}
        time.sleep(0.02)  # 24 tokens take longer than the deadline
    assert errors["first"] is None
    assert isinstance(errors["second"], QueueFullError)
    engine.check()


def test_mismatched_drafter_is_refused_by_name(pair: tuple[str, str], tmp_path: Path) -> None:
    other_target = save_tiny_target(tmp_path / "t", vocab_size=80)
    drafter = save_tiny_drafter(tmp_path / "d", other_target)
    with pytest.raises(CheckpointError, match="vocab_size"):
        make_engine(make_config(pair[0], drafter))


def test_shapes_that_cannot_be_cut_are_refused_by_name(pair: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"target\.pipeline_parallel_size"):
        run_stage_count(pair[0], 5)
    with pytest.raises(ConfigError, match=r"target\.num_pages"):
        make_engine(make_config(pair[0], num_pages=4))


def run_stage_count(target: str, stages: int) -> None:
    from cluster.engine.layout import stage_layers

    layers = AutoModelForCausalLM.from_pretrained(target).config.num_hidden_layers
    stage_layers(layers, stages, 0)


def test_configuration_is_parsed_once(pair: tuple[str, str]) -> None:
    config = make_config(pair[0])
    assert isinstance(config, ClusterConfig)
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        make_config(pair[0], tensor_paralel_size=2)
