"""Closed loops of requests that run in turns on engines of this process, for comparisons.

Turns of one number are of the same requests whatever engine runs them, so easy text is easy for
all; throughput of a turn is what its passes made, over their own time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count, cycle
from typing import Any

from cluster.bench.drafter_process import DrafterProcess
from cluster.bench.load_prompts import take_prompts
from cluster.config import ClusterConfig
from cluster.engine.draft_client import DraftClient
from cluster.engine.drafter_calibration import load_drafter_calibration
from cluster.engine.engine import Engine
from cluster.engine.local_drafter import LocalDraftClient
from cluster.engine.pace import PaceStats
from cluster.engine.worker import ShardWorker
from cluster.errors import DsparkError
from cluster.request import Request, SamplingParams
from cluster.rpc.drafter_client import GrpcDraftClient

_READY_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class TurnShape:
    """What is measured.

    Attributes:
        turns: of each way at each concurrency.
        seconds: of a turn that count, behind ``warm_up_s``.
        prompt_tokens, max_tokens: of a request.
        data: prompts, as ``load_prompt_set``.
    """

    turns: int = 10
    seconds: float = 2.0
    warm_up_s: float = 0.5
    prompt_tokens: int = 128
    max_tokens: int = 256
    data: str = "stdlib-heldout"

    def prompts(self, target: str, count: int) -> list[tuple[int, ...]]:
        """So many prompts for the model in the folder ``target``. Raises: DataError."""
        return take_prompts(self.data, target, count=count, num_tokens=self.prompt_tokens)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a turn delivered.

    Attributes:
        throughput: output tokens a second.
        budget: guesses verified for a request and pass; ``tokens_per_pass``: its output tokens.
        mode: how the last pass was made.
        overruns: share of paced passes that took longer than they should have, of the target's or
            of the drafter's, whichever is larger.
    """

    throughput: float
    budget: float
    tokens_per_pass: float = 1.0
    mode: str
    overruns: float = 0.0


@dataclass(frozen=True)
class Side:
    """An engine, and its drafters if it has any."""

    engine: Engine
    client: GrpcDraftClient | LocalDraftClient | None = None

    def paced(self) -> list[PaceStats]:
        """Of the target and of the drafter, as far as they are paced."""
        drafters: list[PaceStats | None] = []
        if isinstance(self.client, GrpcDraftClient):
            drafters = [drafter.paced for drafter in self.client.status()]
        elif self.client is not None:
            drafters = [self.client.paced]
        return [paced for paced in (self.engine.load().paced, *drafters) if paced is not None]


@contextmanager
def engines(
    config: ClusterConfig, values: dict[str, Any], *, num_speculating: int = 1
) -> Iterator[list[Side]]:
    """Engines with one drafter in a process of its own, and behind them one that never speculates.

    Args:
        config: ``values``, parsed.

    Raises:
        DsparkError: target or drafter cannot be served so.
    """
    plain = Side(make_engine(config.model_copy(update={"speculative": None}), None))
    with ExitStack() as stack:
        drafter = stack.enter_context(DrafterProcess(values))
        speculating = []
        for number in range(num_speculating):
            client = drafter.connect(config, plain.engine.vocab_size, f"bench-{number}")
            speculating.append(remote_side(stack, config, client))
        yield [*speculating, plain]


def remote_side(stack: ExitStack, config: ClusterConfig, client: GrpcDraftClient) -> Side:
    """An engine with drafters elsewhere, once one is ready; ``stack`` ends the connections.

    Raises:
        DsparkError: none is within a minute, or the target cannot be served so.
    """
    stack.callback(client.close)
    _wait_ready(client)
    return Side(make_engine(config, client), client)


def pace_label(config: ClusterConfig) -> str | None:
    """The profile that passes keep the time of, for reports; ``None``: they are not paced."""
    pace = config.target.pace
    return None if pace is None else f"{pace.profile} x{pace.time_scale:g}"


class ClosedLoop:
    """A closed loop of requests, run on an engine for one turn.

    Args:
        prompts: at least one; each turn takes them in an order of its own.
        concurrency: requests at any time.
    """

    def __init__(
        self, prompts: Sequence[tuple[int, ...]], concurrency: int, shape: TurnShape
    ) -> None:
        self.concurrency = concurrency
        self._prompts = prompts
        self._shape = shape
        self._names = count()

    def turn(self, side: Side, number: int) -> Turn:
        """Runs the turn's requests for a while, and ends those that are left."""
        shape, engine = self._shape, side.engine
        order = cycle(random.Random(number).sample(self._prompts, len(self._prompts)))
        active: set[str] = set()
        # Requests are met at different places of their way, as they are in a server.
        for index in range(self.concurrency):
            max_tokens = max(shape.max_tokens * (index + 1) // self.concurrency, 1)
            self._add(engine, active, next(order), max_tokens)
        started: set[str] = set()
        while len(started) < self.concurrency:
            self._step(engine, active, order, started)
        self._run_until(engine, active, order, time.monotonic() + shape.warm_up_s)
        before = replace(engine.load().stats)  # the engine goes on counting in its own
        paced = side.paced()
        start = time.monotonic()
        num_tokens = self._run_until(engine, active, order, start + shape.seconds)
        seconds = time.monotonic() - start
        load = engine.load()
        num_steps = load.stats.num_steps - before.num_steps
        for request_id in active:
            engine.cancel(request_id, DsparkError("the turn is over"))
        while engine.has_work:
            engine.step()
        return Turn(
            throughput=num_tokens / seconds,
            budget=(load.stats.num_draft_tokens - before.num_draft_tokens) / max(num_steps, 1),
            tokens_per_pass=num_tokens / max(num_steps, 1),
            mode=load.speculation.mode,
            overruns=max(map(_overrun_share, paced, side.paced()), default=0.0),
        )

    def _run_until(
        self, engine: Engine, active: set[str], order: Iterator[tuple[int, ...]], end: float
    ) -> int:
        """Steps until ``end``; returns the output tokens."""
        num_tokens = 0
        while time.monotonic() < end:
            num_tokens += self._step(engine, active, order, set())
        return num_tokens

    def _step(
        self,
        engine: Engine,
        active: set[str],
        order: Iterator[tuple[int, ...]],
        started: set[str],
    ) -> int:
        """One step; requests that end are followed by others. Returns the output tokens."""
        num_tokens = 0
        for output in engine.step():
            if output.error is not None:
                raise output.error
            num_tokens += len(output.token_ids)
            started.add(output.request_id)
            if output.is_last:
                active.remove(output.request_id)
                self._add(engine, active, next(order), self._shape.max_tokens)
        return num_tokens

    def _add(
        self, engine: Engine, active: set[str], prompt: tuple[int, ...], max_tokens: int
    ) -> None:
        request = Request(
            request_id=f"{id(self)}-{next(self._names)}",
            prompt_token_ids=prompt,
            sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
        )
        engine.add_request(request)
        active.add(request.request_id)


def _overrun_share(then: PaceStats, now: PaceStats) -> float:
    """Of the passes between two reports."""
    return (now.num_overruns - then.num_overruns) / max(now.num_passes - then.num_passes, 1)


def make_engine(config: ClusterConfig, client: DraftClient | None) -> Engine:
    """One shard of the target with these drafters. Raises: as ``ShardWorker``."""
    worker = ShardWorker(config, 0)
    worker.start("", 0, 0)
    calibration = None if client is None else load_drafter_calibration(config)
    return worker.build_engine(client, calibration=calibration, seed=0)


def _wait_ready(client: DraftClient) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while not client.is_ready():
        if time.monotonic() > deadline:
            raise DsparkError("the drafter is not ready in time")
        time.sleep(0.05)
