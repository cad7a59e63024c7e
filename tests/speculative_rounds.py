"""Speculative decoding by the pure functions alone, with mistakes to plant, for the law test.

Target and drafter are tables of logits by the two tokens before. Samples are one batch: what is
200,000 samples to the statistics is one step of 200,000 requests to the scheduler.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from cluster.request import SamplingParams
from cluster.speculation.budget import BudgetPlanner, FixedBudget
from cluster.speculation.cost_model import CostModel
from cluster.speculation.coupling import coupled_pick, gumbel_noise
from cluster.speculation.proposal import dequantize_draft_probs, quantize_draft_probs
from cluster.speculation.sampling import (
    SamplingBatch,
    block_token_counts,
    process_logits,
    sample_from_probs,
)
from cluster.speculation.verification import Verification, verify_coupled, verify_rejection
from tests.law import exact_law, reference_next_token_law

Floats = npt.NDArray[np.float64]


class Verifier(enum.Enum):
    REJECTION = enum.auto()
    ONE_HOT = enum.auto()  # rejection that does not trust the drafter's law
    COUPLED = enum.auto()


class Fault(enum.Enum):
    """Mistakes that a law test must catch; see also ``tests.law.shift_law``."""

    DRAFT_PROB_AS_CONFIDENCE = enum.auto()  # admission by q(x_k)
    SHARED_NOISE = enum.auto()  # one noise for drafting and accepting
    NOT_RENORMALISED = enum.auto()  # verifies with truncated q, sampled from renormalised q
    STALE_PENALTIES = enum.auto()  # block positions processed without the drafted tokens before


@dataclass(frozen=True)
class Case:
    """One way to generate; the defaults are the plainest."""

    name: str
    verifier: Verifier
    params: SamplingParams = field(default_factory=SamplingParams)
    planner: Callable[[], BudgetPlanner] = lambda: FixedBudget(3)
    group_size: int | None = None  # requests that one step plans together; None: all samples


VOCAB_SIZE = 6
NUM_TOKENS = 4
NUM_DRAFT_TOKENS = 3
WIRE_TOP_K = 4
PROMPT = (1, 4)


def _random_tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[V, V, V]`` by the two tokens before, of a target and a drafter near it."""
    generator = torch.Generator().manual_seed(11)
    shape = (VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE)
    target = torch.randn(shape, generator=generator) * 1.2
    return target, target + torch.randn(shape, generator=generator) * 0.9


TARGET_TABLE, DRAFT_TABLE = _random_tables()


def target_law(params: SamplingParams) -> Floats:
    """Exact joint law of ``NUM_TOKENS`` tokens of the table target after ``PROMPT``."""

    def next_token_law(output: tuple[int, ...]) -> Floats:
        before, last = (*PROMPT, *output)[-2:]
        logits = TARGET_TABLE[before, last].tolist()
        return reference_next_token_law(logits, params, prompt=PROMPT, output=output)

    return exact_law(next_token_law, vocab_size=VOCAB_SIZE, num_tokens=NUM_TOKENS)


def generate(
    case: Case, *, num_samples: int, seed: int, fault: Fault | None = None
) -> npt.NDArray[np.int64]:
    """``[num_samples, NUM_TOKENS]`` outputs of speculative decoding by the pure functions."""
    rounds = _Rounds(case, seed, fault)
    start, end = len(PROMPT), len(PROMPT) + NUM_TOKENS
    tokens = torch.zeros(num_samples, end + NUM_DRAFT_TOKENS, dtype=torch.int64)
    tokens[:, :start] = torch.tensor(PROMPT)
    lengths = torch.full((num_samples,), start)
    seeds = torch.arange(num_samples) + seed * num_samples
    while (rows := (lengths < end).nonzero().flatten()).numel() > 0:
        verification = rounds.run(tokens[rows], lengths[rows], seeds[rows])
        columns = lengths[rows].unsqueeze(1) + torch.arange(NUM_DRAFT_TOKENS + 1)
        outputs = verification.output_token_ids.clamp(min=0)  # what is behind the outputs: unread
        tokens[rows] = tokens[rows].scatter(1, columns, outputs)
        lengths[rows] += verification.num_output_tokens
    return tokens[:, start:end].numpy()


@dataclass(frozen=True)
class _Draft:
    token_ids: torch.Tensor  # [R, K]
    prob_token_ids: torch.Tensor  # [R, K, T]
    prob_values: torch.Tensor  # [R, K, T], as verified
    probs: torch.Tensor  # [R, K, V], as sampled
    noise: torch.Tensor  # [R, K, T] exponential, of the sampling


class _Rounds:
    """Rounds of drafting, planning and verifying for many samples at once."""

    def __init__(self, case: Case, seed: int, fault: Fault | None) -> None:
        self._case = case
        self._fault = fault
        self._params = SamplingBatch.from_params([case.params])
        self._planner = case.planner()
        streams = [torch.Generator().manual_seed(seed * 3 + i) for i in range(3)]
        self._draft_stream, self._accept_stream, self._recovery_stream = streams

    def run(self, tokens: torch.Tensor, lengths: torch.Tensor, seeds: torch.Tensor) -> Verification:
        draft = self._draft(tokens, lengths, seeds)
        target_logprobs = self._target_logprobs(tokens, lengths, draft.token_ids)
        target_probs = target_logprobs.exp()
        num_draft_tokens = self._plan(draft, target_probs)
        if self._case.verifier is Verifier.COUPLED:
            positions = lengths.unsqueeze(1) + torch.arange(NUM_DRAFT_TOKENS + 1)
            noise = _noise(seeds.repeat_interleave(NUM_DRAFT_TOKENS + 1), positions.flatten())
            picks = coupled_pick(target_logprobs.flatten(0, 1), noise).view_as(positions)
            return verify_coupled(
                target_picks=picks,
                draft_token_ids=draft.token_ids,
                num_draft_tokens=num_draft_tokens,
            )
        accept_uniforms = torch.rand(draft.token_ids.shape, generator=self._accept_stream)
        if self._fault is Fault.SHARED_NOISE:
            is_drafted = draft.prob_token_ids == draft.token_ids.unsqueeze(-1)
            accept_uniforms = 1 - torch.exp(-(draft.noise * is_drafted).sum(dim=-1))
        recovery_noise = torch.empty(len(tokens), VOCAB_SIZE)
        has_law = self._case.verifier is Verifier.REJECTION
        return verify_rejection(
            target_probs=target_probs,
            draft_token_ids=draft.token_ids,
            draft_prob_token_ids=draft.prob_token_ids if has_law else None,
            draft_prob_values=draft.prob_values if has_law else None,
            num_draft_tokens=num_draft_tokens,
            accept_uniforms=accept_uniforms,
            recovery_noise=recovery_noise.exponential_(generator=self._recovery_stream),
        )

    def _draft(self, tokens: torch.Tensor, lengths: torch.Tensor, seeds: torch.Tensor) -> _Draft:
        num_rows = len(tokens)
        batch = self._params.expand(num_rows)
        token_ids = torch.zeros(num_rows, NUM_DRAFT_TOKENS, dtype=torch.int64)
        slots = []
        for k in range(NUM_DRAFT_TOKENS):
            context = _with_drafted(tokens, lengths, token_ids)
            logits = _table_logits(DRAFT_TABLE, context, lengths + k)
            counts = self._counts(context, lengths + k)
            logprobs = self._process(logits, batch, lengths + k, counts)
            prob_token_ids, values = quantize_draft_probs(logprobs.exp(), WIRE_TOP_K)
            prob_token_ids = prob_token_ids.to(torch.int64)
            probs = dequantize_draft_probs(values)
            noise = torch.empty_like(probs).exponential_(generator=self._draft_stream)
            if self._case.verifier is Verifier.COUPLED:
                token_ids[:, k] = coupled_pick(logprobs, _noise(seeds, lengths + k))
            else:
                sampled = sample_from_probs(probs, noise).unsqueeze(1)
                token_ids[:, k] = prob_token_ids.gather(1, sampled).squeeze(1)
            if self._fault is Fault.NOT_RENORMALISED:
                slots.append((prob_token_ids, values.float(), probs, noise))
            else:
                slots.append((prob_token_ids, probs, probs, noise))
        ids, values, probs, noise = (torch.stack(parts, 1) for parts in zip(*slots, strict=True))
        dense = torch.zeros(*ids.shape[:2], VOCAB_SIZE).scatter_add(2, ids, probs)
        return _Draft(token_ids, ids, values, dense, noise)

    def _target_logprobs(
        self, tokens: torch.Tensor, lengths: torch.Tensor, draft_token_ids: torch.Tensor
    ) -> torch.Tensor:
        """``[R, K+1, V]`` processed log-probabilities of the verifying pass."""
        num_rows, num_columns = draft_token_ids.shape
        context = _with_drafted(tokens, lengths, draft_token_ids)
        positions = lengths.unsqueeze(1) + torch.arange(num_columns + 1)
        logits = [_table_logits(TARGET_TABLE, context, ends) for ends in positions.unbind(1)]
        counts = self._counts(context, lengths)
        if counts is not None:
            num_counted = 0 if self._fault is Fault.STALE_PENALTIES else num_columns
            num_counted_tokens = torch.full((num_rows,), num_counted)
            counts = block_token_counts(counts, draft_token_ids, num_counted_tokens).flatten(0, 1)
        batch = self._params.expand(num_rows).expand(num_columns + 1)
        logits_rows = torch.stack(logits, 1).flatten(0, 1)
        logprobs = self._process(logits_rows, batch, positions.flatten(), counts)
        return logprobs.view(num_rows, num_columns + 1, VOCAB_SIZE)

    def _process(
        self,
        logits: torch.Tensor,
        batch: SamplingBatch,
        lengths: torch.Tensor,
        output_counts: torch.Tensor | None,
    ) -> torch.Tensor:
        prompt_mask = torch.zeros(1, VOCAB_SIZE, dtype=torch.bool)
        prompt_mask[0, list(PROMPT)] = True
        return process_logits(
            logits,
            batch,
            num_output_tokens=lengths - len(PROMPT),
            output_counts=output_counts,
            prompt_mask=prompt_mask.expand(len(logits), -1),
        )

    def _counts(self, context: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor | None:
        """``[R, V]`` counts of the output tokens before ``lengths``, where penalties need them."""
        if not self._case.params.has_penalties:
            return None
        columns = torch.arange(context.shape[1])
        is_output = (columns >= len(PROMPT)) & (columns < lengths.unsqueeze(1))
        counts = torch.zeros(len(context), VOCAB_SIZE, dtype=torch.int64)
        return counts.scatter_add(1, context, is_output.to(torch.int64))

    def _plan(self, draft: _Draft, target_probs: torch.Tensor) -> torch.Tensor:
        """Budget by the expected acceptance at each prefix, which token k does not enter."""
        overlap = torch.minimum(draft.probs, target_probs[:, :NUM_DRAFT_TOKENS]).sum(dim=-1)
        if self._fault is Fault.DRAFT_PROB_AS_CONFIDENCE:
            overlap = draft.probs.gather(2, draft.token_ids.unsqueeze(-1)).squeeze(-1)
        confidences = overlap.clamp(max=1).double().numpy()
        num_rows = len(confidences)
        size = self._case.group_size or num_rows
        plans = [
            self._plan_step(confidences[start : start + size]) for start in range(0, num_rows, size)
        ]
        return torch.from_numpy(np.concatenate(plans))

    def _plan_step(self, confidences: Floats) -> npt.NDArray[np.int64]:
        num_rows = len(confidences)
        return self._planner.plan(
            confidences,
            np.full(num_rows, NUM_DRAFT_TOKENS),
            cost_model=step_cost_model(num_rows),
            num_requests=num_rows,
            num_base_tokens=num_rows,
        )


@functools.cache
def step_cost_model(num_requests: int) -> CostModel:
    """A pass whose every token counts, in proportion to the step: planners must choose.

    In milliseconds, since hundreds of thousands of requests may be in one step.
    """
    sizes = (1, num_requests * (NUM_DRAFT_TOKENS + 1))
    return CostModel({size: (3 * num_requests + size) * 1e-3 for size in sizes})


class RetrospectiveBudget:
    """The illegal planner of DSpark's appendix A: each request's best length in hindsight.

    Whether token 1 is verified depends on c_2, which was computed from token 1. Here only long
    prefixes pay, as where a step of the verify curve lies between none and one.
    """

    _SECONDS = np.array([1.0, 2.2, 2.2, 2.2])

    def plan(
        self,
        confidences: Floats,
        num_candidates: npt.NDArray[np.int64],
        *,
        cost_model: CostModel,
        num_requests: int,
        num_base_tokens: int,
        num_context_tokens: int = 0,
    ) -> npt.NDArray[np.int64]:
        survival = np.cumprod(confidences, axis=1)
        expected = 1 + np.cumsum(np.pad(survival, ((0, 0), (1, 0))), axis=1)
        return np.argmax(expected / self._SECONDS, axis=1)


def _noise(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return gumbel_noise(
        seeds=seeds,
        choice_indices=torch.zeros_like(seeds),
        positions=positions,
        token_ids=torch.arange(VOCAB_SIZE),
    )


def _with_drafted(
    tokens: torch.Tensor, lengths: torch.Tensor, draft_token_ids: torch.Tensor
) -> torch.Tensor:
    columns = lengths.unsqueeze(1) + torch.arange(draft_token_ids.shape[1])
    return tokens.scatter(1, columns, draft_token_ids)


def _table_logits(table: torch.Tensor, context: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """``[R, V]`` logits of the token at column ``ends`` of each row."""
    before, last = (context.gather(1, (ends - i).unsqueeze(1)).squeeze(1) for i in (2, 1))
    return table[before, last]
