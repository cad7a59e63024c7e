"""How a drafter picks its tokens, for a batch in which requests ask for different things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cluster.engine.draft_client import DraftSampling
from cluster.request import SamplingParams
from cluster.speculation.coupling import coupled_pick, gumbel_noise
from cluster.speculation.proposal import dequantize_draft_probs, quantize_draft_probs
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
        self._batch = SamplingBatch.from_params(
            [
                SamplingParams(
                    temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p
                )
                for s in samplings
            ],
            device=device,
        )
        is_coupled = [s.seed is not None and s.temperature > 0 for s in samplings]
        is_sampled = [s.seed is None and s.temperature > 0 for s in samplings]
        coupled = [s for s, wanted in zip(samplings, is_coupled, strict=True) if wanted]
        self.sampled_rows = np.flatnonzero(is_sampled)
        self._sampled_rows = torch.from_numpy(self.sampled_rows).to(device)
        coupled_rows = np.flatnonzero(is_coupled)
        self._coupled_rows = torch.from_numpy(coupled_rows).to(device)
        self._coupled_positions = torch.from_numpy(first_positions[coupled_rows]).to(device)
        self._seeds = torch.tensor([s.seed for s in coupled], dtype=torch.int64, device=device)
        self._choices = torch.tensor(
            [s.choice_index for s in coupled], dtype=torch.int64, device=device
        )
        self._is_greedy = not coupled and len(self.sampled_rows) == 0
        self._top_k = top_k
        self._generator = generator

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
