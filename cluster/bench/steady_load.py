"""A load whose concurrency changes while it runs, and what became of each of its requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.errors import DsparkError
from cluster.request import SamplingParams, SpeculationMode, SpeculationParams
from cluster.rpc.client import AsyncClient


@dataclass(frozen=True)
class Answer:
    """One request of the load and its whole answer, or why there is none."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    token_ids: tuple[int, ...]
    error: str | None = None


class SteadyLoad:
    """Keeps so many seeded requests under way, each its place's next as soon as one has ended.

    Use as an asynchronous context manager: it ends with the requests that run.

    Args:
        client: of a running cluster.
        prompts: taken in turn, again and again.
        sampling: of every request, with a seed of its own each time.
    """

    def __init__(
        self, client: AsyncClient, prompts: Sequence[tuple[int, ...]], sampling: SamplingParams
    ) -> None:
        self.answers: list[Answer] = []
        self._client = client
        self._prompts = prompts
        self._sampling = sampling
        self._speculation = SpeculationParams()
        self._concurrency = 0
        self._num_sent = 0
        self._num_places = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._arrivals: list[tuple[float, int]] = []

    async def __aenter__(self) -> SteadyLoad:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._concurrency = 0
        await asyncio.gather(*self._tasks)

    def run(self, concurrency: int, *, speculates: bool = True) -> None:
        """From now on: so many requests at once; those that are too many end first."""
        self._concurrency = concurrency
        mode = SpeculationMode.AUTO if speculates else SpeculationMode.OFF
        self._speculation = SpeculationParams(mode=mode)
        while self._num_places < concurrency:
            self._num_places += 1
            task = asyncio.create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def throughput(self, start: float, end: float) -> float:
        """Output tokens per second that came between two times of ``time.monotonic``."""
        tokens = sum(count for at, count in self._arrivals if start <= at < end)
        return tokens / (end - start)

    async def _work(self) -> None:
        while self._num_places <= self._concurrency:
            number = self._num_sent
            self._num_sent += 1
            prompt = self._prompts[number % len(self._prompts)]
            sampling = replace(self._sampling, seed=number)
            token_ids: list[int] = []
            error = None
            try:
                async for chunk in self._client.generate(
                    prompt, sampling=sampling, speculation=self._speculation
                ):
                    token_ids += chunk.token_ids
                    self._arrivals.append((time.monotonic(), len(chunk.token_ids)))
            except DsparkError as caught:
                error = str(caught)
            self.answers.append(Answer(prompt, sampling, tuple(token_ids), error))
        self._num_places -= 1
