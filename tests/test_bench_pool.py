"""The load of suite ``pool``, and its bar."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from cluster.bench.pool import _passes
from cluster.bench.steady_load import SteadyLoad
from cluster.errors import ReplicaLostError
from cluster.request import SamplingParams, SpeculationParams


@dataclass
class FakeChunk:
    token_ids: tuple[int, ...]


class FakeClient:
    """Answers three pieces of two tokens in 30 ms; the fifth request is lost."""

    def __init__(self) -> None:
        self.num_active = 0
        self.num_sent = 0
        self.most_active = 0
        self.off: list[bool] = []

    async def generate(
        self,
        prompt: tuple[int, ...],
        *,
        sampling: SamplingParams,
        speculation: SpeculationParams,
    ) -> AsyncIterator[FakeChunk]:
        self.num_sent += 1
        number = self.num_sent
        self.off.append(speculation.is_off)
        self.num_active += 1
        self.most_active = max(self.most_active, self.num_active)
        try:
            for _ in range(3):
                await asyncio.sleep(0.01)
                if number == 5:
                    raise ReplicaLostError("gone")
                yield FakeChunk((1, 2))
        finally:
            self.num_active -= 1


async def test_a_load_follows_its_concurrency_and_keeps_every_answer() -> None:
    client: Any = FakeClient()
    async with SteadyLoad(client, [(1, 2), (3,)], SamplingParams(temperature=0.8)) as load:
        load.run(2)
        await asyncio.sleep(0.1)
        assert client.most_active == 2
        load.run(4, speculates=False)
        start = time.monotonic()
        await asyncio.sleep(0.2)
        assert client.most_active == 4
        assert client.num_active > 2
        rate = load.throughput(start, time.monotonic())
        load.run(1)
        await asyncio.sleep(0.1)
        assert client.num_active <= 1
    assert client.num_active == 0
    assert rate > 0
    assert len(load.answers) == client.num_sent
    failed = [answer for answer in load.answers if answer.error is not None]
    assert [answer.error for answer in failed] == ["gone"]
    whole = [answer for answer in load.answers if answer.error is None]
    assert all(answer.token_ids == (1, 2) * 3 for answer in whole)
    seeds = [answer.sampling.seed for answer in load.answers]
    assert len(set(seeds)) == len(seeds)
    assert client.off[0] is False
    assert True in client.off
    assert client.off[-1] is False


GOOD: dict[str, Any] = {
    "scale_up_seconds": 6.0,
    "scaled_to_zero": True,
    "failed": 0,
    "mismatches": 0,
    "beyond_need": {"ratio_low": 0.99, "ratio_high": 1.01},
}


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_up_seconds": None},
        {"scale_up_seconds": 10.1},
        {"scaled_to_zero": False},
        {"failed": 1},
        {"mismatches": 1},
        {"beyond_need": {"ratio_low": 0.97, "ratio_high": 1.0}},
        {"beyond_need": {"ratio_low": 1.0, "ratio_high": 1.03}},
    ],
)
def test_the_bar(changes: dict[str, Any]) -> None:
    assert _passes(GOOD)
    assert not _passes({**GOOD, **changes})
