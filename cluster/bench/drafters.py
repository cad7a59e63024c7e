"""Suite ``drafters``, and ``dspark eval``: drafters side by side on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.bench.drafter_choice import DrafterChoice
from cluster.bench.evaluation import DrafterRunner, Evaluation, Settings
from cluster.bench.prompt_sets import load_prompt_set
from cluster.bench.report import Report
from cluster.engine.worker import load_tokenizer


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
        CheckpointError, ConfigError, DataError: before the first round of a drafter.
    """
    tokenizer = load_tokenizer(comparison.target)
    for drafter in drafters:
        runner = DrafterRunner(comparison.target, drafter, settings, comparison.seeds[0])
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


def run(
    *,
    drafters: Sequence[DrafterChoice],
    comparison: Comparison,
    settings: Settings,
    note: Callable[[str], None],
) -> Report:
    """The suite. It passes where every drafter had rounds everywhere."""
    rows: list[dict[str, Any]] = [
        evaluation.figures() for evaluation in evaluate(drafters, comparison, settings, note)
    ]
    return Report(
        suite="drafters",
        figures={"target": comparison.target, "rows": rows},
        passed=all(row["rounds"] > 0 for row in rows),
    )
