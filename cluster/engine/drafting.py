"""Keeps drafters supplied and takes their proposals: the engine's side of every draft session.

After each step, sequences that go on are announced: what the drafter lacks of their features is
sent, in bulk (``feed``) for prompts and catch-up, or inline with the round for the few tokens that
a round commits. A sequence drafts once its bulk features are acknowledged. Anything that goes wrong
on the way leaves a sequence without a proposal, and it decodes plainly (DESIGN.md, rule 8).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from cluster.config import SpeculativeConfig
from cluster.engine.draft_client import (
    DraftClient,
    DraftOutcome,
    DraftResult,
    DraftRound,
    DraftSampling,
    DraftSequence,
    SessionKey,
)
from cluster.engine.sequence import Sequence
from cluster.request import SpeculationStats

_MAX_INLINE_FEATURES = 16

FeatureReader = Callable[[list[tuple[Sequence, int, int]]], torch.Tensor]


class RoundSize(NamedTuple):
    """Sequences in a round, and most tokens drafted for one of them; 0 and 0 without a round."""

    num_sessions: int
    num_tokens: int


@dataclass(frozen=True)
class _Pending:
    """A round that has been sent and not yet collected."""

    handle: Any
    deadline: float
    sequences: dict[SessionKey, Sequence]


class Drafting:
    """Draft sessions and rounds of one engine; only the engine's thread calls it.

    There is at most one round under way for each group, and one proposal for each (session,
    committed length).

    Args:
        client: the drafters.
        config: caps and deadlines.
        read_features: reads cached features of ``(sequence, first position, end)`` ranges, stacked;
            not used with methods that need none.
        max_model_len: no guess goes beyond it.
        stats: the engine's totals, in which late and stale proposals are counted.
    """

    def __init__(
        self,
        client: DraftClient,
        config: SpeculativeConfig,
        read_features: FeatureReader,
        max_model_len: int,
        stats: SpeculationStats,
    ) -> None:
        self._client = client
        self._config = config
        self.timeout_s = config.draft_timeout_ms / 1e3
        self._read_features = read_features
        self._max_model_len = max_model_len
        self._pending: dict[int, _Pending] = {}
        self._stats = stats

    def use_policy(self, config: SpeculativeConfig) -> None:
        """Keeps to other caps and deadlines from the next round on."""
        self._config = config
        self.timeout_s = config.draft_timeout_ms / 1e3

    @property
    def is_ready(self) -> bool:
        """Whether some drafter can be asked."""
        return self._client.is_ready()

    def announce(
        self,
        group: int,
        sequences: list[Sequence],
        *,
        max_tokens: int | None = None,
        wait_s: float = math.inf,
    ) -> RoundSize:
        """Sends features of sequences that have just been computed, and starts the group's round.

        Args:
            group: has no round under way.
            sequences: those of the finished pass that go on.
            max_tokens: to draft for each; unset: as many as the configuration has.
            wait_s: longest time to wait for the answer, if less than the configuration has.

        Returns:
            The size of the round that was started.
        """
        block_size = self._client.block_size
        if block_size == 0:
            return RoundSize(0, 0)
        if max_tokens is not None:
            block_size = min(block_size, max_tokens)
        max_inline = max(_MAX_INLINE_FEATURES, self._client.block_size + 1)
        bulk: list[Sequence] = []
        joining: list[tuple[Sequence, int]] = []
        for sequence in sequences:
            if sequence.request.speculation.is_off or sequence.has_outdated_features:
                continue
            if not self._open(sequence):
                continue
            lacking = sequence.num_computed_tokens - sequence.num_fed_features
            if lacking <= 0:
                continue
            is_decoding = sequence.num_missing_tokens == 1
            is_first = sequence.num_fed_features == 0
            if is_first or lacking > max_inline or not is_decoding:
                bulk.append(sequence)
            elif self._is_acknowledged(sequence):
                num_drafts = self._num_drafts(sequence, block_size)
                if num_drafts > 0:
                    joining.append((sequence, num_drafts))
        ranges = [
            (s, s.num_fed_features, s.num_computed_tokens)
            for s in (*bulk, *(member for member, _ in joining))
        ]
        if not ranges:
            return RoundSize(0, 0)
        if self._config.uses_features:
            features = self._read_features(ranges)
        else:
            features = torch.empty(sum(end - start for _, start, end in ranges), 0)
        row = 0
        for sequence, start, end in ranges[: len(bulk)]:
            self._feed(sequence, start, features[row : row + end - start])
            row += end - start
        if joining:
            self._start_round(group, joining, features[row:], min(wait_s, self.timeout_s))
        return RoundSize(len(joining), max((count for _, count in joining), default=0))

    def is_under_way(self, group: int) -> bool:
        """Whether the group's round has been sent and not yet collected."""
        return group in self._pending

    def collect(self, group: int) -> None:
        """Waits for the group's round, within its deadline, and hands out its proposals."""
        pending = self._pending.pop(group, None)
        if pending is None:
            return
        timeout = max(0.0, pending.deadline - time.monotonic())
        results = self._client.collect(pending.handle, timeout)
        answered = set()
        for result in results:
            sequence = pending.sequences.get(result.session)
            if sequence is not None and sequence.session == result.session:
                answered.add(result.session)
                self._take(sequence, result)
        for session, sequence in pending.sequences.items():
            if session not in answered:
                self._stats.num_late_proposals += 1
                sequence.stats.num_late_proposals += 1

    def forget(self, sequence: Sequence) -> None:
        """Ends the sequence's draft session, wherever it is."""
        if sequence.session is not None:
            self._client.close_session(sequence.session)
            sequence.session = None

    def close(self) -> None:
        """Ends every connection to drafters."""
        self._client.close()

    def _take(self, sequence: Sequence, result: DraftResult) -> None:
        if result.outcome is DraftOutcome.UNKNOWN_SESSION:
            self.forget(sequence)
        elif result.outcome is DraftOutcome.MISSING:
            sequence.num_fed_features = min(result.missing_from, sequence.num_fed_features)
            sequence.num_bulk_features = sequence.num_fed_features
        elif result.committed_length != len(sequence.token_ids):
            self._stats.num_stale_proposals += 1
            sequence.stats.num_stale_proposals += 1
        else:
            sequence.proposal = result.proposal

    def _feed(self, sequence: Sequence, start: int, rows: torch.Tensor) -> None:
        if sequence.session is None:
            raise RuntimeError("a sequence without a session cannot be fed")
        token_ids = sequence.token_ids[start : start + len(rows) + 1]
        sequence.num_fed_features += self._client.feed(sequence.session, start, rows, token_ids)
        sequence.num_bulk_features = sequence.num_fed_features

    def _start_round(
        self,
        group: int,
        joining: list[tuple[Sequence, int]],
        features: torch.Tensor,
        wait_s: float,
    ) -> None:
        entries = tuple(_entry(sequence, num_drafts) for sequence, num_drafts in joining)
        members: dict[SessionKey, Sequence] = {}
        for (sequence, _), entry in zip(joining, entries, strict=True):
            sequence.num_fed_features = sequence.num_computed_tokens
            members[entry.session] = sequence
        handle = self._client.start_round(DraftRound(entries, features))
        deadline = time.monotonic() + wait_s
        self._pending[group] = _Pending(handle, deadline, members)

    def _is_acknowledged(self, sequence: Sequence) -> bool:
        if sequence.session is None:
            return False
        acknowledged = self._client.acknowledged_length(sequence.session)
        return acknowledged >= sequence.num_bulk_features

    def _open(self, sequence: Sequence) -> bool:
        if sequence.session is not None and self._client.has_session(sequence.session):
            return True
        self.forget(sequence)
        params = sequence.request.sampling
        is_seeded = params.seed is not None and not params.is_greedy
        sampling = DraftSampling(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=params.seed if is_seeded else None,
            choice_index=sequence.request.choice_index,
            send_probs=(
                not params.is_greedy
                and not is_seeded
                and self._config.trust_drafter
                and self._config.method != "ngram"  # whose law is one-hot
            ),
            traceparent=sequence.request.traceparent,
        )
        sequence.session_epoch += 1
        session = SessionKey(sequence.request.request_id, sequence.session_epoch)
        if not self._client.open_session(session, sampling):
            return False
        sequence.session = session
        sequence.num_fed_features = sequence.num_bulk_features = 0
        return True

    def _num_drafts(self, sequence: Sequence, block_size: int) -> int:
        """Guesses worth asking for: the bonus token takes the last place that is left."""
        room = min(sequence.room, self._max_model_len - len(sequence.token_ids)) - 1
        caps = (
            self._config.num_speculative_tokens,
            sequence.request.speculation.num_speculative_tokens,
        )
        return min(block_size, room, *(cap for cap in caps if cap is not None))


def _entry(sequence: Sequence, num_drafts: int) -> DraftSequence:
    if sequence.session is None:
        raise RuntimeError("a sequence without a session cannot join a round")
    return DraftSequence(
        session=sequence.session,
        committed_length=len(sequence.token_ids),
        num_features=sequence.num_computed_tokens - sequence.num_fed_features,
        new_token_ids=tuple(sequence.token_ids[sequence.num_fed_features :]),
        num_speculative_tokens=num_drafts,
    )


def feature_slots(ranges: list[tuple[Sequence, int, int]], page_size: int) -> np.ndarray:
    """Cache slots of ``(sequence, first position, end)`` ranges, one behind the other; int64."""
    starts = np.asarray([start for _, start, _ in ranges], dtype=np.int64)
    lengths = np.asarray([end - start for _, start, end in ranges], dtype=np.int64)
    tables = np.zeros((len(ranges), max(len(s.pages) for s, _, _ in ranges)), dtype=np.int64)
    for row, (sequence, _, _) in enumerate(ranges):
        tables[row, : len(sequence.pages)] = sequence.pages
    owner = np.repeat(np.arange(len(ranges)), lengths)
    positions = np.arange(lengths.sum()) - (np.cumsum(lengths) - lengths - starts)[owner]
    slots: np.ndarray = tables[owner, positions // page_size] * page_size + positions % page_size
    return slots
