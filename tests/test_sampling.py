"""Processed laws against the plain-Python reference, and their rules one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cluster.request import SamplingParams
from cluster.speculation.sampling import (
    SamplingBatch,
    adjust_logits,
    block_token_counts,
    process_logits,
    sample_from_probs,
)
from tests.law import reference_next_token_law

VOCAB_SIZE = 7


def laws(
    logits: torch.Tensor,
    params: list[SamplingParams],
    *,
    prompts: list[list[int]] | None = None,
    outputs: list[list[int]] | None = None,
    allowed_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[N, V]`` probabilities by ``process_logits``, with the state that the engine keeps."""
    prompts = prompts or [[]] * len(params)
    outputs = outputs or [[]] * len(params)
    batch = SamplingBatch.from_params(params)
    penalised = batch.penalised_rows.tolist()
    vocab_size = logits.shape[1]
    counts = [np.bincount(outputs[row], minlength=vocab_size) for row in penalised]
    masks = [np.bincount(prompts[row], minlength=vocab_size) > 0 for row in penalised]
    logprobs = process_logits(
        logits,
        batch,
        num_output_tokens=torch.tensor([len(output) for output in outputs]),
        output_counts=torch.from_numpy(np.array(counts)) if penalised else None,
        prompt_mask=torch.from_numpy(np.array(masks)) if penalised else None,
        allowed_mask=allowed_mask,
    )
    return logprobs.exp()


token_lists = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=5)
sampling_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.integers(0, VOCAB_SIZE + 2),
    top_p=st.sampled_from([0.07, 0.31, 0.77, 0.96, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.37, 1.0]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.5]),
    presence_penalty=st.sampled_from([-0.4, 0.0, 0.9]),
    frequency_penalty=st.sampled_from([-0.2, 0.0, 0.6]),
    min_tokens=st.integers(0, 3),
    stop_token_ids=st.sampled_from([(), (0,), (2, 5)]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.sampled_from([-3.0, 0.7, 4.0])),
)


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.tuples(sampling_params, token_lists, token_lists), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_mixed_batches_match_the_reference(
    rows: list[tuple[SamplingParams, list[int], list[int]]], seed: int
) -> None:
    params, prompts, outputs = (list(column) for column in zip(*rows, strict=True))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), VOCAB_SIZE, generator=generator) * 3
    kept_logits = logits.clone()
    result = laws(logits, params, prompts=prompts, outputs=outputs)
    assert torch.equal(logits, kept_logits)
    for row, (request, prompt, output) in enumerate(rows):
        expected = reference_next_token_law(
            logits[row].tolist(), request, prompt=prompt, output=output
        )
        np.testing.assert_allclose(result[row].numpy(), expected, atol=2e-6)
        assert np.array_equal(result[row].numpy() > 0, expected > 0)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(top_k=2), [0.4, 0.2, 0.2, 0.2, 0]),
        (SamplingParams(top_p=0.5), [0.4, 0.2, 0.2, 0.2, 0]),
        (SamplingParams(min_p=0.5), [0.4, 0.2, 0.2, 0.2, 0]),
        (SamplingParams(top_k=1), [1.0, 0, 0, 0, 0]),
        (SamplingParams(top_p=1e-6), [1.0, 0, 0, 0, 0]),
    ],
)
def test_ties_at_a_boundary_stay(params: SamplingParams, expected: list[float]) -> None:
    logits = torch.tensor([[4.0, 2.0, 2.0, 2.0, 1.0]]).log()
    law = laws(logits, [params])[0]
    torch.testing.assert_close(law, torch.tensor(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.9999])
@pytest.mark.parametrize("top_k", [0, 40, 400])
def test_large_vocabulary_is_truncated_as_the_reference_does(top_k: int, top_p: float) -> None:
    """Flat and peaked rows together: the nucleus of some is far wider than that of others."""
    params = SamplingParams(top_k=top_k, top_p=top_p)
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(8))
    logits *= torch.tensor([[0.1], [2.0], [9.0]])
    result = laws(logits, [params] * 3)
    for row in range(3):
        expected = reference_next_token_law(logits[row].tolist(), params, prompt=(), output=())
        assert abs(int((result[row] > 0).sum()) - int((expected > 0).sum())) <= 1  # rounding
        np.testing.assert_allclose(result[row].numpy(), expected, atol=2e-3)


def test_greedy_is_one_hot_at_the_lowest_of_the_best_after_penalties_and_bias() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    assert laws(logits, [SamplingParams(temperature=0)])[0].tolist() == [0, 1, 0, 0]
    penalised = SamplingParams(temperature=0, presence_penalty=0.5)
    assert laws(logits, [penalised], outputs=[[1]])[0].tolist() == [0, 0, 1, 0]
    biased = SamplingParams(temperature=0, logit_bias={3: 9.0})
    assert laws(logits, [biased])[0].tolist() == [0, 0, 0, 1]
    assert adjust_logits(logits, SamplingBatch.from_params([biased])).argmax().item() == 3


@pytest.mark.parametrize("temperature", [1e-38, 1e-60])
def test_tiny_temperature_stays_finite_and_picks_the_best(temperature: float) -> None:
    law = laws(torch.tensor([[50.0, -40.0, 10.0]]), [SamplingParams(temperature=temperature)])
    assert law[0].tolist() == [1, 0, 0]


def test_grammar_mask_wins_over_the_best_token() -> None:
    allowed = torch.tensor([[False, True, True]])
    law = laws(torch.tensor([[9.0, 1.0, 1.0]]), [SamplingParams()], allowed_mask=allowed)
    assert law[0].tolist() == [0, 0.5, 0.5]


def test_min_tokens_holds_back_stop_tokens_and_eos() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=(0,))
    logits = torch.zeros(1, 3)

    def support(request: SamplingParams, num_output_tokens: int) -> list[bool]:
        batch = SamplingBatch.from_params([request], eos_token_ids=[2])
        count = torch.tensor([num_output_tokens])
        return (process_logits(logits, batch, num_output_tokens=count)[0] > -torch.inf).tolist()

    assert support(params, 1) == [False, True, False]
    assert support(params, 2) == [True, True, True]
    ignoring = SamplingParams(min_tokens=2, stop_token_ids=(0,), ignore_eos=True)
    assert support(ignoring, 1) == [False, True, True]


def test_half_precision_logits_are_processed_in_float32() -> None:
    law = laws(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), [SamplingParams()])
    assert law.dtype == torch.float32


@pytest.mark.parametrize(
    "params",
    [SamplingParams(presence_penalty=1), SamplingParams(min_tokens=1, stop_token_ids=(0,))],
)
def test_missing_state_is_refused(params: SamplingParams) -> None:
    with pytest.raises(ValueError, match="rows with"):
        process_logits(torch.zeros(1, 3), SamplingBatch.from_params([params]))


def test_block_positions_are_processed_as_if_the_draft_stood() -> None:
    """An expanded batch equals one call a position with the drafted tokens committed."""
    params = [
        SamplingParams(presence_penalty=0.7, frequency_penalty=0.3, logit_bias={1: 1.0}),
        SamplingParams(temperature=0.5, top_k=3, min_tokens=3, stop_token_ids=(1, 2)),
        SamplingParams(repetition_penalty=1.6, min_p=0.1),
    ]
    prompts, outputs, drafted = [[1], [2], [3]], [[0, 0], [4], []], [[5, 0], [1, 1], [6, 6]]
    logits = torch.randn(3, 3, VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    batch = SamplingBatch.from_params(params).expand(3)
    penalised = [0, 2]
    committed = torch.tensor(
        np.array([np.bincount(outputs[row], minlength=VOCAB_SIZE) for row in penalised])
    )
    counts = block_token_counts(
        committed, torch.tensor([drafted[row] for row in penalised]), torch.tensor([2, 2])
    )
    prompt_mask = torch.zeros(2, VOCAB_SIZE, dtype=torch.bool)
    prompt_mask[0, 1] = prompt_mask[1, 3] = True
    result = process_logits(
        logits.flatten(0, 1),
        batch,
        num_output_tokens=torch.tensor([2, 3, 4, 1, 2, 3, 0, 1, 2]),
        output_counts=counts.flatten(0, 1),
        prompt_mask=prompt_mask.repeat_interleave(3, dim=0),
    ).exp()
    for row, request in enumerate(params):
        for k in range(3):
            expected = reference_next_token_law(
                logits[row, k].tolist(),
                request,
                prompt=prompts[row],
                output=outputs[row] + drafted[row][:k],
            )
            np.testing.assert_allclose(result[row * 3 + k].numpy(), expected, atol=1e-6)


def test_block_counts_leave_out_what_is_behind_the_draft() -> None:
    committed = torch.tensor([[1, 0, 0], [0, 0, 2]], dtype=torch.int32)
    counts = block_token_counts(committed, torch.tensor([[0, 1], [2, -1]]), torch.tensor([2, 1]))
    assert counts.dtype == torch.int32
    assert counts.tolist() == [
        [[1, 0, 0], [2, 0, 0], [2, 1, 0]],
        [[0, 0, 2], [0, 0, 3], [0, 0, 3]],
    ]


def test_sampling_has_the_law_and_never_takes_a_zero() -> None:
    probs = torch.tensor([0.0, 0.7, 0.1, 0.2, 0.0])
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty(100_000, 5).exponential_(generator=generator)
    counts = torch.bincount(sample_from_probs(probs, noise), minlength=5).numpy()
    assert counts[0] == counts[4] == 0
    assert stats.chisquare(counts[1:4], [70_000, 10_000, 20_000]).pvalue > 1e-4
    assert sample_from_probs(probs, torch.zeros(5)).item() == 1
