"""Load on a cluster that is being broken: clients that go on with what they have, on any router."""

from __future__ import annotations

import asyncio
import enum
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cluster.errors import (
    ClusterStateError,
    DeadlineExceededError,
    DsparkError,
    QueueFullError,
    ReplicaLostError,
)
from cluster.request import SamplingParams
from cluster.rpc.client import AsyncClient, Chunk
from cluster.rpc.cluster_status import ClusterStatus

_STATUS_PERIOD_S = 0.5
_STATUS_TIMEOUT_S = 2.0
_RETRY_S = 0.3
# A call that goes on for so long behind its own deadline hangs.
_HANG_S = 5.0


class Outcome(enum.StrEnum):
    """What became of a request."""

    FINISHED = "finished"
    DEADLINE = "deadline"  # its own, with that status
    REFUSED = "refused"  # before anything of it was accepted, since queues were full
    FAILED = "failed"  # ended by an error that is none of these
    HUNG = "hung"  # nobody ended it


@dataclass(kw_only=True)
class ChaosAnswer:
    """One request and what came back.

    Attributes:
        token_ids: of all attempts, one behind the other.
        num_resumes: times that it went on through a router anew.
        problems: of its stream: tokens repeated or skipped, chunks of another attempt.
        longest_gap_s: between two chunks, or before the first one.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    outcome: Outcome = Outcome.HUNG
    error: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_resumes: int = 0
    problems: list[str] = field(default_factory=list)
    longest_gap_s: float = 0.0


class Routers:
    """The routers behind one service: those that answer are used, as a load balancer would.

    Args:
        addresses: where a router may be.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self.latest: dict[str, ClusterStatus] = {}
        self._clients = {address: AsyncClient(address, resume_timeout_s=0) for address in addresses}
        self._ready: set[str] = set()
        self._watches: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Routers:
        self._watches = [asyncio.create_task(self._watch(address)) for address in self._clients]
        return self

    async def __aexit__(self, *_: object) -> None:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for client in self._clients.values():
            await client.close()

    @property
    def ready(self) -> list[str]:
        """Those that have answered lately."""
        return sorted(self._ready)

    def choose(self, rng: random.Random, avoid: str = "") -> tuple[str, AsyncClient]:
        """One that answers, if any does, another than ``avoid`` if there is one."""
        among = self._ready or set(self._clients)
        address = rng.choice(sorted(among - {avoid} or among))
        return address, self._clients[address]

    async def _watch(self, address: str) -> None:
        client = self._clients[address]
        while True:
            try:
                self.latest[address] = await client.status(timeout_s=_STATUS_TIMEOUT_S)
                self._ready.add(address)
            except DsparkError:
                self._ready.discard(address)
                self.latest.pop(address, None)
            await asyncio.sleep(_STATUS_PERIOD_S)


class ChaosLoad:
    """Keeps so many seeded requests under way, each with a deadline, until it is stopped.

    Args:
        routers: where requests go.
        prompts: taken in turn.
        sampling: of each request, with a seed of its own.
        concurrency: requests at once.
        deadline_s: of each.
        seed: of the choice of routers.
    """

    def __init__(
        self,
        routers: Routers,
        prompts: Sequence[tuple[int, ...]],
        sampling: SamplingParams,
        *,
        concurrency: int,
        deadline_s: float,
        seed: int,
    ) -> None:
        self.answers: list[ChaosAnswer] = []
        self.num_tokens = 0
        self._routers = routers
        self._prompts = prompts
        self._sampling = sampling
        self._deadline_s = deadline_s
        self._rng = random.Random(seed)
        self._is_over = False
        self._tasks = [asyncio.create_task(self._work()) for _ in range(concurrency)]

    async def finish(self) -> None:
        """Sends nothing new, and waits for what runs."""
        self._is_over = True
        await asyncio.gather(*self._tasks)

    def counts(self) -> Counter[Outcome]:
        """Requests by what became of them."""
        return Counter(answer.outcome for answer in self.answers)

    async def _work(self) -> None:
        while not self._is_over:
            number = len(self.answers)
            answer = ChaosAnswer(
                request_id=f"chaos-{number}",
                prompt_token_ids=self._prompts[number % len(self._prompts)],
                sampling=replace(self._sampling, seed=number),
            )
            self.answers.append(answer)
            try:
                async with asyncio.timeout(self._deadline_s + _HANG_S):
                    answer.outcome = await self._run(answer)
            except TimeoutError:
                answer.outcome = Outcome.HUNG
            if answer.outcome is Outcome.REFUSED:
                await asyncio.sleep(_RETRY_S)

    async def _run(self, answer: ChaosAnswer) -> Outcome:
        deadline = time.monotonic() + self._deadline_s
        attempt, address = 0, ""
        while (remaining_s := deadline - time.monotonic()) > 0:
            address, client = self._routers.choose(self._rng, avoid=address)
            try:
                if await self._attempt(answer, client, attempt, remaining_s):
                    return Outcome.FINISHED
                answer.error = "the stream ended without a last chunk"
                return Outcome.FAILED
            except (ReplicaLostError, ClusterStateError) as error:
                # Anybody may go on with what is there; nothing of it is kept on a router.
                answer.error = str(error)
                answer.num_resumes += 1
                attempt += 1
                if len(answer.token_ids) >= answer.sampling.max_tokens:
                    return Outcome.FINISHED
                await asyncio.sleep(_RETRY_S * self._rng.uniform(0.5, 1.0))
            except DeadlineExceededError as error:
                answer.error = str(error)
                return Outcome.DEADLINE
            except QueueFullError as error:
                answer.error = str(error)
                if not answer.token_ids:
                    return Outcome.REFUSED
                attempt += 1
                await asyncio.sleep(error.retry_after_s)
            except DsparkError as error:
                answer.error = f"{type(error).__name__}: {error}"
                return Outcome.FAILED
        return Outcome.DEADLINE

    async def _attempt(
        self, answer: ChaosAnswer, client: AsyncClient, attempt: int, timeout_s: float
    ) -> bool:
        """One call; returns whether it came to its end."""
        last = time.monotonic()
        async for chunk in client.generate(
            answer.prompt_token_ids,
            sampling=answer.sampling,
            timeout_s=timeout_s,
            resume_token_ids=answer.token_ids,
            request_id=answer.request_id,
            attempt=attempt,
        ):
            now = time.monotonic()
            answer.longest_gap_s = max(answer.longest_gap_s, now - last)
            last = now
            _check(answer, chunk, attempt)
            answer.token_ids += chunk.token_ids
            self.num_tokens += len(chunk.token_ids)
            if chunk.finish_reason is not None:
                return True
        return False


def _check(answer: ChaosAnswer, chunk: Chunk, attempt: int) -> None:
    if chunk.attempt != attempt:
        answer.problems.append(f"attempt {attempt} was sent a chunk of {chunk.attempt}")
    if chunk.token_ids and chunk.offset != len(answer.token_ids):
        answer.problems.append(
            f"tokens from {chunk.offset} on came behind {len(answer.token_ids)} tokens"
        )
