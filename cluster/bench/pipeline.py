"""Suite ``pipeline``: whether drafting is hidden behind verifying, and where drafters belong.

Engines in this process take turns (``cluster.bench.turns``): with a remote drafter, with one behind
a network that delays, with the same but never in two groups, with two remote drafters, and with one
on the target's own device.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.bench.delayed_link import DelayedLink
from cluster.bench.drafter_process import DrafterProcess
from cluster.bench.paired import paired_ratio
from cluster.bench.report import Report
from cluster.bench.turns import (
    ClosedLoop,
    Side,
    Turn,
    TurnShape,
    make_engine,
    pace_label,
    remote_side,
)
from cluster.config import ClusterConfig
from cluster.engine.draft_factory import build_draft_engine
from cluster.engine.local_drafter import LocalDraftClient
from cluster.engine.pace import draft_pace, target_pace
from cluster.engine.target_config import load_text_config
from cluster.errors import ConfigError

NEAR, FAR, FAR_UNGROUPED, NEAR_TWO, COLOCATED = (
    "near",
    "far",
    "far_ungrouped",
    "near_2",
    "colocated",
)
_DELAY_BAR = 0.9
_BOUND_BAR = 0.9
_GROUPING_BAR = 1.1
# What a choice may lose: as much as the switch's margin, by which placements are told apart.
_CHOICE_BAR = 0.97
_DIGITS = 4

Turns = dict[str, list[Turn]]


@dataclass(frozen=True, kw_only=True)
class PipelineShape(TurnShape):
    """What is measured.

    Attributes:
        concurrencies: requests under way at any time.
        compared_at: the one of them at which the delay is judged.
        round_trip_s: of the delayed network, in the profile's time.
        drafter_devices: what of a drafter's devices is one replica's, as shares of a replica's own
            devices: less than 1 where they are smaller ones, or serve several replicas.
    """

    concurrencies: tuple[int, ...] = (1, 4, 16, 32)
    compared_at: int = 16
    round_trip_s: float = 0.010
    drafter_devices: tuple[float, ...] = (1.0, 0.1)


def run(values: dict[str, Any], shape: PipelineShape, note: Callable[[str], None]) -> Report:
    """Runs the suite.

    It passes where the delay costs at most a tenth of the throughput, that comes within a tenth of
    what the profiles allow, two groups give a tenth more than one wherever they are chosen under
    delay, and the cost model picks the better placement per device at every load and pool.

    Args:
        values: ``args`` of a paced configuration with a ``speculative`` part.

    Raises:
        ConfigError: it is not paced.
        DsparkError: target or drafter cannot be served so.
    """
    config = ClusterConfig.parse(values)
    if config.target.pace is None:
        raise ConfigError("target.pace", "is unset: bounds are taken from a profile")
    prompts = shape.prompts(config.target.model, 2 * max(shape.concurrencies))
    by_concurrency: dict[int, Turns] = {}
    goodputs: dict[int, dict[str, float]] = {}
    with _sides(config, values, shape) as sides:
        for concurrency in shape.concurrencies:
            load = ClosedLoop(prompts, concurrency, shape)
            turns: Turns = {name: [] for name in sides}
            promised: dict[str, list[float]] = {name: [] for name in sides}
            order = random.Random(concurrency)
            for number in range(shape.turns):
                for name in order.sample(list(sides), len(sides)):
                    turns[name].append(load.turn(sides[name], number))
                    speculation = sides[name].engine.load().speculation
                    promised[name].append(max(speculation.goodput, speculation.goodput_plain))
            by_concurrency[concurrency] = turns
            goodputs[concurrency] = {n: statistics.median(of) for n, of in promised.items()}
            note(_line(concurrency, turns))
    figures = pipeline_figures(config, by_concurrency, goodputs, shape)
    figures["paced"] = pace_label(config)
    return Report(suite="pipeline", figures=figures, passed=_has_passed(figures))


def pipeline_figures(
    config: ClusterConfig,
    turns: dict[int, Turns],
    goodputs: dict[int, dict[str, float]],
    shape: PipelineShape,
) -> dict[str, Any]:
    """The suite's figures; turn i of every side was taken at about the same time.

    Args:
        turns, goodputs: by concurrency and side; what each promised of itself at its turns' ends.
    """
    compared = turns[shape.compared_at]
    delay = _ratio(compared[FAR], compared[NEAR])
    bounds = _bounds(config, shape, compared[FAR])
    bound = paired_ratio([turn.throughput for turn in compared[FAR]], bounds)
    grouped = {
        concurrency: _ratio(of[FAR], of[FAR_UNGROUPED])
        for concurrency, of in turns.items()
        if statistics.mode(turn.mode for turn in of[FAR]) == "grouped"
    }
    worst = min(grouped.values(), key=lambda ratio: ratio["ratio_low"], default=None)
    return {
        "delay_ratio": delay["ratio"],
        "delay_ratio_low": delay["ratio_low"],
        "bound_ratio": bound["ratio"],
        "bound_ratio_low": bound["ratio_low"],
        "grouping_ratio": None if worst is None else worst["ratio"],
        "grouping_ratio_low": None if worst is None else worst["ratio_low"],
        "grouped_at": list(grouped),
        "per_device": [
            _device_row(concurrency, number, of, goodputs[concurrency], weight)
            for concurrency, of in turns.items()
            for number in (1, 2)
            for weight in shape.drafter_devices
        ],
        "rows": [
            {
                "concurrency": concurrency,
                **{name: _median(of[name]) for name in of},
                "modes": {name: statistics.mode(turn.mode for turn in of[name]) for name in of},
                "overruns": round(max(t.overruns for side in of.values() for t in side), 3),
            }
            for concurrency, of in turns.items()
        ],
    }


def _has_passed(figures: dict[str, Any]) -> bool:
    grouping = figures["grouping_ratio_low"]
    return (
        figures["delay_ratio_low"] >= _DELAY_BAR
        and figures["bound_ratio_low"] >= _BOUND_BAR
        and grouping is not None
        and grouping >= _GROUPING_BAR
        and all(row["chosen_share"] >= _CHOICE_BAR for row in figures["per_device"])
    )


def _device_row(
    concurrency: int, drafters: int, turns: Turns, goodputs: dict[str, float], weight: float
) -> dict[str, Any]:
    """Tokens per second and device, the drafters' counted, and which placement is chosen."""
    side = NEAR if drafters == 1 else NEAR_TWO
    devices = 1 + drafters * weight
    measured = {"remote": _median(turns[side]) / devices, COLOCATED: _median(turns[COLOCATED])}
    promised = {"remote": goodputs[side] / devices, COLOCATED: goodputs[COLOCATED]}
    chosen = max(promised, key=lambda placement: promised[placement])
    return {
        "concurrency": concurrency,
        "drafters": drafters,
        "drafter_devices": weight,
        **{placement: round(value, _DIGITS) for placement, value in measured.items()},
        "chosen": chosen,
        "chosen_share": round(measured[chosen] / max(measured.values()), _DIGITS),
    }


def _bounds(config: ClusterConfig, shape: PipelineShape, turns: list[Turn]) -> list[float]:
    """Tokens per second if passes and rounds took what the profiles say, and nothing else did.

    For the tokens that each turn verified and made: in one group a cycle is a pass and its round,
    in two groups two passes of half the size, or one and the round where that is longer; a plain
    turn's is a pass. Each request's prompt makes one pass larger.
    """
    target = target_pace(config.target.pace, config.target.pipeline_parallel_size)
    drafter = draft_pace(config.drafter.pace)
    if target is None or drafter is None or config.target.pace is None:
        raise ConfigError("drafter.pace", "is unset: bounds are taken from a profile")
    requests = shape.compared_at
    context = requests * (shape.prompt_tokens + shape.max_tokens / 2)
    delay_s = shape.round_trip_s * config.target.pace.time_scale

    def verify_s(turn: Turn, groups: int, prompt_tokens: int = 0) -> float:
        tokens = requests * (1 + turn.budget) / groups + prompt_tokens
        return float(target.curve.seconds(tokens, context / groups))

    def drafted_s(turn: Turn, groups: int) -> float:
        round_s = float(drafter.curve.seconds(requests / groups)) + delay_s
        return max(groups * verify_s(turn, groups), verify_s(turn, groups) + round_s)

    def token_s(turn: Turn, groups: int) -> float:
        cycle_s = verify_s(turn, 1) if turn.mode == "plain" else drafted_s(turn, groups)
        prompt_s = verify_s(turn, groups, shape.prompt_tokens) - verify_s(turn, groups)
        return cycle_s / (requests * turn.tokens_per_pass) + prompt_s / shape.max_tokens

    return [1 / min(token_s(turn, groups) for groups in (1, 2)) for turn in turns]


@contextmanager
def _sides(
    config: ClusterConfig, values: dict[str, Any], shape: PipelineShape
) -> Iterator[dict[str, Side]]:
    speculative, pace = config.speculative, config.target.pace
    if speculative is None or pace is None:
        raise ConfigError("speculative", "is unset: there is nothing to draft with")
    vocab_size = load_text_config(config.target.model, trust_remote_code=False).vocab_size
    ungrouped = config.model_copy(
        update={"speculative": speculative.model_copy(update={"grouping": "off"})}
    )
    with ExitStack() as stack:
        drafters = [stack.enter_context(DrafterProcess(values)) for _ in range(2)]
        link = DelayedLink(drafters[0].address, shape.round_trip_s * pace.time_scale / 2)
        far = stack.enter_context(link).address
        near = [drafter.address for drafter in drafters]
        sides = {}
        for name, of, addresses in (
            (NEAR, config, near[:1]),
            (FAR, config, [far]),
            (FAR_UNGROUPED, ungrouped, [far]),
            (NEAR_TWO, config, near),
        ):
            client = drafters[0].connect(of, vocab_size, f"bench-{name}", addresses)
            sides[name] = remote_side(stack, of, client)
        engine = build_draft_engine(config)
        local = LocalDraftClient(engine, engine.curve)
        sides[COLOCATED] = Side(make_engine(config, local), local)
        yield sides


def _ratio(ours: list[Turn], theirs: list[Turn]) -> dict[str, Any]:
    return paired_ratio([turn.throughput for turn in ours], [turn.throughput for turn in theirs])


def _median(turns: list[Turn]) -> float:
    return round(statistics.median(turn.throughput for turn in turns), _DIGITS)


def _line(concurrency: int, turns: Turns) -> str:
    sides = ", ".join(
        f"{name} {_median(of):.1f} ({statistics.mode(turn.mode for turn in of)})"
        for name, of in turns.items()
    )
    return f"{concurrency} requests, tokens/s: {sides}"
