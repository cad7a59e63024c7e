"""Suite ``frontier``: throughput over load, adaptive speculation against every fixed amount of it.

Three engines in this process, one adaptive, one with a fixed amount, one without speculation, and
the drafter of the first two in another one over gRPC. At each concurrency the ways to speculate
take turns, in another order each time, for a while each: so what slows the machine for a while hits
all of them. Turns of one number are all of the same requests, so easy text is easy for all ways.
Throughput of a turn is what its passes made, over their own time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count, cycle
from typing import Any

from cluster.bench.drafter_process import DrafterProcess
from cluster.bench.load_prompts import PromptSource
from cluster.bench.paired import paired_ratio
from cluster.bench.report import Report
from cluster.config import ClusterConfig, SpeculativeConfig
from cluster.engine.draft_client import DraftClient
from cluster.engine.drafter_calibration import load_drafter_calibration
from cluster.engine.engine import Engine
from cluster.engine.pace import PaceStats
from cluster.engine.worker import ShardWorker, load_tokenizer
from cluster.errors import DsparkError
from cluster.request import Request, SamplingParams
from cluster.rpc.drafter_client import GrpcDraftClient

ADAPTIVE = "adaptive"
PLAIN = "plain"
_FIXED_BAR = 0.97
_PLAIN_BAR = 0.98
_READY_TIMEOUT_S = 60.0
_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class FrontierShape:
    """What is measured.

    Attributes:
        concurrencies: requests under way at any time.
        fixed: numbers of draft tokens that are always drafted and verified; 0 is no speculation.
        turns: of each way at each concurrency.
        seconds: of a turn that count, behind ``warm_up_s``.
        prompt_tokens, max_tokens: of a request.
        data: prompts, as ``load_prompt_set``.
    """

    concurrencies: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    fixed: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    turns: int = 10
    seconds: float = 2.0
    warm_up_s: float = 0.5
    prompt_tokens: int = 128
    max_tokens: int = 256
    data: str = "stdlib-heldout"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a turn delivered.

    Attributes:
        throughput: output tokens a second.
        budget: guesses verified for a request and pass.
        mode: how the last pass was made.
        overruns: share of paced passes that took longer than they should have, of the target's or
            of the drafter's, whichever is larger.
    """

    throughput: float
    budget: float
    mode: str
    overruns: float = 0.0


def run(values: dict[str, Any], shape: FrontierShape, note: Callable[[str], None]) -> Report:
    """Runs the suite.

    It passes where adaptive throughput is at least 0.97 times that of the best fixed number (which
    is chosen on the other half of the turns) and 0.98 times that without speculation, at every
    concurrency and with the lower end of the 95% interval.

    Args:
        values: ``args`` of a configuration with a ``speculative`` part.

    Raises:
        DsparkError: target or drafter cannot be served so.
    """
    config = ClusterConfig.parse(values)
    if config.speculative is None:
        raise ValueError("there is nothing to draft with")
    source = PromptSource(
        shape.data,
        load_tokenizer(config.target.model),
        count=max(shape.concurrencies) * 2,
        num_tokens=shape.prompt_tokens,
    )
    prompts = [source.take() for _ in range(max(shape.concurrencies) * 2)]
    rows = []
    with engines(config, values, num_speculating=2) as (adaptive, fixed, plain):
        for concurrency in shape.concurrencies:
            load = _Load(prompts, concurrency, shape)
            turns = _take_turns(adaptive, fixed, plain, config.speculative, load, shape)
            row = frontier_row(concurrency, turns)
            rows.append(row)
            note(_line(row))
    return Report(
        suite="frontier",
        figures={"rows": rows, "paced": pace_label(config)},
        passed=all(row["passed"] for row in rows),
    )


@dataclass(frozen=True)
class Side:
    """An engine, and its drafters if it has any."""

    engine: Engine
    client: GrpcDraftClient | None

    def paced(self) -> list[PaceStats]:
        """Of the target and of the drafter, as far as they are paced."""
        drafters = [] if self.client is None else [d.paced for d in self.client.status()]
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
    plain = Side(_make_engine(config.model_copy(update={"speculative": None}), None), None)
    with ExitStack() as stack:
        drafter = stack.enter_context(DrafterProcess(values))
        speculating = []
        for number in range(num_speculating):
            client = drafter.connect(config, plain.engine.vocab_size, f"bench-{number}")
            stack.callback(client.close)
            _wait_ready(client)
            speculating.append(Side(_make_engine(config, client), client))
        yield [*speculating, plain]


def pace_label(config: ClusterConfig) -> str | None:
    """The profile that passes keep the time of, for reports; ``None``: they are not paced."""
    pace = config.target.pace
    return None if pace is None else f"{pace.profile} x{pace.time_scale:g}"


def frontier_row(concurrency: int, turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Figures of one concurrency; turn i of every way was taken at about the same time.

    The best fixed number is chosen on turns of odd index and compared on even ones, and the other
    way round, so that no way is compared where it was lucky.
    """
    throughput = {way: [turn.throughput for turn in of] for way, of in turns.items()}
    fixed = {way: values for way, values in throughput.items() if way != ADAPTIVE}
    ours: list[float] = []
    best: list[float] = []
    chosen = []
    for part in (0, 1):
        chosen_by = {way: sorted(values[1 - part :: 2]) for way, values in fixed.items()}
        way = max(chosen_by, key=lambda name: chosen_by[name][len(chosen_by[name]) // 2])
        chosen.append(way)
        ours += throughput[ADAPTIVE][part::2]
        best += fixed[way][part::2]
    over_fixed = paired_ratio(ours, best)
    over_plain = paired_ratio(throughput[ADAPTIVE], throughput[PLAIN])
    adaptive = turns[ADAPTIVE]
    return {
        "concurrency": concurrency,
        "adaptive": over_plain["ours"],
        "plain": over_plain["peer"],
        "best_fixed": chosen,
        "over_fixed": over_fixed["ratio"],
        "over_fixed_low": over_fixed["ratio_low"],
        "over_plain": over_plain["ratio"],
        "over_plain_low": over_plain["ratio_low"],
        "budget": round(sum(turn.budget for turn in adaptive) / len(adaptive), 2),
        "modes": {m: sum(t.mode == m for t in adaptive) for m in {t.mode for t in adaptive}},
        "overruns": round(max(turn.overruns for of in turns.values() for turn in of), 3),
        "fixed": {
            way: round(sorted(values)[len(values) // 2], _DIGITS) for way, values in fixed.items()
        },
        "passed": over_fixed["ratio_low"] >= _FIXED_BAR and over_plain["ratio_low"] >= _PLAIN_BAR,
    }


def _take_turns(
    adaptive: Side,
    fixed: Side,
    plain: Side,
    speculative: SpeculativeConfig,
    load: _Load,
    shape: FrontierShape,
) -> dict[str, list[Turn]]:
    ways = [ADAPTIVE, *(PLAIN if tokens == 0 else str(tokens) for tokens in shape.fixed)]
    turns: dict[str, list[Turn]] = {way: [] for way in ways}
    order = random.Random(load.concurrency)
    for number in range(shape.turns):
        for way in order.sample(ways, len(ways)):
            side = {ADAPTIVE: adaptive, PLAIN: plain}.get(way, fixed)
            if side is fixed:
                fixed.engine.use_speculation_policy(_fixed(speculative, int(way)))
            turns[way].append(load.turn(side, number))
    return turns


def _fixed(speculative: SpeculativeConfig, num_tokens: int) -> SpeculativeConfig:
    return speculative.model_copy(
        update={
            "scheduler": "full",
            "switching": "always",
            "grouping": "off",
            "num_speculative_tokens": num_tokens,
        }
    )


class _Load:
    """A closed loop of requests, run on an engine for one turn.

    Args:
        prompts: at least one; each turn takes them in an order of its own.
        concurrency: requests at any time.
    """

    def __init__(
        self, prompts: Sequence[tuple[int, ...]], concurrency: int, shape: FrontierShape
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


def _make_engine(config: ClusterConfig, client: DraftClient | None) -> Engine:
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


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['concurrency']} requests: adaptive {row['adaptive']:.1f} tokens/s, "
        f"{row['over_plain']:.3f} times plain, {row['over_fixed']:.3f} times the best fixed "
        f"({'/'.join(row['best_fixed'])}), budget {row['budget']}, overruns {row['overruns']}"
    )
