"""A drafter's engine: sessions of many replicas, their draft KV, and rounds in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cluster.config import DrafterConfig
from cluster.engine.draft_client import (
    DraftOutcome,
    DraftResult,
    DraftRound,
    DraftSampling,
    DraftSequence,
    SessionKey,
)
from cluster.engine.draft_pages import DraftPages
from cluster.engine.draft_pass import DraftPass
from cluster.engine.draft_sessions import DraftSession, DraftSessions
from cluster.errors import ConfigError, InvalidRequestError
from cluster.models.dspark import DSparkDrafter
from cluster.speculation.proposal import DraftProposal


class _Draft(NamedTuple):
    """A sequence that a pass drafts for, and where its answer goes."""

    session: DraftSession
    sequence: DraftSequence
    answers: list[DraftResult]
    position: int


class _NewRows(NamedTuple):
    """Feature rows on their way into the pages."""

    features: list[torch.Tensor]
    positions: list[npt.NDArray[np.int64]]
    slots: list[npt.NDArray[np.int64]]


class DraftEngine:
    """Drafts for the sessions of any number of replicas.

    Guarantees:
    - all sequences of all rounds of one call share one forward pass, and a sequence's greedy or
      coupled tokens do not depend on what else is in the pass (but for rounding in the logits);
    - a base (session, committed length) gets one proposal: asked again, the same is answered;
    - nothing is drafted on a guessed state: a gap is answered with what is missing, and a session
      that is unknown, was evicted, or whose length went backwards with ``UNKNOWN_SESSION``;
    - sessions and pages are bounded: room is made by dropping the least recently used session
      that is not in the pass; sessions unused for ``session_ttl_s`` go too.

    Not thread-safe: one thread owns it (``DraftLoop``'s, or the engine's for a local drafter).

    Args:
        drafter: the network, in evaluation mode, on its device.
        config: bounds.
        draft_top_k: entries of each draft distribution that is sampled from and sent.
        seed: of the drafter's own randomness; ``None`` takes a fresh one.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        drafter: DSparkDrafter,
        config: DrafterConfig,
        draft_top_k: int,
        *,
        seed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._drafter = drafter
        self._config = config
        self._clock = clock
        self._sessions = DraftSessions(config.max_sessions)
        self._pages = _allocate_pages(drafter, config)
        generator = torch.Generator(next(drafter.parameters()).device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        self._pass = DraftPass(drafter, self._pages, draft_top_k, generator)
        # A block's last slot must have a position, so the anchor's is at most this.
        self._max_features = drafter.config.max_position_embeddings - self.block_size

    @property
    def block_size(self) -> int:
        """Most tokens drafted in a round."""
        return self._drafter.config.block_size

    @property
    def vocab_size(self) -> int:
        """Token ids drafted are below it."""
        return self._drafter.config.vocab_size

    @property
    def feature_size(self) -> int:
        """Values of one position's features."""
        return self._drafter.config.hidden_size

    @property
    def num_sessions(self) -> int:
        """Sessions held."""
        return len(self._sessions)

    def length_of(self, replica_id: str, key: SessionKey) -> int | None:
        """Features held by a session, or ``None`` for an unknown one."""
        session = self._sessions.get(replica_id, key)
        return None if session is None else session.length

    def open(self, replica_id: str, key: SessionKey, sampling: DraftSampling) -> None:
        """Opens a session; one that is open already stays as it is.

        Raises:
            InvalidRequestError: it is open with other sampling.
        """
        now = self._clock()
        self.expire()
        session = self._sessions.get(replica_id, key)
        if session is not None:
            if session.sampling != sampling:
                raise InvalidRequestError("chunk.sampling", "differs from the open session's")
            self._sessions.touch(session, now)
            return
        if self._sessions.is_full:
            self._drop(next(iter(self._sessions)))
        self._sessions.add(DraftSession(replica_id, key, sampling, now))

    @torch.inference_mode()
    def append_features(
        self, replica_id: str, key: SessionKey, start: int, rows: torch.Tensor
    ) -> int | None:
        """Appends context features; what overlaps with positions held already is skipped.

        Args:
            start: position of the first row.
            rows: ``[n, d]``.

        Returns:
            The length now held, which is less than ``start + n`` (and nothing was appended) when
            there is a gap before ``start``; ``None`` when the session is unknown or no memory
            could be found for it.
        """
        session = self._sessions.get(replica_id, key)
        if session is None:
            return None
        self._sessions.touch(session, self._clock())
        end = start + len(rows)
        if start <= session.length < end:
            new_rows = _NewRows([], [], [])
            if not self._append(session, end, rows, new_rows, keep=set()):
                return None
            self._pass.write(*new_rows)
        return session.length

    @torch.inference_mode()
    def draft(self, rounds: Sequence[tuple[str, DraftRound]]) -> list[list[DraftResult]]:
        """Drafts for every sequence of every round, in one pass.

        Args:
            rounds: (replica, round) pairs; no session twice.

        Returns:
            For each round a result per sequence, in order.
        """
        self.expire()
        in_pass = {
            (replica_id, sequence.session)
            for replica_id, draft_round in rounds
            for sequence in draft_round.sequences
        }
        drafts: list[_Draft] = []
        new_rows = _NewRows([], [], [])
        all_answers: list[list[DraftResult]] = []
        for replica_id, draft_round in rounds:
            answers: list[DraftResult] = []
            all_answers.append(answers)
            row = 0
            for sequence in draft_round.sequences:
                rows = draft_round.features[row : row + sequence.num_features]
                row += sequence.num_features
                session = self._sessions.get(replica_id, sequence.session)
                answer = _refusal(session, sequence)
                if session is not None and answer is None:
                    self._sessions.touch(session, self._clock())
                    answer = _nothing(sequence)
                    if not self._append(
                        session, sequence.committed_length - 1, rows, new_rows, keep=in_pass
                    ):
                        answer = _unknown(sequence)
                    elif self._can_draft(sequence):
                        drafts.append(_Draft(session, sequence, answers, len(answers)))
                    session.last_result = answer
                answers.append(answer or _unknown(sequence))
        self._pass.write(*new_rows)
        if drafts:
            proposals = self._pass.run([d.session for d in drafts], [d.sequence for d in drafts])
            for draft, proposal in zip(drafts, proposals, strict=True):
                result = replace(draft.answers[draft.position], proposal=proposal)
                draft.session.last_result = result
                draft.answers[draft.position] = result
        return all_answers

    def close(self, replica_id: str, key: SessionKey) -> None:
        """Forgets a session; an unknown one is ignored."""
        session = self._sessions.get(replica_id, key)
        if session is not None:
            self._drop(session)

    def drop_replica(self, replica_id: str) -> None:
        """Forgets all sessions of a replica."""
        for session in self._sessions.of_replica(replica_id):
            self._drop(session)

    def expire(self) -> None:
        """Forgets sessions that were not used for ``session_ttl_s``."""
        limit = self._clock() - self._config.session_ttl_s
        while len(self._sessions) > 0:
            oldest = next(iter(self._sessions))
            if oldest.last_used > limit:
                return
            self._drop(oldest)

    def check_integrity(self) -> None:
        """Checks that every page is free or owned by one session that needs it.

        Raises:
            RuntimeError: it is not so.
        """
        self._pages.check_integrity([page for s in self._sessions for page in s.pages])
        for session in self._sessions:
            if len(session.pages) != self._pages_for(session.length):
                raise RuntimeError(
                    f"draft session {session.key} has {len(session.pages)} pages "
                    f"for {session.length} positions"
                )

    def _can_draft(self, sequence: DraftSequence) -> bool:
        is_within = sequence.committed_length - 1 <= self._max_features
        return is_within and sequence.num_speculative_tokens > 0

    def _append(
        self,
        session: DraftSession,
        length: int,
        rows: torch.Tensor,
        new_rows: _NewRows,
        *,
        keep: set[tuple[str, SessionKey]],
    ) -> bool:
        """Makes the session ``length`` long with the last of ``rows``, queued in ``new_rows``.

        Positions behind the drafter's context are counted and not kept. Sessions other than
        ``keep`` are dropped where memory is short; returns False, and drops the session itself,
        where that would not be enough.
        """
        needed = self._pages_for(length) - len(session.pages)
        if needed > self._pages.num_free and not self._evict(needed, session, keep):
            self._drop(session)
            return False
        session.pages.extend(self._pages.allocate(needed))
        positions = np.arange(session.length, min(length, self._max_features))
        if len(positions) > 0:
            page_size = self._pages.page_size
            table = np.array(session.pages, dtype=np.int64)
            first_row = len(rows) - (length - session.length)
            new_rows.features.append(rows[first_row : first_row + len(positions)])
            new_rows.positions.append(positions)
            new_rows.slots.append(table[positions // page_size] * page_size + positions % page_size)
        session.length = length
        return True

    def _evict(self, needed: int, session: DraftSession, keep: set[tuple[str, SessionKey]]) -> bool:
        """Drops the least recently used sessions until ``needed`` pages are free, or none."""
        idle = [s for s in self._sessions if s is not session and (s.replica_id, s.key) not in keep]
        if needed > self._pages.num_free + sum(len(s.pages) for s in idle):
            return False
        for other in idle:
            if needed <= self._pages.num_free:
                break
            self._drop(other)
        return True

    def _drop(self, session: DraftSession) -> None:
        self._pages.release(session.pages)
        self._sessions.remove(session)

    def _pages_for(self, length: int) -> int:
        return self._pages.pages_for(min(length, self._max_features))


def _refusal(session: DraftSession | None, sequence: DraftSequence) -> DraftResult | None:
    """The answer to a sequence whose base cannot be drafted from (again), else ``None``."""
    if session is None:
        return _unknown(sequence)
    last = session.last_result
    if last is not None and last.committed_length == sequence.committed_length:
        return _cut(last, sequence.num_speculative_tokens)
    if sequence.committed_length - 1 < session.length:
        return _unknown(sequence)
    if session.length < sequence.committed_length - 1 - sequence.num_features:
        return DraftResult(
            session=sequence.session,
            committed_length=sequence.committed_length,
            outcome=DraftOutcome.MISSING,
            missing_from=session.length,
        )
    return None


def _unknown(sequence: DraftSequence) -> DraftResult:
    return DraftResult(
        session=sequence.session,
        committed_length=sequence.committed_length,
        outcome=DraftOutcome.UNKNOWN_SESSION,
    )


def _nothing(sequence: DraftSequence) -> DraftResult:
    """A proposal without tokens: the drafter has nothing to say here."""
    return DraftResult(
        session=sequence.session,
        committed_length=sequence.committed_length,
        outcome=DraftOutcome.DRAFTED,
        proposal=DraftProposal(draft_token_ids=(), confidences=()),
    )


def _cut(result: DraftResult, num_tokens: int) -> DraftResult:
    """The same proposal with at most ``num_tokens`` tokens."""
    proposal = result.proposal
    if proposal is None or proposal.num_draft_tokens <= num_tokens:
        return result
    columns, values = proposal.draft_prob_token_ids, proposal.draft_prob_values
    return replace(
        result,
        proposal=DraftProposal(
            draft_token_ids=proposal.draft_token_ids[:num_tokens],
            confidences=proposal.confidences[:num_tokens],
            draft_prob_token_ids=None if columns is None else columns[:num_tokens],
            draft_prob_values=None if values is None else values[:num_tokens],
        ),
    )


def _allocate_pages(drafter: DSparkDrafter, config: DrafterConfig) -> DraftPages:
    shape = drafter.config
    parameter = next(drafter.parameters())
    values_per_position = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    page_bytes = values_per_position * parameter.dtype.itemsize * config.page_size
    num_pages = (config.kv_cache_memory_mb << 20) // page_bytes
    if num_pages < 2:
        raise ConfigError("drafter.kv_cache_memory_mb", "does not hold two pages")
    return DraftPages(
        num_pages=num_pages,
        page_size=config.page_size,
        num_layers=shape.num_hidden_layers,
        num_kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        dtype=parameter.dtype,
        device=parameter.device,
    )
