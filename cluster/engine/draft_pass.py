"""One forward pass of a drafter over the blocks of many sequences, and what is drawn from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cluster.engine.draft_client import DraftSequence
from cluster.engine.draft_pages import PADDING_PAGE, DraftPages
from cluster.engine.draft_sampling import DraftSampler
from cluster.engine.draft_sessions import DraftSession
from cluster.models.dspark import DSparkDrafter
from cluster.speculation.proposal import DraftProposal


class DraftPass:
    """The drafter's arithmetic over its pages.

    Guarantees: all B sequences share one pass through the backbone and one sampling step per
    token; the whole block runs whatever number of tokens is asked for, so that a proposal's
    tokens do not depend on how many there are.

    Args:
        drafter: the network, in evaluation mode.
        pages: its context keys and values.
        draft_top_k: entries of each draft distribution.
        generator: the drafter's own randomness, on the drafter's device.
    """

    def __init__(
        self,
        drafter: DSparkDrafter,
        pages: DraftPages,
        draft_top_k: int,
        generator: torch.Generator,
    ) -> None:
        parameter = next(drafter.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._drafter = drafter
        self._pages = pages
        self._draft_top_k = draft_top_k
        self._generator = generator

    def write(
        self,
        rows: list[torch.Tensor],
        positions: list[npt.NDArray[np.int64]],
        slots: list[npt.NDArray[np.int64]],
    ) -> None:
        """Projects feature rows ``[n, d]`` to keys and values and stores them, all in one go."""
        if not rows:
            return
        keys, values = self._drafter.context_kv(
            torch.cat(rows).to(device=self._device, dtype=self._dtype),
            self._tensor(np.concatenate(positions)),
        )
        self._pages.write(np.concatenate(slots), keys, values)

    def run(
        self, sessions: Sequence[DraftSession], sequences: Sequence[DraftSequence]
    ) -> list[DraftProposal]:
        """Drafts ``num_speculative_tokens`` (at least one) for each of B sequences."""
        committed = np.array([s.committed_length for s in sequences], dtype=np.int64)
        hidden = self._hidden(sessions, sequences, committed - 1)
        num_tokens = max(s.num_speculative_tokens for s in sequences)
        base_logits = self._drafter.base_logits(hidden[:, :num_tokens])
        sampler = DraftSampler(
            [session.sampling for session in sessions],
            committed,
            top_k=self._draft_top_k,
            generator=self._generator,
            device=self._device,
        )
        token_ids = [self._anchors(sequences)]
        state = None
        law_token_ids: list[torch.Tensor] = []
        law_values: list[torch.Tensor] = []
        for index in range(num_tokens):
            logits, state = self._drafter.markov_step(
                base_logits[:, index], token_ids[-1], hidden[:, index], state
            )
            pick = sampler.pick(logits, index)
            token_ids.append(pick.token_ids)
            if pick.prob_token_ids is not None and pick.prob_values is not None:
                law_token_ids.append(pick.prob_token_ids)
                law_values.append(pick.prob_values)
        # From the tokens before each slot: a confidence must not know its own (DESIGN, rule 3).
        confidences = self._confidences(hidden[:, :num_tokens], torch.stack(token_ids[:-1], dim=1))
        laws: list[tuple[Any, Any] | None] = [None] * len(sequences)
        if law_token_ids:
            columns, values = _on_host(law_token_ids), _on_host(law_values)
            for index, row in enumerate(sampler.sampled_rows.tolist()):
                if sessions[row].sampling.send_probs:
                    laws[row] = columns[index], values[index]
        return [
            _proposal(ids, chances, law, sequence.num_speculative_tokens)
            for ids, chances, law, sequence in zip(
                _on_host(token_ids[1:]), confidences.cpu().numpy(), laws, sequences, strict=True
            )
        ]

    def _hidden(
        self,
        sessions: Sequence[DraftSession],
        sequences: Sequence[DraftSequence],
        lengths: npt.NDArray[np.int64],
    ) -> torch.Tensor:
        """The backbone's output ``[B, block_size, d]`` over contexts of ``lengths``."""
        width = max(self._pages.pages_for(int(lengths.max())), 1)
        tables = np.full((len(sessions), width), PADDING_PAGE, dtype=np.int64)
        for row, session in enumerate(sessions):
            tables[row, : len(session.pages)] = session.pages
        keys, values = self._pages.gather(tables, lengths)
        positions = self._tensor(lengths)
        return self._drafter.block_hidden(
            self._anchors(sequences), positions, keys, values, context_lengths=positions
        )

    def _confidences(self, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Chances ``[B, K]`` that a token is accepted if all before it are."""
        if self._drafter.confidence_head is None:
            return torch.ones(previous.shape, device=self._device)
        return self._drafter.confidence_logit(hidden, previous).sigmoid()

    def _anchors(self, sequences: Sequence[DraftSequence]) -> torch.Tensor:
        return self._tensor([s.new_token_ids[-1] for s in sequences])

    def _tensor(self, values: Sequence[int] | npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int64, device=self._device)


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
