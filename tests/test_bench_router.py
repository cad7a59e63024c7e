"""The router's bench: its conversations, its replicas without a model, and its report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.bench.arrival_trace import Arrival
from cluster.bench.conversations import (
    ConversationShape,
    generated_lengths,
    make_conversations,
    repeated_share,
)
from cluster.bench.pick_time import measure_picks
from cluster.bench.routed_conversations import FleetShape, run_conversations
from cluster.bench.router import RouterPlan, run
from cluster.bench.timed_replica import PassTime, TimedReplica
from cluster.config import TargetConfig
from cluster.errors import ConfigError
from cluster.routing.replica_choice import POLICIES

SHAPE = ConversationShape(
    num_conversations=30,
    starts_per_second=10.0,
    num_system_prompts=2,
    system_tokens=32,
    mean_turns=3.0,
    think_s=0.5,
    max_context=300,
)
LENGTHS = [Arrival(0.0, 150, 12), Arrival(0.0, 80, 6)]
FLEET = FleetShape(num_replicas=3, num_pages=200, warm_up_s=0.0)


def test_conversations_are_what_was_asked_for() -> None:
    conversations = make_conversations(SHAPE, LENGTHS, seed=1)
    assert conversations == make_conversations(SHAPE, LENGTHS, seed=1)
    assert len(conversations) == 30
    assert len({c.system for c in conversations}) == 2
    assert any(len(c.turns) > 2 for c in conversations)
    for conversation in conversations:
        spoken = sum(len(t.message) + len(t.answer) for t in conversation.turns)
        assert conversation.turns
        assert len(conversation.system) + spoken <= 300
        assert all(t.message and t.answer for t in conversation.turns)
    assert 0.3 < repeated_share(conversations) < 0.9
    starts = [c.start_s for c in conversations]
    assert starts == sorted(starts)
    lengths = generated_lengths(seed=0)
    assert all(8 <= a.num_prompt_tokens <= 4000 and a.num_output_tokens >= 1 for a in lengths)


def test_a_timed_replica_serves_what_the_engine_would() -> None:
    config = TargetConfig(model="none", max_num_seqs=2, max_num_batched_tokens=16, page_size=4)
    replica = TimedReplica(100, config, PassTime(base_s=1.0, token_s=0.5))
    for name in ("a", "b", "c"):
        replica.submit(name, [1] * 10, [7, 8, 9], now=0.0)
    assert replica.load(2).num_queued_tokens > 30
    begun, first, seconds = [], [], []
    ended: list[str] = []
    while len(ended) < 3:
        duration_s, names = replica.begin()
        begun += names
        seconds.append(duration_s)
        has_first, has_ended = replica.finish()
        first += has_first
        ended += [s.request.request_id for s in has_ended]
        assert all(s.token_ids == [*[1] * 10, 7, 8, 9] for s in has_ended)
    assert begun == first == ended == ["a", "b", "c"]
    # "b" shares two pages with "a" in the first pass: 10 and 2 tokens.
    assert seconds[:2] == [7.0, 2.0]
    assert replica.load(1).num_free_tokens == 400
    assert replica.load(1).num_queued_tokens == 0
    assert replica.begin() == (0.0, [])


@pytest.mark.parametrize("num_routers", [1, 3])
def test_following_prefixes_finds_more(num_routers: int) -> None:
    fleet = replace(FLEET, num_routers=num_routers)
    shape = replace(SHAPE, num_conversations=80)
    conversations = make_conversations(shape, LENGTHS, seed=2)
    runs = {
        name: run_conversations(conversations, fleet, policy, seed=3)
        for name, policy in POLICIES.items()
    }
    for result in runs.values():
        num_counted = sum(result.requests_by_replica)
        assert 80 <= num_counted < sum(len(c.turns) for c in conversations)
        assert len(result.queue_s) == len(result.first_token_s) == num_counted
        assert all(
            q <= f
            for q, f in zip(sorted(result.queue_s), sorted(result.first_token_s), strict=True)
        )
    assert runs["prefix"].hit_rate > 1.3 * runs["random"].hit_rate
    again = run_conversations(conversations, fleet, POLICIES["prefix"], seed=3)
    assert again == runs["prefix"]


def test_the_report_has_its_figures() -> None:
    plan = RouterPlan(
        conversations=SHAPE,
        fleet=FLEET,
        runs=2,
        other_pages=(60,),
        other_routers=(2,),
        pick_replicas=20,
        pick_prompts=30,
    )
    notes: list[str] = []
    report = run(plan, notes.append)
    assert {"pick_us", "hit_rate_ratio", "queue_p99_ms_prefix", "queue_p99_ms_random"} <= set(
        report.figures
    )
    assert len(report.figures["rows"]) == len(notes) == 2 * 3 + 2 * 2
    assert "generated" in report.figures["lengths"]
    assert report.passed == (
        report.figures["pick_us"] < 100
        and report.figures["hit_rate_ratio_low"] >= 3
        and report.figures["queue_p99_ms_prefix"] <= report.figures["queue_p99_ms_random"]
    )


def test_a_choice_takes_time_among_few_too() -> None:
    assert all(value > 0 for value in measure_picks(3, 20).values())


def test_too_few_conversations_are_refused_by_option() -> None:
    few = replace(SHAPE, num_conversations=2)
    plan = RouterPlan(conversations=few, runs=1, pick_replicas=2, pick_prompts=2)
    with pytest.raises(ConfigError, match="--conversations"):
        run(plan, print)
