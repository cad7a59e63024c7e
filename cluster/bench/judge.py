"""Is an output what plain transformers would have said? (DESIGN.md, rule 9)

Batch shape, shard layout and recomputation change logits in the last bits. So outputs are not
compared with a reference output, in which one near-tie changes everything behind it; instead ours
is teacher-forced through the reference, and at every position our token's score must be within
epsilon of the best one's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.request import SamplingParams
from cluster.speculation.coupling import gumbel_noise
from cluster.speculation.sampling import SamplingBatch, process_logits

EPSILON_FP32 = 1e-4


@dataclass(frozen=True)
class Judgement:
    """Positions of one or more outputs, by what the reference says of them.

    Attributes:
        num_positions: judged, every one also behind a tie.
        num_within_epsilon: where our token is not the reference's best, but within epsilon of it.
        num_mismatches: where it is neither.
    """

    num_positions: int = 0
    num_within_epsilon: int = 0
    num_mismatches: int = 0

    def __add__(self, other: Judgement) -> Judgement:
        return Judgement(
            self.num_positions + other.num_positions,
            self.num_within_epsilon + other.num_within_epsilon,
            self.num_mismatches + other.num_mismatches,
        )


class JudgedAnswer(Protocol):
    """A request and its answer, as far as that has come."""

    @property
    def prompt_token_ids(self) -> tuple[int, ...]: ...

    @property
    def sampling(self) -> SamplingParams: ...

    @property
    def token_ids(self) -> Sequence[int]: ...


def judge_answers(target: str, answers: Iterable[JudgedAnswer]) -> Judgement:
    """Adds up ``judge`` over answers, against the checkpoint folder ``target`` in float32; those
    without tokens say nothing."""
    reference = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    verdict = Judgement()
    for answer in answers:
        if answer.token_ids:
            verdict += judge(
                reference,
                prompt_token_ids=list(answer.prompt_token_ids),
                output_token_ids=list(answer.token_ids),
                params=answer.sampling,
            )
    return verdict


@torch.inference_mode()
def judge(
    reference: PreTrainedModel,
    *,
    prompt_token_ids: list[int],
    output_token_ids: list[int],
    params: SamplingParams,
    choice_index: int = 0,
    epsilon: float = EPSILON_FP32,
) -> Judgement:
    """Teacher-forces a greedy or seeded output through the reference.

    Args:
        reference: a plain transformers model of the same checkpoint, any attention.
        params: greedy, or with a seed; no penalties, bias or ``min_tokens``.
        epsilon: bound at temperature 1; below that it grows as 1/T (the score is logit/T).

    Raises:
        ValueError: the output is not reproducible, so that there is nothing to judge.
    """
    if not params.is_greedy and params.seed is None:
        raise ValueError("only greedy and seeded outputs can be judged")
    if params.has_penalties or params.logit_bias or params.min_tokens:
        raise ValueError("penalties, bias and min_tokens are not judged")
    if params.allowed_token_ids or params.bad_words:
        raise ValueError("outputs of some tokens only are not judged")
    token_ids = torch.tensor([prompt_token_ids + output_token_ids])
    first = len(prompt_token_ids) - 1
    logits = reference(token_ids, use_cache=False).logits[0, first:-1].float()
    ours = torch.tensor(output_token_ids)
    if params.is_greedy:
        scores, is_kept, threshold = logits, torch.ones_like(logits, dtype=torch.bool), -math.inf
        tolerance = epsilon
        thresholds = torch.full((len(logits), 1), threshold)
    else:
        scores, is_kept, thresholds = _seeded_scores(logits, params, first + 1, choice_index)
        logits = logits / params.temperature
        tolerance = epsilon / min(params.temperature, 1.0)
    # A token whose logit is within the tolerance of a truncation's threshold may be in or out.
    at_boundary = (logits - thresholds).abs() <= tolerance
    best_certain = scores.masked_fill(~is_kept | at_boundary, -math.inf).max(dim=-1).values
    best = scores.masked_fill(~is_kept, -math.inf).argmax(dim=-1)
    our_score = scores.gather(1, ours.unsqueeze(1)).squeeze(1)
    ours_allowed = (is_kept | at_boundary).gather(1, ours.unsqueeze(1)).squeeze(1)
    is_best = best == ours
    is_near = ours_allowed & (our_score >= best_certain - tolerance) & ~is_best
    return Judgement(
        num_positions=len(ours),
        num_within_epsilon=int(is_near.sum()),
        num_mismatches=int((~is_best & ~is_near).sum()),
    )


def _seeded_scores(
    logits: torch.Tensor, params: SamplingParams, first_position: int, choice_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores (logit/T plus noise), what truncation keeps, and its threshold on logit/T.

    Returns:
        ``[N, V]`` float64, ``[N, V]`` bool, ``[N, 1]``.
    """
    num_rows, vocab_size = logits.shape
    batch = SamplingBatch.from_params([params] * num_rows)
    is_kept = process_logits(logits, batch) > -math.inf
    scaled = logits / params.temperature
    thresholds = scaled.masked_fill(~is_kept, math.inf).min(dim=-1, keepdim=True).values
    noise = gumbel_noise(
        seeds=torch.full((num_rows,), params.seed or 0),
        choice_indices=torch.full((num_rows,), choice_index),
        positions=torch.arange(first_position, first_position + num_rows),
        token_ids=torch.arange(vocab_size),
    )
    return scaled.double() + noise, is_kept, thresholds
