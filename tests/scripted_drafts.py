"""A drafter that knows the right output and spoils some of it, and notes what it is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cluster.engine.draft_client import (
    DraftOutcome,
    DraftResult,
    DraftRound,
    DraftSampling,
    DraftTimes,
    SessionKey,
)
from cluster.speculation.proposal import DraftProposal


class ScriptedDrafts:
    """A ``DraftClient`` whose proposals are right up to some place, another one in every round.

    Args:
        texts: prompt and output of each request, by its id.
        vocab_size: of the target.
        block_size: most tokens a round.

    Attributes:
        features: rows received, by request and position; a position sent again replaces its row.
    """

    is_concurrent = False

    def __init__(
        self, texts: Mapping[str, list[int]], *, vocab_size: int, block_size: int = 5
    ) -> None:
        self.block_size = block_size
        self.features: dict[str, dict[int, torch.Tensor]] = {name: {} for name in texts}
        self._texts = texts
        self._vocab_size = vocab_size
        self._lengths: dict[SessionKey, int] = {}

    def is_ready(self) -> bool:
        return True

    def predicted_round_s(
        self, num_sessions: float, num_tokens: int, *, added_drafters: int = 0
    ) -> float:
        return 1e-3

    def times(self) -> DraftTimes:
        return DraftTimes()

    def open_session(self, session: SessionKey, sampling: DraftSampling) -> bool:
        self._lengths[session] = 0
        return True

    def has_session(self, session: SessionKey) -> bool:
        return session in self._lengths

    def feed(self, session: SessionKey, start: int, features: torch.Tensor, *token_ids: Any) -> int:
        self._note(session, start, features)
        return len(features)

    def acknowledged_length(self, session: SessionKey) -> int:
        return self._lengths[session]

    def close_session(self, session: SessionKey) -> None:
        self._lengths.pop(session, None)

    def start_round(self, round: DraftRound) -> list[DraftResult]:
        results = []
        row = 0
        for sequence in round.sequences:
            length, end = sequence.committed_length, row + sequence.num_features
            start = length - 1 - sequence.num_features
            self._note(sequence.session, start, round.features[row:end])
            row = end
            tokens = self._texts[sequence.session.request_id][length:]
            tokens = tokens[: sequence.num_speculative_tokens]
            num_right = (length * 5 + 2) % (self.block_size + 1)
            drafted = tuple(
                token if index < num_right else (token + 1) % self._vocab_size
                for index, token in enumerate(tokens)
            )
            results.append(
                DraftResult(
                    session=sequence.session,
                    committed_length=length,
                    outcome=DraftOutcome.DRAFTED,
                    proposal=DraftProposal(drafted, (0.5,) * len(drafted)),
                )
            )
        return results

    def collect(self, handle: list[DraftResult], timeout_s: float) -> list[DraftResult]:
        return handle

    def close(self) -> None:
        self._lengths.clear()

    def _note(self, session: SessionKey, start: int, features: torch.Tensor) -> None:
        noted = self.features[session.request_id]
        for index, row in enumerate(features):
            noted[start + index] = row.clone()
        self._lengths[session] = start + len(features)
