"""Where each request goes: what a router knows of its replicas, and how it chooses among them."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cluster.routing.page_digests import PrefixLayout, prefix_keys
from cluster.routing.prefix_index import PrefixIndex
from cluster.routing.prefix_journal import PrefixChanges
from cluster.routing.replica_choice import (
    ChoicePolicy,
    has_room,
    missing_tokens,
    pick,
    prefer,
    score,
)
from cluster.routing.replica_loads import ReplicaLoad, ReplicaLoads


class Prompt:
    """What a replica would have to have computed before it can go on with a request.

    Args:
        token_ids: of the prompt, and of the output so far.
        max_output_tokens: that may follow.
    """

    def __init__(self, token_ids: Sequence[int], max_output_tokens: int) -> None:
        self.token_ids = token_ids
        self.max_output_tokens = max_output_tokens
        self._keys: dict[PrefixLayout, list[int]] = {}

    def keys(self, layout: PrefixLayout) -> list[int]:
        """``prefix_keys``, computed once for each layout."""
        if layout not in self._keys:
            self._keys[layout] = prefix_keys(self.token_ids, layout)
        return self._keys[layout]


@dataclass
class _Sent:
    """A request on a replica.

    Attributes:
        number: its place among all that were sent there.
        keys: that the replica will have by it, until it has started.
        num_prompt_tokens, num_output_tokens: that are taken to be left of it.
    """

    number: int
    keys: Sequence[int]
    num_prompt_tokens: float
    num_output_tokens: float


@dataclass
class _Replica:
    """What was sent to one replica since it connected.

    Attributes:
        uncounted: tokens, by number, of what is in no report yet.
        settled: keys of requests that have started: the next report has them, if they are kept.
    """

    layout: PrefixLayout | None = None
    num_sent: int = 0
    sent: dict[str, _Sent] = field(default_factory=dict)
    uncounted: dict[int, float] = field(default_factory=dict)
    settled: list[Sequence[int]] = field(default_factory=list)


class ReplicaPicker:
    """Chooses replicas for one router, from their reports and from what it has sent itself.

    Nothing here has to agree with what another router knows. A replica is its slot; a request is
    an id of the caller's, unique on its replica.

    Args:
        policy: how replicas are scored.
        seed: of the choice among equals (tests, simulation); unset: from the operating system.
    """

    def __init__(self, policy: ChoicePolicy | None = None, *, seed: int | None = None) -> None:
        self._policy = policy or ChoicePolicy()
        self._random = random.Random(seed)
        self._loads = ReplicaLoads()
        self._replicas: dict[int, _Replica] = {}
        self._indexes: dict[PrefixLayout, PrefixIndex] = {}
        self.num_changes = 0  # of which replicas there are, and which of them are ready

    def add(self) -> int:
        """A slot for a replica that nothing is known of and that is not ready."""
        slot = self._loads.add()
        self._replicas[slot] = _Replica()
        return slot

    def remove(self, slot: int) -> None:
        """Forgets a replica, and frees its slot."""
        self._forget(slot)
        self._loads.remove(slot)
        del self._replicas[slot]

    def connect(self, slot: int, layout: PrefixLayout | None) -> None:
        """Begins anew with a replica that is ready now; ``layout`` unset: it caches no prefixes."""
        self._forget(slot)
        self._loads.report(slot, ReplicaLoad(num_free_tokens=np.inf))
        self._replicas[slot].layout = layout
        self.set_ready(slot, True)

    def disconnect(self, slot: int) -> None:
        """Forgets what the replica has and what was sent there; it is not ready."""
        self._forget(slot)

    def set_ready(self, slot: int, is_ready: bool) -> None:
        """Whether the replica may be chosen."""
        self.num_changes += bool(self._loads.is_ready[slot]) != is_ready
        self._loads.is_ready[slot] = is_ready

    def report(
        self,
        slot: int,
        load: ReplicaLoad,
        *,
        num_counted: int,
        prefixes: PrefixChanges | None = None,
    ) -> None:
        """Takes a replica's report.

        Args:
            num_counted: how many requests of this router the replica had counted in, since
                ``connect``.
            prefixes: what changed in its prefix cache.
        """
        replica = self._replicas[slot]
        self._loads.report(slot, load)
        for number in [n for n in replica.uncounted if n <= num_counted]:
            self._loads.change_unreported(slot, -replica.uncounted.pop(number))
        if replica.layout is None:
            return
        index = self._index(replica.layout)
        if prefixes is not None:
            index.apply(slot, prefixes)
        for keys in replica.settled:
            index.expect_no_more(slot, keys)
        replica.settled.clear()

    def refused(self, slot: int) -> None:
        """The replica has too much to do; others are preferred until it reports."""
        self._loads.is_refusing[slot] = True

    def pick(
        self,
        prompt: Prompt,
        *,
        avoid: Collection[int] = (),
        among: Collection[int] | None = None,
    ) -> int | None:
        """The slot that a request should go to; ``None``: no replica may be chosen.

        Args:
            avoid: slots that may not be chosen.
            among: only these may; unset: all.
        """
        loads = self._loads
        cached = self.cached_tokens(prompt) if self._indexes else 0
        missing = missing_tokens(len(prompt.token_ids), cached)
        eligible = loads.is_ready
        if avoid or among is not None:
            eligible = eligible & self._allowed(avoid, among)
        eligible = prefer(eligible, has_room(loads.free, missing) & ~loads.is_refusing)
        tie_tokens = self._policy.tie_share * len(prompt.token_ids)
        costs = score(loads.queued, missing, self._policy)
        return pick(costs, eligible, tie_tokens, self._random)

    def cached_tokens(self, prompt: Prompt) -> npt.NDArray[np.int64]:
        """How many of the prompt's tokens each replica has, or will have, by slot."""
        cached = np.zeros(self._loads.num_slots, dtype=np.int64)
        if self._policy.prefix_weight:
            for layout, index in self._indexes.items():
                # A replica is in the index of its layout only.
                index.match(prompt.keys(layout), layout.num_tokens, cached)
        return cached

    def sent(self, slot: int, request_id: str, prompt: Prompt) -> None:
        """A request is on its way to a replica."""
        replica = self._replicas[slot]
        num_cached = 0
        keys: Sequence[int] = ()
        if replica.layout is not None and self._policy.prefix_weight:
            index = self._index(replica.layout)
            keys = prompt.keys(replica.layout)
            num_cached = index.match_one(slot, keys) * replica.layout.num_tokens
            keys = index.unreported(slot, keys)
            index.expect(slot, keys)
        replica.num_sent += 1
        num_output: float = prompt.max_output_tokens
        if self._loads.mean_output_tokens(slot):
            num_output = min(num_output, self._loads.mean_output_tokens(slot))
        num_prompt = float(len(prompt.token_ids) - num_cached)
        replica.sent[request_id] = _Sent(replica.num_sent, keys, num_prompt, num_output)
        replica.uncounted[replica.num_sent] = num_prompt + num_output
        self._loads.change_unreported(slot, num_prompt + num_output)

    def started(self, slot: int, request_id: str) -> None:
        """The replica has computed the request's prompt; later calls are ignored."""
        replica = self._replicas[slot]
        sent = replica.sent.get(request_id)
        if sent is None or not sent.num_prompt_tokens:
            return
        replica.settled.append(sent.keys)
        sent.keys = ()
        self._relieve(slot, sent.number, sent.num_prompt_tokens)
        sent.num_prompt_tokens = 0.0

    def ended(self, slot: int, request_id: str) -> None:
        """The request needs nothing more; unknown ids are ignored."""
        self.started(slot, request_id)
        replica = self._replicas[slot]
        sent = replica.sent.pop(request_id, None)
        if sent is not None:
            self._relieve(slot, sent.number, sent.num_output_tokens)
            replica.uncounted.pop(sent.number, None)

    def _relieve(self, slot: int, number: int, num_tokens: float) -> None:
        """So much of a request is done, of which the next report will know."""
        uncounted = self._replicas[slot].uncounted
        if number in uncounted:
            uncounted[number] -= num_tokens
            self._loads.change_unreported(slot, -num_tokens)
        else:
            self._loads.change_reported(slot, -num_tokens)

    def _allowed(
        self, avoid: Collection[int], among: Collection[int] | None
    ) -> npt.NDArray[np.bool_]:
        allowed = np.full(self._loads.num_slots, among is None)
        if among is not None:
            allowed[list(among)] = True
        allowed[list(avoid)] = False
        return allowed

    def _index(self, layout: PrefixLayout) -> PrefixIndex:
        return self._indexes.setdefault(layout, PrefixIndex())

    def _forget(self, slot: int) -> None:
        """Forgets what the replica has, and what was sent there."""
        replica, self._replicas[slot] = self._replicas[slot], _Replica()
        self.set_ready(slot, False)
        for num_tokens in replica.uncounted.values():
            self._loads.change_unreported(slot, -num_tokens)
        if replica.layout is not None:
            index = self._index(replica.layout)
            index.drop(slot)
            for keys in [*replica.settled, *(sent.keys for sent in replica.sent.values())]:
                index.expect_no_more(slot, keys)
