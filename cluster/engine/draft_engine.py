"""A drafter's engine: sessions of many replicas, their memory, and rounds in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

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
from cluster.engine.draft_method import Draft, DraftMethod, DraftRows
from cluster.engine.draft_sessions import DraftSession, DraftSessions
from cluster.engine.pace import DraftPace, PaceStats
from cluster.engine.pages import PagePool
from cluster.errors import ConfigError, InvalidRequestError
from cluster.speculation.draft_curve import DraftCurve
from cluster.speculation.proposal import DraftProposal


class _Place(NamedTuple):
    """Where a draft's answer goes."""

    answers: list[DraftResult]
    position: int


class Addition(NamedTuple):
    """Committed positions for one session.

    ``features`` are ``[N, d]`` of positions ``start .. start+N-1``; ``token_ids`` are N+1, of
    positions ``start .. start+N``.
    """

    replica_id: str
    key: SessionKey
    start: int
    features: torch.Tensor
    token_ids: Sequence[int]


class DraftEngine:
    """Drafts for the sessions of any number of replicas.

    Guarantees:
    - all sequences of all rounds of one call share one pass of the method, and a sequence's greedy
      or coupled tokens do not depend on what else is in the pass (but for rounding in the logits);
    - a base (session, committed length) gets one proposal: asked again, the same is answered;
    - nothing is drafted on a guessed state: a gap is answered with what is missing, and a session
      that is unknown, was evicted, or whose length went backwards with ``UNKNOWN_SESSION``;
    - sessions and pages are bounded: room is made by dropping the least recently used session
      that is not in the pass; sessions unused for ``session_ttl_s`` go too;
    - behind a method's longest context a session drafts nothing and costs nothing more.

    Not thread-safe: one thread owns it (``DraftLoop``'s, or the engine's for a local drafter).

    Args:
        method: how drafts are made; used by nobody else.
        config: bounds.
        clock: monotonic seconds.
        pace: rounds end when the paced device would have drafted them. Features are taken in as
            fast as they are.

    Raises:
        ConfigError: the memory does not hold one session, however short.
    """

    def __init__(
        self,
        method: DraftMethod,
        config: DrafterConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        pace: DraftPace | None = None,
    ) -> None:
        shortest = method.num_kept(method.min_length)
        if (method.num_pages - 1) * method.page_size < max(shortest, 1):
            raise ConfigError("drafter.kv_cache_memory_mb", "does not hold one session")
        self._method = method
        self._config = config
        self._clock = clock
        self._pace = pace
        # What its passes cost, once somebody has measured that; replicas are told.
        self.curve: DraftCurve | None = None if pace is None else pace.curve
        self._sessions = DraftSessions(config.max_sessions)
        self._pages = PagePool(method.num_pages, method.page_size)

    @property
    def block_size(self) -> int:
        """Most tokens drafted in a round."""
        return self._method.block_size

    @property
    def vocab_size(self) -> int:
        """Token ids drafted are below it."""
        return self._method.vocab_size

    @property
    def feature_size(self) -> int:
        """Values of one position's features; 0: token ids are enough."""
        return self._method.feature_size

    @property
    def max_sessions(self) -> int:
        """Most sessions held."""
        return self._config.max_sessions

    @property
    def paced(self) -> PaceStats | None:
        """How well rounds keep their pace, if they are paced."""
        return None if self._pace is None else self._pace.pace.stats

    @property
    def num_sessions(self) -> int:
        """Sessions held."""
        return len(self._sessions)

    def length_of(self, replica_id: str, key: SessionKey) -> int | None:
        """Positions held by a session, or ``None`` for an unknown one."""
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

    def append(
        self,
        replica_id: str,
        key: SessionKey,
        start: int,
        features: torch.Tensor,
        token_ids: Sequence[int],
    ) -> int | None:
        """``append_all`` with one addition."""
        return self.append_all([Addition(replica_id, key, start, features, token_ids)])[0]

    @torch.inference_mode()
    def append_all(self, additions: Sequence[Addition]) -> list[int | None]:
        """Appends committed positions, all in one go; what a session holds already is skipped.

        Args:
            additions: no session twice.

        Returns:
            For each the length now held, which is less than ``start + N`` (and nothing was
            appended) when there is a gap before ``start``; ``None`` when the session is unknown or
            no memory could be found for it.
        """
        # A session must not lose its pages to another one before its rows are written.
        keep = {(addition.replica_id, addition.key) for addition in additions}
        new_rows: list[DraftRows] = []
        lengths: list[int | None] = []
        for addition in additions:
            session = self._sessions.get(addition.replica_id, addition.key)
            if session is None:
                lengths.append(None)
                continue
            self._sessions.touch(session, self._clock())
            end = addition.start + len(addition.features)
            if addition.start <= session.length < end:
                rows = self._extend(session, end, addition.features, addition.token_ids, keep=keep)
                if rows is None:
                    lengths.append(None)
                    continue
                new_rows.append(rows)
            lengths.append(session.length)
        if new_rows:
            self._method.write(new_rows)
        return lengths

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
        drafts: list[Draft] = []
        places: list[_Place] = []
        idle_rows: list[DraftRows] = []
        all_answers: list[list[DraftResult]] = []
        for replica_id, draft_round in rounds:
            answers: list[DraftResult] = []
            all_answers.append(answers)
            row = 0
            for sequence in draft_round.sequences:
                features = draft_round.features[row : row + sequence.num_features]
                row += sequence.num_features
                session = self._sessions.get(replica_id, sequence.session)
                answer = _refusal(session, sequence)
                if session is not None and answer is None:
                    self._sessions.touch(session, self._clock())
                    answer = _nothing(sequence)
                    end = sequence.committed_length - 1
                    rows = self._extend(
                        session, end, features, sequence.new_token_ids, keep=in_pass
                    )
                    if rows is None:
                        answer = _unknown(sequence)
                    elif self._can_draft(sequence):
                        drafts.append(Draft(sequence, rows))
                        places.append(_Place(answers, len(answers)))
                    else:
                        idle_rows.append(rows)
                    session.last_result = answer
                answers.append(answer or _unknown(sequence))
        if idle_rows:
            self._method.write(idle_rows)
        if drafts:
            proposals = self._run(drafts)
            for draft, place, proposal in zip(drafts, places, proposals, strict=True):
                result = replace(place.answers[place.position], proposal=proposal)
                draft.session.last_result = result
                place.answers[place.position] = result
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
        self._pages.check([session.pages for session in self._sessions])
        for session in self._sessions:
            is_begun = session.length > 0 or session.pages
            num_pages = self._pages.pages_for(self._num_kept(session.length))
            if is_begun and len(session.pages) != num_pages:
                raise RuntimeError(
                    f"draft session {session.key} has {len(session.pages)} pages "
                    f"for {session.length} positions"
                )

    def _run(self, drafts: list[Draft]) -> Sequence[DraftProposal]:
        if self._pace is None:
            return self._method.run(drafts)
        num_tokens = max(draft.sequence.num_speculative_tokens for draft in drafts)
        paced = self._pace.pace.begin(float(self._pace.curve.seconds(len(drafts), num_tokens)))
        proposals = self._method.run(drafts)
        self._pace.pace.end(paced)
        return proposals

    def _can_draft(self, sequence: DraftSequence) -> bool:
        length = sequence.committed_length - 1
        is_within = self._method.min_length <= length <= self._method.max_length
        return is_within and sequence.num_speculative_tokens > 0

    def _extend(
        self,
        session: DraftSession,
        length: int,
        features: torch.Tensor,
        token_ids: Sequence[int],
        *,
        keep: set[tuple[str, SessionKey]],
    ) -> DraftRows | None:
        """Makes the session ``length`` long and returns what is new to it, to be written.

        Positions behind the method's context are counted and not kept. Sessions other than
        ``keep`` are dropped where memory is short; where that would not be enough the session
        itself is dropped, and the result is ``None``.

        Args:
            features: of the last positions before ``length``, as many as are needed or more.
            token_ids: of the same positions and of ``length`` itself.
        """
        kept = self._num_kept(length)
        missing = self._pages.pages_for(kept) - len(session.pages)
        if missing > self._pages.num_free and not self._evict(missing, session, keep):
            self._drop(session)
            return None
        self._pages.grow(session.pages, kept)
        start = session.length
        first = start - (length - len(features))
        end = max(first, first + min(length, self._method.max_length) - start)
        session.length = length
        return DraftRows(session, start, features[first:end], token_ids[first : end + 1])

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
        self._pages.shrink(session.pages, 0)
        self._sessions.remove(session)

    def _num_kept(self, length: int) -> int:
        return self._method.num_kept(min(length, self._method.max_length))


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
