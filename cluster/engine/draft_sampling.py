"""How a drafter picks its tokens, for a batch in which requests ask for different things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cluster.engine.draft_client import DraftSampling
from cluster.engine.draft_method import Draft
from cluster.request import SamplingParams
from cluster.speculation.coupling import coupled_pick, gumbel_noise
from cluster.speculation.proposal import (
    DraftProposal,
    dequantize_draft_probs,
    quantize_draft_probs,
)
from cluster.speculation.sampling import SamplingBatch, process_logits, sample_from_probs


@dataclass(frozen=True, eq=False)
class DraftPick:
    """One drafted token for each of B sequences.

    ``prob_token_ids`` and ``prob_values`` are ``[S, T]`` (int32, float16): the wire form of the
    laws of the S sampled rows (``DraftSampler.sampled_rows``), or ``None`` when there are none.
    """

    token_ids: torch.Tensor  # [B] int64
    prob_token_ids: torch.Tensor | None
    prob_values: torch.Tensor | None


class DraftSampler:
    """Picks tokens of B sequences, position by position.

    Guarantees: greedy and coupled rows depend on their own logits, seed, choice and position only;
    a sampled row is drawn from exactly the law that its wire form restores to.

    Args:
        samplings: of the B sequences.
        first_positions: absolute position in its sequence of each row's first drafted token.
        top_k: entries of a sampled row's law.
        generator: the drafter's own randomness, shared with nobody.
        device: of the logits.
    """

    def __init__(
        self,
        samplings: Sequence[DraftSampling],
        first_positions: npt.NDArray[np.int64],
        *,
        top_k: int,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        is_coupled = [s.seed is not None and s.temperature > 0 for s in samplings]
        is_sampled = [s.seed is None and s.temperature > 0 for s in samplings]
        coupled = [s for s, wanted in zip(samplings, is_coupled, strict=True) if wanted]
        self.sampled_rows = np.flatnonzero(is_sampled)
        self._is_greedy = not coupled and len(self.sampled_rows) == 0
        self._top_k = top_k
        self._generator = generator
        if self._is_greedy:
            return
        self._batch = SamplingBatch.from_params(
            [
                SamplingParams(
                    temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p
                )
                for s in samplings
            ],
            device=device,
        )
        coupled_rows = np.flatnonzero(is_coupled)

        def integers(values: Sequence[int] | npt.NDArray[np.int64]) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.int64).to(device, non_blocking=True)

        self._sampled_rows = integers(self.sampled_rows)
        self._coupled_rows = integers(coupled_rows)
        self._coupled_positions = integers(first_positions[coupled_rows])
        self._seeds = integers([s.seed or 0 for s in coupled])
        self._choices = integers([s.choice_index for s in coupled])

    def pick(self, logits: torch.Tensor, index: int) -> DraftPick:
        """Picks the token at ``index`` of the block.

        Args:
            logits: ``[B, V]`` of that position, given the tokens picked before it.
            index: from 0.
        """
        if self._is_greedy:
            return DraftPick(logits.argmax(dim=-1), None, None)
        logprobs = process_logits(logits, self._batch)
        token_ids = logprobs.argmax(dim=-1)
        if len(self._coupled_rows) > 0:
            noise = gumbel_noise(
                seeds=self._seeds,
                choice_indices=self._choices,
                positions=self._coupled_positions + index,
                token_ids=torch.arange(logits.shape[-1], device=logits.device),
            )
            token_ids[self._coupled_rows] = coupled_pick(logprobs[self._coupled_rows], noise)
        if len(self._sampled_rows) == 0:
            return DraftPick(token_ids, None, None)
        columns, values = quantize_draft_probs(logprobs[self._sampled_rows].exp(), self._top_k)
        probs = dequantize_draft_probs(values)
        noise = torch.empty_like(probs).exponential_(generator=self._generator)
        chosen = sample_from_probs(probs, noise).unsqueeze(1)
        token_ids[self._sampled_rows] = columns.gather(1, chosen).squeeze(1).to(torch.int64)
        return DraftPick(token_ids, columns, values)


class ProposalDrawing:
    """Draws the tokens of B drafts, position by position, and makes their proposals.

    Guarantees: those of ``DraftSampler``; a proposal carries the laws of its tokens exactly when
    its session asked for them.

    Args:
        drafts: the B drafts.
        top_k, generator, device: as in ``DraftSampler``.
    """

    def __init__(
        self,
        drafts: Sequence[Draft],
        *,
        top_k: int,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self._drafts = drafts
        self._samplings = [draft.session.sampling for draft in drafts]
        committed = np.array([d.sequence.committed_length for d in drafts], dtype=np.int64)
        self._sampler = DraftSampler(
            self._samplings, committed, top_k=top_k, generator=generator, device=device
        )
        self._token_ids: list[torch.Tensor] = []
        self._law_token_ids: list[torch.Tensor] = []
        self._law_values: list[torch.Tensor] = []

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Draws the next token of each draft from logits ``[B, V]``; returns ids ``[B]``."""
        pick = self._sampler.pick(logits, len(self._token_ids))
        self._token_ids.append(pick.token_ids)
        if pick.prob_token_ids is not None and pick.prob_values is not None:
            self._law_token_ids.append(pick.prob_token_ids)
            self._law_values.append(pick.prob_values)
        return pick.token_ids

    def proposals(self, confidences: torch.Tensor) -> list[DraftProposal]:
        """The proposals of all drafts, each as long as was asked for.

        Args:
            confidences: ``[B, K]`` of the K tokens drawn.
        """
        laws: list[tuple[Any, Any] | None] = [None] * len(self._drafts)
        if self._law_token_ids:
            columns, values = _on_host(self._law_token_ids), _on_host(self._law_values)
            for index, row in enumerate(self._sampler.sampled_rows.tolist()):
                if self._samplings[row].send_probs:
                    laws[row] = columns[index], values[index]
        return [
            _proposal(ids, chances, law, draft.sequence.num_speculative_tokens)
            for ids, chances, law, draft in zip(
                _on_host(self._token_ids),
                confidences.cpu().numpy(),
                laws,
                self._drafts,
                strict=True,
            )
        ]


def own_confidence(logits: torch.Tensor) -> torch.Tensor:
    """The largest chance in each law of ``[..., V]`` logits at temperature 1: ``[...]``.

    Stands in for a confidence head. It knows the law and nothing of the token drawn from it.
    """
    return (logits.amax(dim=-1) - logits.logsumexp(dim=-1)).exp()


def _on_host(columns: list[torch.Tensor]) -> npt.NDArray[Any]:
    """K tensors ``[B, ...]`` as one array ``[B, K, ...]``."""
    array: npt.NDArray[Any] = torch.stack(columns, dim=1).cpu().numpy()
    return array


def _proposal(
    token_ids: npt.NDArray[np.int64],
    confidences: npt.NDArray[np.float32],
    law: tuple[Any, Any] | None,
    num_tokens: int,
) -> DraftProposal:
    columns, values = (None, None) if law is None else law
    return DraftProposal(
        draft_token_ids=tuple(token_ids[:num_tokens].tolist()),
        confidences=tuple(confidences[:num_tokens].tolist()),
        draft_prob_token_ids=None if columns is None else columns[:num_tokens],
        draft_prob_values=None if values is None else values[:num_tokens],
    )
