"""The shipped pair against plain transformers on held-out code (rule 9 of DESIGN.md)."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.bench import parity
from cluster.engine.target_config import load_tokenizer
from cluster.request import Request, SamplingParams
from tests.engine_tools import make_config, make_engine, run
from tests.models import DRAFTER, TARGET
from tests.test_engine import incremental_greedy


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("num_prompts", "max_tokens"),
    [
        (6, 16),
        pytest.param(24, 32, marks=pytest.mark.slow),
        pytest.param(100, 48, marks=pytest.mark.full),
    ],
    ids=["6-prompts", "24-prompts", "100-prompts"],
)
def test_heldout_prompts_agree_with_transformers(num_prompts: int, max_tokens: int) -> None:
    report = parity.run(
        target=TARGET, drafter=DRAFTER, num_prompts=num_prompts, max_tokens=max_tokens
    )
    print(report.to_text())
    assert report.figures["mismatches"] == 0
    assert report.figures["prompts"] == num_prompts
    # An output may end early at the end-of-text token, never beyond max_tokens.
    assert 0 < report.figures["positions"] <= 3 * num_prompts * max_tokens
    assert report.figures["positions"] > 1.5 * num_prompts * max_tokens


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "num_prompts",
    [2, pytest.param(6, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.full)],
)
def test_deterministic_mode_equals_transformers_bit_for_bit(num_prompts: int) -> None:
    prompts = parity.heldout_prompts(load_tokenizer(TARGET), num_prompts, seed=1)
    params = SamplingParams(temperature=0.0, max_tokens=16, logprobs=0, ignore_eos=True)
    requests = [
        Request(request_id=str(i), prompt_token_ids=prompt[:160], sampling=params)
        for i, prompt in enumerate(prompts)
    ]
    done = run(make_engine(make_config(TARGET, DRAFTER, deterministic=True)), requests)
    reference = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    for request in requests:
        tokens, logprobs = incremental_greedy(reference, request.prompt_token_ids, 16)
        completion = done[request.request_id]
        assert completion.token_ids == tokens
        assert [p.chosen.logprob for p in completion.logprobs] == logprobs
