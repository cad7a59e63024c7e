"""Filter, score, pick: each part, and what they come to together."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.routing.page_digests import PrefixLayout, page_digest, page_key, prefix_keys
from cluster.routing.prefix_journal import PrefixChanges
from cluster.routing.replica_choice import (
    POLICIES,
    ChoicePolicy,
    has_room,
    missing_tokens,
    pick,
    prefer,
    queued_tokens,
    score,
)
from cluster.routing.replica_loads import ReplicaLoad
from cluster.routing.replica_picker import Prompt, ReplicaPicker

LAYOUT = PrefixLayout(page_size=4, stride=1)


def make_picker(
    loads: list[float], *, policy: ChoicePolicy | None = None, seed: int = 0, num_routers: int = 1
) -> ReplicaPicker:
    """A picker of replicas with so many queued tokens and room for everything."""
    picker = ReplicaPicker(policy, seed=seed)
    for slot, queued in enumerate(loads):
        assert picker.add() == slot
        picker.connect(slot, LAYOUT)
        load = ReplicaLoad(queued, 1e6, num_routers, mean_output_tokens=10.0)
        picker.report(slot, load, num_counted=0)
    return picker


def prompt(length: int, *, first: int = 0, max_output_tokens: int = 10) -> Prompt:
    return Prompt(range(first, first + length), max_output_tokens)


def held(length: int, *, first: int = 0) -> PrefixChanges:
    """A report of a cache that has so many tokens' pages."""
    keys = prefix_keys(range(first, first + length + 1), LAYOUT)
    return PrefixChanges(1, True, tuple(keys))


def test_the_parts() -> None:
    assert queued_tokens(100.0, 10.0, 3) == 130.0
    assert queued_tokens(100.0, 10.0, 0) == 110.0
    assert missing_tokens(10, np.array([0, 8, 12])).tolist() == [10.0, 2.0, 1.0]
    assert has_room(np.array([9.0, 10.0]), np.array([10.0, 10.0])).tolist() == [False, True]
    yes, no = np.array([True, False, True]), np.array([False, True, False])
    assert prefer(yes, np.array([True, True, False])).tolist() == [True, False, False]
    assert prefer(yes, no) is yes
    costs = score(np.array([1.0, 2.0]), np.array([10.0, 20.0]), ChoicePolicy(1.0, 0.5))
    assert costs.tolist() == [6.0, 12.0]


@given(
    costs=st.lists(st.floats(0, 1e9), min_size=1, max_size=40),
    data=st.data(),
    tie=st.floats(0, 100),
)
def test_what_is_picked_is_eligible_and_next_to_cheapest(
    costs: list[float], data: st.DataObject, tie: float
) -> None:
    eligible = np.array([data.draw(st.booleans()) for _ in costs])
    chosen = pick(np.array(costs), eligible, tie, random.Random(0))
    if chosen is None:
        assert not eligible.any()
        return
    assert eligible[chosen]
    assert costs[chosen] <= min(c for c, e in zip(costs, eligible, strict=True) if e) + tie


def test_equals_are_equally_likely() -> None:
    rng = random.Random(0)
    costs, eligible = np.array([5.0, 5.0, 9.0, 5.0]), np.ones(4, dtype=np.bool_)
    counts = Counter(pick(costs, eligible, 1.0, rng) for _ in range(3000))
    assert counts.keys() == {0, 1, 3}
    assert all(850 < count < 1150 for count in counts.values())


def test_a_prompts_keys_are_those_of_its_pages_but_for_the_last_token() -> None:
    tokens = [5, 6, 7, 70_000, 9, 10, 11, 12]
    first = page_digest(b"", tokens[:4])
    second = page_digest(first, tokens[4:])
    assert prefix_keys(tokens, LAYOUT) == [page_key(first)]
    assert prefix_keys([*tokens, 1], LAYOUT) == [page_key(first), page_key(second)]
    assert prefix_keys([*tokens, 1], PrefixLayout(4, 2)) == [page_key(second)]
    assert prefix_keys(tokens[:4], LAYOUT) == []


def test_a_prefix_is_worth_the_tokens_that_it_saves() -> None:
    picker = make_picker([0.0, 300.0, 0.0])
    picker.report(1, ReplicaLoad(300.0, 1e6), num_counted=0, prefixes=held(400))
    assert picker.cached_tokens(prompt(500))[:3].tolist() == [0, 400, 0]
    assert picker.pick(prompt(500)) == 1
    assert picker.pick(prompt(300)) != 1  # saves 296 tokens
    picker.report(1, ReplicaLoad(500.0, 1e6), num_counted=0)
    assert picker.pick(prompt(500)) != 1


@pytest.mark.parametrize("name", ["queue", "random"])
def test_other_policies_look_at_no_prefix(name: str) -> None:
    picker = make_picker([0.0, 100.0], policy=POLICIES[name])
    picker.report(1, ReplicaLoad(100.0, 1e6), num_counted=0, prefixes=held(400))
    counts = Counter(picker.pick(prompt(500)) for _ in range(200))
    assert (counts[1] > 50) == (name == "random")
    assert (counts[0] == 200) == (name == "queue")


def test_where_pages_are_short_and_queues_are_full_is_chosen_last() -> None:
    picker = make_picker([0.0, 50.0, 100.0])
    picker.report(0, ReplicaLoad(0.0, 99.0), num_counted=0)
    assert picker.pick(prompt(100)) == 1
    picker.refused(1)
    assert picker.pick(prompt(100)) == 2
    picker.set_ready(2, False)
    assert picker.pick(prompt(100)) == 0
    picker.report(1, ReplicaLoad(50.0, 1e6), num_counted=0)
    assert picker.pick(prompt(100)) == 1
    assert picker.pick(prompt(100), avoid=[1]) == 0
    assert picker.pick(prompt(100), among=[2]) is None


def test_what_was_sent_counts_until_the_replica_counts_it() -> None:
    picker = make_picker([0.0, 80.0])
    for number in (1, 2):  # each 40 tokens of a prompt, and the 10 that outputs have
        assert picker.pick(prompt(40, first=1000 * number)) == 0
        picker.sent(0, str(number), prompt(40, first=1000 * number))
    assert picker.pick(prompt(40, first=9000)) == 1
    picker.report(0, ReplicaLoad(50.0, 1e6, 1, 10.0), num_counted=1)
    assert picker.pick(prompt(40, first=9000)) == 1  # the second is not in it
    picker.report(0, ReplicaLoad(50.0, 1e6, 1, 10.0), num_counted=2)
    assert picker.pick(prompt(40, first=9000)) == 0
    picker.sent(0, "3", prompt(40, first=3000))
    assert picker.pick(prompt(40, first=9000)) == 1
    picker.ended(0, "3")
    picker.ended(0, "unknown")
    assert picker.pick(prompt(40, first=9000)) == 0


def test_what_has_ended_since_a_report_is_not_queued() -> None:
    picker = make_picker([0.0, 30.0])
    for name in ("a", "b"):
        picker.sent(0, name, prompt(40, first=ord(name) * 1000))
    picker.started(0, "b")  # 10 tokens of output are left of it
    picker.report(0, ReplicaLoad(60.0, 1e6, 1, 10.0), num_counted=2)
    assert picker.pick(prompt(40, first=9000)) == 1
    picker.started(0, "a")
    picker.started(0, "a")
    assert Counter(picker.pick(prompt(40, first=9000)) for _ in range(9)) == {0: 9}
    picker.ended(0, "a")
    picker.ended(0, "b")
    picker.report(1, ReplicaLoad(3.0, 1e6, 1, 10.0), num_counted=0)
    assert Counter(picker.pick(prompt(40, first=9000)) for _ in range(9)) == {0: 9}


def test_requests_on_their_way_draw_others_with_their_prefix() -> None:
    picker = make_picker([0.0] * 4)
    first = picker.pick(prompt(4000))
    assert first is not None
    picker.sent(first, "a", prompt(400))
    assert picker.cached_tokens(prompt(400))[first] == 396
    picker.started(first, "a")
    assert picker.cached_tokens(prompt(400))[first] == 396  # until the replica reports
    picker.report(first, ReplicaLoad(0.0, 1e6), num_counted=1, prefixes=PrefixChanges(1))
    assert not picker.cached_tokens(prompt(400)).any()  # the replica did not keep it


def test_a_replica_that_is_lost_has_nothing() -> None:
    picker = make_picker([0.0, 0.0])
    picker.report(0, ReplicaLoad(0.0, 1e6), num_counted=0, prefixes=held(400))
    picker.sent(0, "a", prompt(400, first=7000))
    picker.disconnect(0)
    assert not picker.cached_tokens(prompt(400)).any()
    assert not picker.cached_tokens(prompt(400, first=7000)).any()
    assert picker.pick(prompt(400)) == 1
    picker.connect(0, None)  # caches no prefixes now
    picker.sent(0, "b", prompt(400))
    assert not picker.cached_tokens(prompt(400)).any()
    picker.remove(0)
    assert picker.add() == 0
    assert picker.pick(prompt(400), avoid=[1]) is None


def test_replicas_of_other_layouts_are_compared_in_tokens() -> None:
    picker = ReplicaPicker(seed=0)
    layouts = [PrefixLayout(4, 1), PrefixLayout(8, 4)]
    tokens = list(range(200))
    for layout in layouts:
        slot = picker.add()
        picker.connect(slot, layout)
        keys = PrefixChanges(1, True, tuple(prefix_keys(tokens, layout)))
        picker.report(slot, ReplicaLoad(0.0, 1e6), num_counted=0, prefixes=keys)
    assert picker.cached_tokens(Prompt(tokens, 1))[:2].tolist() == [196, 192]


def imbalance(num_routers: int, told: int) -> float:
    """Most over mean requests of 60 replicas when routers share no more than one old report."""
    pickers = [make_picker([0.0] * 60, seed=s, num_routers=told) for s in range(num_routers)]
    counts: Counter[int] = Counter()
    for number in range(600):
        picker = pickers[number % num_routers]
        asked = prompt(40, first=1000 * number)
        slot = picker.pick(asked)
        assert slot is not None
        picker.sent(slot, str(number), asked)
        counts[slot] += 1
    return max(counts.values()) / 10


def test_routers_that_see_the_same_do_not_herd() -> None:
    assert imbalance(num_routers=1, told=1) == 1.0
    assert imbalance(num_routers=6, told=6) <= 1.6


def test_routers_count_on_each_other() -> None:
    """One empty replica among busy ones is not filled by each router on its own."""
    counts: Counter[int] = Counter()
    for seed in range(8):
        picker = make_picker([0.0, *[1000.0] * 7], seed=seed, num_routers=8)
        for number in range(20):
            asked = prompt(40, first=1000 * number + seed)
            slot = picker.pick(asked)
            assert slot is not None
            picker.sent(slot, str(number), asked)
            counts[slot] += 1
    # 1000 tokens are 20 requests of 50; each router sends its share of them, and not all 20.
    assert 16 <= counts[0] <= 48
