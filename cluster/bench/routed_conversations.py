"""Conversations over several replicas and routers, on a clock of its own."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from cluster.bench.conversations import Conversation
from cluster.bench.timed_replica import PassTime, TimedReplica
from cluster.config import TargetConfig
from cluster.routing.replica_choice import ChoicePolicy
from cluster.routing.replica_picker import Prompt, ReplicaPicker

_REPORT_S = 0.1


@dataclass(frozen=True)
class FleetShape:
    """Replicas that are all alike, and the routers before them.

    Attributes:
        num_pages: of each replica's cache.
        warm_up_s: from the beginning, of which nothing is counted.
    """

    num_replicas: int = 4
    num_routers: int = 1
    num_pages: int = 2000
    page_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    pass_time: PassTime = field(default_factory=PassTime)
    warm_up_s: float = 40.0


@dataclass
class RoutedRun:
    """What came of a run: seconds by request, and counts of prompt tokens."""

    queue_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    requests_by_replica: list[int] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that were cached."""
        return self.num_cached_tokens / max(self.num_prompt_tokens, 1)

    def figures(self) -> dict[str, Any]:
        """For a report."""
        queue_ms, first_ms = np.array(self.queue_s) * 1e3, np.array(self.first_token_s) * 1e3
        return {
            "requests": len(queue_ms),
            "hit_rate": round(self.hit_rate, 4),
            "queue_p50_ms": round(float(np.quantile(queue_ms, 0.5)), 1),
            "queue_p99_ms": round(float(np.quantile(queue_ms, 0.99)), 1),
            "first_token_p50_ms": round(float(np.quantile(first_ms, 0.5)), 1),
            "first_token_p99_ms": round(float(np.quantile(first_ms, 0.99)), 1),
            "busiest_share": round(max(self.requests_by_replica) / len(queue_ms), 3),
        }


def run_conversations(
    conversations: Sequence[Conversation], fleet: FleetShape, policy: ChoicePolicy, seed: int
) -> RoutedRun:
    """Runs all conversations to their ends; each turn goes to one of the routers at random.

    Counted are turns that come between ``warm_up_s`` and the start of the last conversation: before
    and after that caches have room that they do not have in service.
    """
    return _Run(conversations, fleet, policy, seed).run()


class _Run:
    def __init__(
        self,
        conversations: Sequence[Conversation],
        fleet: FleetShape,
        policy: ChoicePolicy,
        seed: int,
    ) -> None:
        config = TargetConfig(
            model="none",
            page_size=fleet.page_size,
            max_num_seqs=fleet.max_num_seqs,
            max_num_batched_tokens=fleet.max_num_batched_tokens,
            max_num_waiting=1_000_000,
        )
        self._conversations = conversations
        self._fleet = fleet
        self._replicas = [
            TimedReplica(fleet.num_pages, config, fleet.pass_time)
            for _ in range(fleet.num_replicas)
        ]
        self._routers = [
            ReplicaPicker(policy, seed=seed + index) for index in range(fleet.num_routers)
        ]
        for router in self._routers:
            for slot, replica in enumerate(self._replicas):
                router.add()
                router.connect(slot, replica.prefixes.journal.layout)
        shape = (fleet.num_routers, fleet.num_replicas)
        self._num_sent = np.zeros(shape, dtype=int)
        self._versions = np.full(shape, -1)
        self._random = np.random.default_rng(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._now = 0.0
        self._counted_s = fleet.warm_up_s, max(c.start_s for c in conversations)
        self._left = sum(len(c.turns) for c in conversations)
        self._context = [list(c.system) for c in conversations]
        self._places: dict[str, tuple[int, int, float]] = {}  # conversation, router, arrival
        self._result = RoutedRun(requests_by_replica=[0] * fleet.num_replicas)

    def run(self) -> RoutedRun:
        for number, conversation in enumerate(self._conversations):
            self._at(conversation.start_s, partial(self._ask, number, 0))
        self._at(0.0, self._report)
        while self._left:
            self._now, _, event = heapq.heappop(self._events)
            event()
        return self._result

    def _at(self, time_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), event))

    def _ask(self, number: int, turn_number: int) -> None:
        turn = self._conversations[number].turns[turn_number]
        context = self._context[number]
        context += turn.message
        router_number = int(self._random.integers(len(self._routers)))
        router = self._routers[router_number]
        prompt = Prompt(tuple(context), len(turn.answer))
        slot = router.pick(prompt)
        if slot is None:
            raise RuntimeError("every replica is ready, and none was picked")
        request_id = f"{number}/{turn_number}"
        router.sent(slot, request_id, prompt)
        self._num_sent[router_number, slot] += 1
        self._places[request_id] = (number, router_number, self._now)
        self._result.requests_by_replica[slot] += self._counts(self._now)
        self._replicas[slot].submit(request_id, prompt.token_ids, turn.answer, self._now)
        if not self._replicas[slot].is_busy:
            self._begin(slot)

    def _begin(self, slot: int) -> None:
        duration_s, begun = self._replicas[slot].begin()
        for request_id in begun:
            arrived_at = self._places[request_id][2]
            if self._counts(arrived_at):
                self._result.queue_s.append(self._now - arrived_at)
        if duration_s:
            self._at(self._now + duration_s, partial(self._finish, slot))

    def _finish(self, slot: int) -> None:
        first, ended = self._replicas[slot].finish()
        for request_id in first:
            _, router_number, arrived_at = self._places[request_id]
            self._routers[router_number].started(slot, request_id)
            if self._counts(arrived_at):
                self._result.first_token_s.append(self._now - arrived_at)
        for sequence in ended:
            request_id = sequence.request.request_id
            number, router_number, arrived_at = self._places.pop(request_id)
            self._routers[router_number].ended(slot, request_id)
            if self._counts(arrived_at):
                self._result.num_prompt_tokens += sequence.num_prompt_tokens
                self._result.num_cached_tokens += sequence.usage().cached_prompt_tokens
            self._left -= 1
            conversation, turn_number = self._conversations[number], int(request_id.split("/")[1])
            self._context[number] += conversation.turns[turn_number].answer
            if turn_number + 1 < len(conversation.turns):
                next_at = self._now + conversation.turns[turn_number + 1].think_s
                self._at(next_at, partial(self._ask, number, turn_number + 1))
        self._begin(slot)

    def _counts(self, arrived_at: float) -> bool:
        return self._counted_s[0] <= arrived_at <= self._counted_s[1]

    def _report(self) -> None:
        for router_number, router in enumerate(self._routers):
            for slot, replica in enumerate(self._replicas):
                changes = replica.prefixes.journal.changes(self._versions[router_number, slot])
                self._versions[router_number, slot] = changes.version
                router.report(
                    slot,
                    replica.load(len(self._routers)),
                    num_counted=int(self._num_sent[router_number, slot]),
                    prefixes=changes,
                )
        self._at(self._now + _REPORT_S, self._report)
