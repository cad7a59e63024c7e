"""Suite ``drafters``, and ``dspark eval``: drafters side by side on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.bench.drafter_choice import DrafterChoice
from cluster.bench.evaluation import DrafterRunner, Evaluation, Settings, check_choice
from cluster.bench.prompt_sets import check_prompt_source, dataset_name, load_prompt_set
from cluster.bench.report import Report
from cluster.engine.drafter_calibration import load_drafter_calibration
from cluster.engine.target_config import load_tokenizer
from cluster.errors import ConfigError
from cluster.speculation.reliability import length_difference


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What every drafter is run on.

    Attributes:
        target: its checkpoint.
        datasets: sources as for ``load_prompt_set``.
        num_prompts: most prompts of each.
        prompt_tokens: length of a window of code.
        temperatures: of sampling, 0 for greedy.
        seeds: each runs every prompt once more; greedy outputs know one only.
        is_seeded: verify sampled requests coupled instead of by rejection.
    """

    target: str
    datasets: Sequence[str]
    num_prompts: int
    prompt_tokens: int
    temperatures: Sequence[float]
    seeds: Sequence[int] = (0,)
    is_seeded: bool = False


def evaluate(
    drafters: Sequence[DrafterChoice],
    comparison: Comparison,
    settings: Settings,
    note: Callable[[str], None],
) -> Iterator[Evaluation]:
    """Runs every drafter on every data set at every temperature, in this order.

    Args:
        note: told what was found.

    Raises:
        CheckpointError, ConfigError: a drafter cannot be run, before the first round of any; two
            data sets have one name.
        DataError: a file is broken, before anything is loaded; it has nothing to use, before the
            first round of a drafter.
    """
    names = [dataset_name(source) for source in comparison.datasets]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError("--data", f"two are called {name!r}: their figures could not be told")
    for source in comparison.datasets:
        check_prompt_source(source)
    configs = [check_choice(comparison.target, drafter, settings)[0] for drafter in drafters]
    calibrations = [load_drafter_calibration(config) for config in configs]
    tokenizer = load_tokenizer(comparison.target)
    for drafter, calibration in zip(drafters, calibrations, strict=True):
        runner = DrafterRunner(
            comparison.target, drafter, settings, comparison.seeds[0], calibration
        )
        prompt_sets = [
            load_prompt_set(
                source,
                tokenizer,
                count=comparison.num_prompts,
                num_tokens=comparison.prompt_tokens,
                max_tokens=runner.max_prompt_tokens,
            )
            for source in comparison.datasets
        ]
        for prompts in prompt_sets:
            for temperature in comparison.temperatures:
                evaluation = runner.evaluate(
                    prompts,
                    temperature,
                    is_seeded=comparison.is_seeded and temperature > 0,
                    seeds=comparison.seeds if temperature > 0 else comparison.seeds[:1],
                )
                figures = evaluation.figures()
                note(
                    f"{drafter.name} on {prompts.name} at temperature {temperature:g}: acceptance "
                    f"length {figures.get('acceptance_length')} over {figures['rounds']} rounds"
                )
                yield evaluation
        runner.close()


def differences(
    evaluations: Sequence[Evaluation], baselines: Sequence[str]
) -> list[dict[str, Any]]:
    """What each drafter's acceptance length is above each baseline's, as JSON rows.

    Intervals are over prompts that both ran, so they judge two drafters better than the intervals
    of their lengths do. There is no row where two had other prompts, as one with a shorter context
    has.
    """
    rows = []
    for base in evaluations:
        if base.drafter.name not in baselines:
            continue
        for other in evaluations:
            is_comparable = (other.key, other.temperature) == (base.key, base.temperature)
            if other is base or not is_comparable or other.prompts != base.prompts:
                continue
            estimate = length_difference(other.table, base.table)
            if estimate is not None:
                low, high = round(estimate.low, 4), round(estimate.high, 4)
                rows.append(
                    {
                        "drafter": other.drafter.name,
                        "baseline": base.drafter.name,
                        "dataset": base.dataset,
                        "temperature": base.temperature,
                        "difference": round(estimate.value, 4),
                        "low": low,
                        "high": high,
                    }
                )
    return rows


def run(
    *,
    drafters: Sequence[DrafterChoice],
    baselines: Sequence[str],
    comparison: Comparison,
    settings: Settings,
    note: Callable[[str], None],
) -> Report:
    """The suite. It passes where every drafter had rounds everywhere.

    Args:
        baselines: names of drafters that every other one is compared with, prompt by prompt.

    Raises:
        ConfigError: a baseline is none of the drafters; and as ``evaluate``.
    """
    names = [drafter.name for drafter in drafters]
    for baseline in baselines:
        if baseline not in names:
            raise ConfigError("--baseline", f"{baseline!r} is none of {', '.join(names)}")
    evaluations = list(evaluate(drafters, comparison, settings, note))
    rows = [evaluation.figures() for evaluation in evaluations]
    return Report(
        suite="drafters",
        figures={
            "target": comparison.target,
            "rows": rows,
            "differences": differences(evaluations, baselines),
        },
        passed=all(row["rounds"] > 0 for row in rows),
    )
