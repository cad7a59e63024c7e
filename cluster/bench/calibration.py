"""Suite ``calibration``, and ``dspark calibrate``: fitting a drafter's confidences and judging it.

What becomes of a confidence is fitted on rounds over training prompts, one fit for each
verifier and temperature bucket, and judged on rounds over other, held-out prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.bench.drafter_choice import DrafterChoice
from cluster.bench.evaluation import (
    DrafterRunner,
    Evaluation,
    Settings,
    acceptance_figures,
    confidence_figures,
)
from cluster.bench.mis_scaled import mis_scaled_figures
from cluster.bench.prompt_sets import check_prompt_source, load_prompt_set
from cluster.bench.report import Report
from cluster.engine.target_config import load_tokenizer
from cluster.errors import ConfigError, DataError
from cluster.models.calibration_file import CalibrationEntry, save_calibration
from cluster.speculation.calibration import Calibration, LogitScaling
from cluster.speculation.calibration_fit import fit_scaling
from cluster.speculation.record import VERIFIERS, calibration_key, temperature_bucket

ERROR_BAR = 0.02
_LARGEST_AUC_CHANGE = 1e-3  # ties alone: the scaling of a logit keeps the order

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """What to fit a drafter for, and on what.

    Attributes:
        target: its checkpoint.
        temperatures: of sampling, 0 for greedy, no two in one bucket.
        verifiers: which of them; greedy is coupled.
        training, heldout: prompts to fit and to judge on; sources as for ``load_prompt_set``.
        training_rounds, heldout_rounds: rounds of each fit; no more prompts are started behind.
        num_prompts: most prompts of each set.
        prompt_tokens: length of a window of code.
    """

    target: str
    temperatures: Sequence[float]
    verifiers: Sequence[str] = VERIFIERS
    training: str
    heldout: str
    training_rounds: int
    heldout_rounds: int
    num_prompts: int
    prompt_tokens: int


@dataclass(frozen=True, eq=False)
class Fit:
    """One verifier's fit at one temperature: the rounds it was made and judged on."""

    scaling: LogitScaling
    training: Evaluation
    heldout: Evaluation

    def figures(self) -> dict[str, Any]:
        """Errors before and after, as JSON values."""
        return {
            "verifier": self.heldout.key.verifier,
            "temperature_bucket": self.heldout.key.bucket,
            "temperature": self.heldout.temperature,
            "maps": [asdict(line) for line in self.scaling.maps],
            "training": self._judged_on(self.training),
            "heldout": self._judged_on(self.heldout),
        }

    def _judged_on(self, evaluation: Evaluation) -> dict[str, Any]:
        table = evaluation.table
        acceptance = acceptance_figures(table)
        return {
            "dataset": evaluation.dataset,
            **{name: acceptance[name] for name in ("rounds", "requests", "acceptance_length")},
            "before": confidence_figures(table, LogitScaling.identity(len(self.scaling))),
            "after": confidence_figures(table, self.scaling),
        }


def _combinations(
    temperatures: Sequence[float], verifiers: Sequence[str]
) -> list[tuple[float, bool]]:
    """What to fit: pairs of a temperature and whether requests are seeded."""
    buckets = [temperature_bucket(value) for value in temperatures]
    if len(set(buckets)) < len(buckets):
        raise ConfigError(
            "--temperature", f"two of {list(temperatures)} are in one bucket ({', '.join(buckets)})"
        )
    pairs = []
    for temperature in temperatures:
        for is_seeded in (True, False) if temperature > 0 else (True,):
            if calibration_key(temperature, is_seeded=is_seeded).verifier in verifiers:
                pairs.append((temperature, is_seeded))
    if not pairs:
        raise ConfigError("--verifier", "greedy requests are verified coupled and no other way")
    return pairs


def fit_drafter(
    drafter: DrafterChoice, plan: FitPlan, settings: Settings, note: Note
) -> Iterator[Fit]:
    """Fits and judges one verifier after the other at each temperature.

    Args:
        note: told what is going on.

    Raises:
        CheckpointError, ConfigError, DataError: before the first round.
        DataError: a set gave no rounds.
    """
    if plan.training == plan.heldout:
        raise ConfigError("--heldout-data", f"{plan.heldout} is what is fitted on")
    combinations = _combinations(plan.temperatures, plan.verifiers)
    for source in (plan.training, plan.heldout):
        check_prompt_source(source)
    # The file that is there is to be replaced, and may be one that cannot be used.
    runner = DrafterRunner(plan.target, drafter, settings, calibration=Calibration())
    tokenizer = load_tokenizer(plan.target)
    training, heldout = (
        load_prompt_set(
            source,
            tokenizer,
            count=plan.num_prompts,
            num_tokens=plan.prompt_tokens,
            max_tokens=runner.max_prompt_tokens,
        )
        for source in (plan.training, plan.heldout)
    )
    for temperature, is_seeded in combinations:
        rounds = []
        for prompts, wanted in (
            (training, plan.training_rounds),
            (heldout, plan.heldout_rounds),
        ):
            done = runner.evaluate(prompts, temperature, is_seeded=is_seeded, num_rounds=wanted)
            note(
                f"{drafter.name} {done.key.verifier} at temperature {temperature:g} on "
                f"{prompts.name}: {len(done.table)} rounds"
            )
            if len(done.table) == 0:
                raise DataError(prompts.name, None, "has no prompt whose answer holds a round")
            rounds.append(done)
        yield Fit(fit_scaling(rounds[0].table), *rounds)
    runner.close()


def folder_to_write(drafter: DrafterChoice) -> str:
    """Where the drafter's ``calibration.json`` belongs.

    Raises:
        ConfigError: the drafter has no folder.
    """
    if drafter.model is None:
        raise ConfigError("--drafter", f"method {drafter.method} has no folder to write to")
    return drafter.model


def store(target: str, folder: str, fit: Fit, settings: Settings) -> str:
    """Writes a fit to ``calibration.json`` in the drafter's folder, beside the others that are
    there; returns the file's path.

    Raises:
        CheckpointError: the file cannot be written.
    """
    figures = fit.figures()
    del figures["maps"]  # they are beside the metrics
    entry = CalibrationEntry(
        key=fit.heldout.key,
        scaling=fit.scaling,
        num_rounds=len(fit.training.table),
        metrics={"draft_top_k": settings.draft_top_k, **figures},
    )
    return str(save_calibration(folder, target, [entry]))


def summarise(fits: Sequence[Fit]) -> dict[str, Any]:
    """The suite's figures: by position the worst of all fits, and every fit's own; with what
    online calibration makes of doubled logits on the held-out rounds, where these are enough."""
    rows = [
        fit.figures()
        | {"mis_scaled": mis_scaled_figures(fit.heldout.table, fit.heldout.key, fit.scaling)}
        for fit in fits
    ]
    before, after, auc = (
        _by_position([row["heldout"][when][name] for row in rows], pick)
        for when, name, pick in (
            ("before", "ece", max),
            ("after", "ece", max),
            ("after", "auc", min),
        )
    )
    return {"ece_before": before, "ece_after": after, "auc": auc, "fits": rows}


def run(*, drafter: DrafterChoice, plan: FitPlan, settings: Settings, note: Note) -> Report:
    """The suite: fits anew, writes nothing. It passes where every held-out error is within 2%."""
    fits = list(fit_drafter(drafter, plan, settings, note))
    figures = summarise(fits)
    return Report(suite="calibration", figures=figures, passed=is_calibrated(figures))


def is_calibrated(figures: dict[str, Any]) -> bool:
    """Whether every held-out error is within the bar, and no AUC has changed."""
    is_same_auc = all(
        a is None or abs(a - b) <= _LARGEST_AUC_CHANGE
        for fit in figures["fits"]
        for b, a in zip(
            fit["heldout"]["before"]["auc"], fit["heldout"]["after"]["auc"], strict=True
        )
    )
    errors = [error for error in figures["ece_after"] if error is not None]
    return is_same_auc and bool(errors) and max(errors) <= ERROR_BAR


def _by_position(
    lists: Sequence[Sequence[float | None]], pick: Callable[[list[float]], float]
) -> list[float | None]:
    columns = (
        [value for value in column if value is not None] for column in zip(*lists, strict=True)
    )
    return [pick(column) if column else None for column in columns]
