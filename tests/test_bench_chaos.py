"""What suite ``chaos`` is made of, without a cluster: its clients, its counts, its bar."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from cluster.bench.chaos import passes
from cluster.bench.chaos_census import FILES_SLACK, Census
from cluster.bench.chaos_faults import BLOWS, DISTURBANCES, Faults
from cluster.bench.chaos_load import ChaosLoad, Outcome
from cluster.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    QueueFullError,
    ReplicaLostError,
)
from cluster.request import FinishReason, SamplingParams

OUTPUT = tuple(range(100, 112))


@dataclass
class FakeChunk:
    token_ids: tuple[int, ...]
    offset: int
    attempt: int
    finish_reason: FinishReason | None = None


class FakeRouter:
    """Answers ``OUTPUT`` in pieces of three tokens behind those that the client has."""

    def __init__(self, fault: Callable[[int, int], Exception | None]) -> None:
        self.fault = fault  # by call, and tokens sent so far
        self.calls: list[dict[str, Any]] = []
        self.shift = 0

    async def generate(self, prompt: tuple[int, ...], **arguments: Any) -> AsyncIterator[FakeChunk]:
        number = len(self.calls)
        self.calls.append({**arguments, "resume_token_ids": list(arguments["resume_token_ids"])})
        offset = len(arguments["resume_token_ids"])
        while True:
            await asyncio.sleep(0.001)
            error = self.fault(number, offset)
            if error is not None:
                raise error
            piece = OUTPUT[offset : offset + 3]
            is_last = offset + 3 >= len(OUTPUT)
            yield FakeChunk(
                piece,
                offset + self.shift,
                arguments["attempt"],
                FinishReason.LENGTH if is_last else None,
            )
            if is_last:
                return
            offset += 3


class FakeRouters:
    def __init__(self, router: FakeRouter) -> None:
        self.router = router
        self.num_chosen = 0

    def choose(self, rng: random.Random, avoid: str = "") -> tuple[str, Any]:
        self.num_chosen += 1
        return f"router-{self.num_chosen}", self.router


async def _one(router: FakeRouter, deadline_s: float = 30.0) -> Any:
    routers: Any = FakeRouters(router)
    sampling = SamplingParams(temperature=0.8, max_tokens=len(OUTPUT))
    load = ChaosLoad(routers, [(1, 2)], sampling, concurrency=1, deadline_s=deadline_s, seed=1)
    await asyncio.sleep(0)
    await load.finish()
    return load.answers[0]


async def test_a_request_goes_on_with_the_tokens_it_has() -> None:
    def lost(call: int, sent: int) -> Exception | None:
        return ReplicaLostError("gone") if call < 2 and sent == 3 * (call + 1) else None

    router = FakeRouter(lost)
    answer = await _one(router)
    assert answer.outcome is Outcome.FINISHED
    assert tuple(answer.token_ids) == OUTPUT
    assert answer.num_resumes == 2
    assert not answer.problems
    assert [call["resume_token_ids"] for call in router.calls] == [
        [],
        list(OUTPUT[:3]),
        list(OUTPUT[:6]),
    ]
    assert [call["attempt"] for call in router.calls] == [0, 1, 2]
    assert router.calls[0]["timeout_s"] > router.calls[2]["timeout_s"]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (DeadlineExceededError("late"), Outcome.DEADLINE),
        (QueueFullError("full", 0.01), Outcome.REFUSED),
        (InvalidRequestError("sampling", "is wrong"), Outcome.FAILED),
    ],
)
async def test_what_ends_a_request(error: Exception, outcome: Outcome) -> None:
    answer = await _one(FakeRouter(lambda call, sent: error))
    assert answer.outcome is outcome
    assert str(error) in answer.error


async def test_routers_that_stay_lost_end_at_the_deadline() -> None:
    answer = await _one(FakeRouter(lambda call, sent: ReplicaLostError("gone")), deadline_s=0.5)
    assert answer.outcome is Outcome.DEADLINE


async def test_skipped_tokens_are_a_problem() -> None:
    router = FakeRouter(lambda call, sent: None)
    router.shift = 1
    assert "tokens from 1 on" in (await _one(router)).problems[0]


async def test_a_call_that_nobody_ends_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.bench.chaos_load._HANG_S", 0.2)

    class Silent(FakeRouter):
        async def generate(self, prompt: tuple[int, ...], **arguments: Any) -> Any:
            await asyncio.sleep(60)
            yield

    assert (await _one(Silent(lambda call, sent: None), 0.1)).outcome is Outcome.HUNG


def test_a_census_names_what_is_left() -> None:
    before = Census(processes=Counter(shard=4, router=2), most_files={"router": 50})
    assert before.leaks(before) == []
    after = Census(
        processes=Counter(shard=5, router=1),
        most_files={"router": 50 + FILES_SLACK + 1},
        stopped=1,
        num_sessions=2,
    )
    assert after.leaks(before) == [
        "1 processes of router, 2 before",
        "5 processes of shard, 4 before",
        "63 files of a router, 50 before",
        "1 stopped processes",
        "2 draft sessions",
    ]


def test_faults_are_repeatable_and_all_come() -> None:
    cluster: Any = None
    first, second, other = (Faults(cluster, seed=seed) for seed in (1, 1, 2))

    def dealt(faults: Faults) -> list[Any]:
        return [faults._deal(faults._blows, BLOWS) for _ in BLOWS]

    assert dealt(first) == (blows := dealt(second)) != dealt(other)
    assert sorted(blows) == sorted(BLOWS)
    assert {d.how for d in DISTURBANCES} >= {"cut", "delay"}


GOOD: dict[str, Any] = {
    "requests": 100,
    "finished": 97,
    "lost": 0,
    "mismatches": 0,
    "leaks": 0,
    "killed": 9,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"requests": 0, "finished": 0},
        {"finished": 49},
        {"lost": 1},
        {"mismatches": 1},
        {"leaks": 1},
        {"killed": 0},
    ],
)
def test_the_bar(changes: dict[str, Any]) -> None:
    assert passes(GOOD)
    assert not passes({**GOOD, **changes})
