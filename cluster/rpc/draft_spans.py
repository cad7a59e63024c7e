"""Spans of a drafter: one for each session whose request is traced."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.engine.draft_client import SessionKey
from cluster.engine.draft_loop import RoundAnswer
from cluster.tracing import Span

MAX_SPANS = 4096


@dataclass
class _Traced:
    span: Span
    num_rounds: int = 0
    num_draft_tokens: int = 0
    compute_s: float = 0.0
    queue_s: float = 0.0


class DraftSpans:
    """The sessions of one drafter that are traced, by (replica, session); for one event loop.

    Guarantees: at most ``MAX_SPANS`` at a time; the oldest ends for one more. All end with their
    session, or with their replica.
    """

    def __init__(self) -> None:
        self._traced: OrderedDict[tuple[str, SessionKey], _Traced] = OrderedDict()

    def open(self, replica_id: str, session: SessionKey, traceparent: str) -> None:
        """A session begins."""
        if not traceparent:
            return
        span = Span("draft", traceparent, dspark__replica=replica_id)
        if not span.is_recorded:
            return
        self.close(replica_id, [session])
        if len(self._traced) >= MAX_SPANS:
            oldest_replica, oldest = next(iter(self._traced))
            self.close(oldest_replica, [oldest])
        self._traced[replica_id, session] = _Traced(span)

    def answered(self, replica_id: str, answer: RoundAnswer) -> None:
        """A round has ended."""
        if not self._traced:
            return
        for result in answer.results:
            traced = self._traced.get((replica_id, result.session))
            if traced is not None:
                traced.num_rounds += 1
                if result.proposal is not None:
                    traced.num_draft_tokens += len(result.proposal.draft_token_ids)
                traced.compute_s += answer.compute_s
                traced.queue_s += answer.queue_s

    def close(self, replica_id: str, sessions: Iterable[SessionKey]) -> None:
        """Sessions have ended; those that are not traced are ignored."""
        for session in sessions:
            traced = self._traced.pop((replica_id, session), None)
            if traced is not None:
                traced.span.set(
                    dspark__num_rounds=traced.num_rounds,
                    dspark__num_draft_tokens=traced.num_draft_tokens,
                    dspark__compute_seconds=traced.compute_s,
                    dspark__queue_seconds=traced.queue_s,
                )
                traced.span.end()

    def close_replica(self, replica_id: str) -> None:
        """All of a replica's sessions have ended."""
        self.close(replica_id, [key[1] for key in list(self._traced) if key[0] == replica_id])
