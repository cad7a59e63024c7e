"""How much load, and putting one client under it at every concurrency in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.bench.load_clients import LoadClient
from cluster.bench.load_generator import closed_loop
from cluster.bench.load_prompts import PromptSource
from cluster.bench.load_record import LoadResult
from cluster.errors import DsparkError
from cluster.request import Request

_WARM_UP_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class LoadShape:
    """What every side gets.

    Attributes:
        concurrencies: numbers of requests at once.
        waves: requests at a concurrency, as a multiple of it.
        min_requests: least number of requests at a concurrency.
        prompt_tokens, max_tokens: lengths; every output has ``max_tokens``.
        temperature: 0 is greedy.
    """

    concurrencies: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    waves: int = 2
    min_requests: int = 4
    prompt_tokens: int = 128
    max_tokens: int = 128
    temperature: float = 0.0

    def num_requests(self, concurrency: int) -> int:
        """Requests of one run at a concurrency."""
        return max(self.min_requests, self.waves * concurrency)

    def num_prompts(self, runs: int) -> int:
        """Prompts of all runs, the warm-up's included."""
        measured = sum(self.num_requests(concurrency) for concurrency in self.concurrencies)
        return runs * (measured + max(self.concurrencies))


Work = Sequence[tuple[int, list[Request]]]


def make_work(prompts: PromptSource, shape: LoadShape) -> tuple[list[Request], Work]:
    """Requests of one run: those to warm up with, and those of each concurrency."""

    def requests(count: int, max_tokens: int) -> list[Request]:
        return prompts.requests([max_tokens] * count, [None] * count, shape.temperature)

    warm_up = requests(max(shape.concurrencies), min(_WARM_UP_TOKENS, shape.max_tokens))
    return warm_up, [
        (concurrency, requests(shape.num_requests(concurrency), shape.max_tokens))
        for concurrency in shape.concurrencies
    ]


def run_work(
    make_client: Callable[[], LoadClient], warm_up: Sequence[Request], work: Work
) -> dict[int, LoadResult]:
    """Warms up with everything at once, then runs each concurrency; results by concurrency.

    Args:
        make_client: called in the event loop; the client is closed behind the work.

    Raises:
        DsparkError: a request of the warm-up failed. Others are recorded as failed.
    """

    async def run() -> dict[int, LoadResult]:
        client = make_client()
        try:
            check_finished(await closed_loop(client, warm_up, len(warm_up)))
            return {
                concurrency: await closed_loop(client, requests, concurrency)
                for concurrency, requests in work
            }
        finally:
            await client.close()

    return asyncio.run(run())


def check_finished(result: LoadResult) -> None:
    """Raises DsparkError where a request has failed."""
    for record in result.records:
        if record.error is not None:
            raise DsparkError(f"a request failed under load: {record.error}")
