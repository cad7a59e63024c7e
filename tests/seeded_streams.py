"""Seeded requests that run while something is broken: when their tokens came, and whether each of
them is what plain transformers would have said (rule 9); and the cluster that they run on."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from cluster.bench.chaos import ChaosPlan, chaos_settings
from cluster.bench.drafter_choice import DrafterChoice
from cluster.bench.judge import judge_answers
from cluster.bench.own_serving import OwnSettings
from cluster.errors import DsparkError
from cluster.request import SamplingParams
from cluster.rpc.client import AsyncClient
from cluster.rpc.cluster_status import ClusterStatus
from tests.models import DRAFTER, PROFILE, TARGET

NUM_STREAMS = 6
PATIENCE_S = 240.0
SAMPLING = SamplingParams(temperature=0.8, max_tokens=384, ignore_eos=True)


def paced_settings(*, num_drafters: int) -> OwnSettings:
    """As chaos has them, of the project's own pair: two replicas of two shards, two routers."""
    own = OwnSettings(
        target=TARGET,
        drafter=DrafterChoice.parse(f"dspark={DRAFTER}"),
        dtype="float32",
        num_threads=1,
        scheduler="search",
        enforce_eager=True,
    )
    settings = chaos_settings(own, ChaosPlan(profile=PROFILE, time_scale=20.0))
    drafter = {**settings.overrides["drafter"], "num_replicas": num_drafters}
    return replace(settings, overrides={**settings.overrides, "drafter": drafter})


@dataclass
class Stream:
    """One seeded request, and when its tokens came."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    is_finished: bool = False

    async def run(self, client: AsyncClient) -> None:
        async for chunk in client.generate(self.prompt_token_ids, sampling=self.sampling):
            if chunk.token_ids:
                self.token_ids += chunk.token_ids
                self.times.append(time.monotonic())
        self.is_finished = True

    def longest_gap_s(self, since: float) -> float:
        """Seconds without a token from ``since`` on, or from the last token before that."""
        before = [at for at in self.times if at <= since][-1:]
        times = [*before, *(at for at in self.times if at > since)]
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


@asynccontextmanager
async def streams(
    client: AsyncClient, prompts: list[tuple[int, ...]]
) -> AsyncIterator[list[Stream]]:
    """Six at once, all of which have begun; leaving the block waits for their ends, and judges."""
    started = [
        Stream(prompt, replace(SAMPLING, seed=number))
        for number, prompt in enumerate(prompts[:NUM_STREAMS])
    ]
    tasks = [asyncio.create_task(stream.run(client)) for stream in started]
    try:
        await until(lambda: all(len(s.token_ids) > 8 for s in started) or any_failed(tasks))
        yield started
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert all(len(s.token_ids) == SAMPLING.max_tokens for s in started)
    verdict = judge_answers(TARGET, started)
    assert verdict.num_positions == len(started) * SAMPLING.max_tokens
    assert verdict.num_mismatches == 0


def any_failed(tasks: list[asyncio.Task[None]]) -> bool:
    return any(task.done() and task.exception() for task in tasks)


async def wait_whole(client: AsyncClient, *, num_replicas: int, num_drafters: int) -> None:
    """Until the router knows all replicas, and those all drafters."""

    def is_whole(status: ClusterStatus) -> bool:
        return [replica.state for replica in status.replicas] == ["ready"] * num_replicas and all(
            [drafter.state for drafter in replica.drafters] == ["ready"] * num_drafters
            for replica in status.replicas
        )

    await until_status(client, is_whole)


async def until_status(client: AsyncClient, condition: Callable[[ClusterStatus], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    status: ClusterStatus | DsparkError | None = None
    while time.monotonic() < deadline:
        try:
            status = await client.status(timeout_s=3.0)
            if condition(status):
                return
        except DsparkError as error:
            status = error
        await asyncio.sleep(0.1)
    raise AssertionError(f"it did not happen in time: {status}")


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.1)
