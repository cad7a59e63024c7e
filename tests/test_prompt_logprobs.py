"""Log-probabilities of prompts: plain transformers' own, however a prompt is computed."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.api.logprobs import completion_logprobs
from cluster.config import ClusterConfig
from cluster.engine import scheduler
from cluster.errors import InvalidRequestError
from cluster.request import PositionLogprobs, Request, SamplingParams, TokenLogprob
from tests.engine_tools import make_config, make_engine
from tests.models import DRAFTER, TARGET

PROMPT = tuple(range(300, 400)) + tuple(range(350, 380))


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    """``[N-1, V]`` of each prompt token but the first."""
    model: Any = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([PROMPT])).logits[0, :-1]
    return logits.log_softmax(dim=-1)


def request(request_id: str, num_top: int | None, **sampling: Any) -> Request:
    params = SamplingParams(
        **{"temperature": 0.0, "max_tokens": 3, "prompt_logprobs": num_top, **sampling}
    )
    return Request(request_id=request_id, prompt_token_ids=PROMPT, sampling=params)


def config(**changes: Any) -> ClusterConfig:
    return make_config(TARGET, DRAFTER, max_model_len=256, max_num_seqs=8, **changes)


def run_to_end(engine: Any, requests: list[Request]) -> dict[str, Any]:
    """What each has of its prompt, and its tokens; scores come with the first output alone."""
    for entry in requests:
        engine.add_request(entry)
    found: dict[str, Any] = {entry.request_id: ((), []) for entry in requests}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            scores, tokens = found[output.request_id]
            if output.prompt_logprobs:
                assert not tokens
                scores = output.prompt_logprobs
            found[output.request_id] = (scores, [*tokens, *output.token_ids])
        engine.check()
    return found


def check(scores: tuple[PositionLogprobs, ...], num_top: int, reference: torch.Tensor) -> None:
    assert [position.chosen.token_id for position in scores] == list(PROMPT[1:])
    for row, position in enumerate(scores):
        best = reference[row].topk(num_top).values.tolist()
        assert [top.logprob for top in position.top] == pytest.approx(best, abs=1e-4)
        for entry in (position.chosen, *position.top):
            assert entry.logprob == pytest.approx(float(reference[row, entry.token_id]), abs=1e-4)


@pytest.mark.parametrize(
    ("max_rows", "max_tokens"), [(256, 256), (7, 64), (256, 24)], ids=["whole", "rows", "chunks"]
)
def test_they_are_the_target_s_own(
    reference: torch.Tensor, max_rows: int, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_SCORED_ROWS", max_rows)
    engine = make_engine(config(max_num_batched_tokens=max_tokens))
    plain = run_to_end(engine, [request("warm", None)])["warm"]  # its pages could be found now
    requests = [request("a", 2), request("b", None), request("c", 0, temperature=1.0, seed=1)]
    found = run_to_end(engine, requests)
    check(found["a"][0], 2, reference)
    check(found["c"][0], 0, reference)
    assert found["b"][0] == plain[0] == ()
    assert found["a"][1] == found["b"][1] == plain[1]


def test_a_prompt_alone_may_fill_the_context(reference: torch.Tensor) -> None:
    whole = make_config(
        TARGET, DRAFTER, max_model_len=len(PROMPT), max_num_seqs=8, max_num_batched_tokens=64
    )
    engine = make_engine(whole)
    with pytest.raises(InvalidRequestError) as caught:
        engine.add_request(request("a", 1, max_tokens=1))
    assert caught.value.field == "prompt"
    found = run_to_end(engine, [request(name, 1, max_tokens=0) for name in "ab"])
    for scores, tokens in found.values():
        check(scores, 1, reference)
        assert not tokens
    assert run_to_end(engine, [request("c", None, max_tokens=0)])["c"] == ((), [])
    assert engine.load().num_output_tokens == 0
    assert engine.load().kv_cache_usage == 0.0


def test_a_preempted_prompt_is_scored_once(reference: torch.Tensor) -> None:
    engine = make_engine(config(max_num_batched_tokens=16))
    engine.add_request(request("a", 1))
    for _ in range(3):
        assert not engine.step()
    sequence = engine._sequences["a"]
    assert 0 < len(sequence.prompt_logprobs) < len(PROMPT) - 1
    engine._scheduler.preempt(sequence)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    check(outputs[0].prompt_logprobs, 1, reference)
    assert not any(output.prompt_logprobs for output in outputs[1:])


def test_what_is_asked_for_is_bounded() -> None:
    params = SamplingParams(prompt_logprobs=20)
    wide = Request(request_id="x", prompt_token_ids=(1,) * 9600, sampling=params)
    with pytest.raises(InvalidRequestError) as caught:
        wide.validate(vocab_size=10, max_model_len=20_000)
    assert caught.value.field == "sampling.prompt_logprobs"
    with pytest.raises(InvalidRequestError):
        SamplingParams(prompt_logprobs=21).validate(10)


def test_a_long_echo_holds_the_router_no_longer_by_token() -> None:
    """Its offsets were sums of all before them: minutes, in which no other stream goes on."""

    class Texts:
        def text(self, token_id: int) -> str:
            return "ab"

    num_tokens = 100_000
    position = PositionLogprobs(TokenLogprob(1, -0.5))
    started = time.process_time()
    shaped = completion_logprobs([position] * num_tokens, [2] * num_tokens, 7, cast(Any, Texts()))
    assert time.process_time() - started < 5
    assert shaped["text_offset"] == list(range(7, 7 + 2 * num_tokens, 2))
