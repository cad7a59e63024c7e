"""What a drafter is worth: real rounds through the serving engine, and figures of them.

A round counts when its whole block was wanted: not one that was cut because the output was about
to reach its longest. *Acceptance length* is the mean over rounds of accepted + 1; a round in which
the drafter had nothing to propose counts with 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cluster.bench.drafter_choice import DrafterChoice
from cluster.bench.local_engine import build_local_engine, local_config, run_requests
from cluster.bench.prompt_sets import PromptSet
from cluster.config import ClusterConfig
from cluster.engine.drafter_calibration import block_size_of, load_drafter_calibration
from cluster.engine.target_config import load_text_config
from cluster.errors import ConfigError
from cluster.models.drafter_check import check_drafter
from cluster.models.hub import local_folder
from cluster.request import Request, RequestOutput, SamplingParams
from cluster.speculation.calibration import Calibration, LogitScaling, survival
from cluster.speculation.record import CalibrationKey, VerificationRecord, calibration_key
from cluster.speculation.reliability import (
    RoundTable,
    area_under_curve,
    brier_score,
    calibration_error_interval,
    calibration_noise,
    calibration_request_noise,
    mean_interval,
)

_DIGITS = 4
# The prompt's own pass samples the first one; during the next the drafter gets the prompt.
_TOKENS_WITHOUT_DRAFT = 2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How rounds are run.

    Attributes:
        max_tokens: longest output of a request.
        concurrency: requests at once.
        num_speculative_tokens: for methods whose checkpoint has no block.
        draft_top_k: entries of a draft distribution, as ``speculative.draft_top_k``.
        device, dtype: of target and drafter.
    """

    max_tokens: int = 128
    concurrency: int = 64
    num_speculative_tokens: int = 7
    draft_top_k: int = 1024
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Rounds of one drafter on one data set at one temperature.

    Attributes:
        prompts: the data set.
        key: how they were verified.
        scaling: the drafter's calibration, of K positions.
    """

    drafter: DrafterChoice
    prompts: PromptSet
    temperature: float
    key: CalibrationKey
    table: RoundTable
    scaling: LogitScaling

    @property
    def dataset(self) -> str:
        """The data set's name."""
        return self.prompts.name

    def figures(self) -> dict[str, Any]:
        """Everything about it, as JSON values."""
        raw = LogitScaling.identity(len(self.scaling))
        return {
            "drafter": self.drafter.name,
            "method": self.drafter.method,
            "dataset": self.dataset,
            "temperature": self.temperature,
            "verifier": self.key.verifier,
            **acceptance_figures(self.table),
            "confidence": confidence_figures(self.table, raw),
            "calibrated_confidence": confidence_figures(self.table, self.scaling)
            if self.scaling != raw
            else None,
        }


def check_choice(
    target: str, drafter: DrafterChoice, settings: Settings
) -> tuple[ClusterConfig, int]:
    """Checks by small files and headers alone that ``drafter`` can be run.

    Returns:
        The configuration that serves it, and how many positions its blocks have.

    Raises:
        CheckpointError: a file is broken, or the drafter was made for another target.
        ConfigError: it cannot be served, or outputs are too short for a round.
    """
    config = local_config(
        target,
        drafter.speculative(settings.num_speculative_tokens, settings.draft_top_k),
        max_num_seqs=settings.concurrency,
        device=settings.device,
        dtype=settings.dtype,
    )
    if config.speculative is None:
        raise RuntimeError("the configuration above has a drafter")
    if drafter.model is not None:
        shape = load_text_config(target).to_dict()
        check_drafter(config.speculative, local_folder(drafter.model), shape, local_folder(target))
    num_positions = block_size_of(config.speculative) or settings.num_speculative_tokens
    least = num_positions + _TOKENS_WITHOUT_DRAFT + 1
    if settings.max_tokens < least:
        raise ConfigError(
            "--max-tokens",
            f"is {settings.max_tokens}: no round would have a whole block of {num_positions}; "
            f"the least is {least}",
        )
    return config, num_positions


class DrafterRunner:
    """Runs prompts with one drafter and collects what was verified.

    Args:
        target: checkpoint of the target.
        drafter: what drafts.
        settings: see there.
        seed: of drafting, accepting and resampling.
        calibration: of the drafter's confidences; unset: the one beside its checkpoint.

    Raises:
        CheckpointError: target or drafter cannot be loaded.
        ConfigError: they cannot be served, or outputs are too short for a round.
    """

    def __init__(
        self,
        target: str,
        drafter: DrafterChoice,
        settings: Settings,
        seed: int = 0,
        calibration: Calibration | None = None,
    ) -> None:
        config, self.num_positions = check_choice(target, drafter, settings)
        self.drafter = drafter
        if calibration is None:
            calibration = load_drafter_calibration(config)
        self.calibration = calibration
        self._settings = settings
        self._engine = build_local_engine(config, seed, calibration=calibration)

    def evaluate(
        self,
        prompts: PromptSet,
        temperature: float,
        *,
        is_seeded: bool = False,
        seeds: Sequence[int] = (0,),
        num_rounds: int | None = None,
    ) -> Evaluation:
        """Runs every prompt once for each seed.

        Args:
            is_seeded: give requests seeds of their own, so that they are verified coupled.
            num_rounds: start no more prompts when there are so many rounds.
        """
        key = calibration_key(temperature, is_seeded=is_seeded)
        records: list[VerificationRecord] = []
        num_output: dict[str, int] = {}

        def requests() -> Iterator[Request]:
            for seed in seeds:
                for index, prompt in enumerate(prompts.prompts):
                    if num_rounds is not None and len(records) >= num_rounds:
                        return
                    request_id = f"{seed}-{index}"
                    num_output[request_id] = 0
                    yield Request(
                        request_id=request_id,
                        prompt_token_ids=prompt,
                        sampling=SamplingParams(
                            temperature=temperature,
                            seed=seed * 1_000_003 + index if is_seeded else None,
                            max_tokens=self._settings.max_tokens,
                        ),
                    )

        def observe(record: VerificationRecord) -> None:
            room = self._settings.max_tokens - num_output[record.request_id]
            if room > self.num_positions:
                records.append(record)

        def count(output: RequestOutput) -> None:
            num_output[output.request_id] += len(output.token_ids)

        self._engine.observe_rounds(observe)
        run_requests(self._engine, requests(), count, max_active=self._settings.concurrency)
        return Evaluation(
            drafter=self.drafter,
            prompts=prompts,
            temperature=temperature,
            key=key,
            table=RoundTable.from_records(records, self.num_positions),
            scaling=self.calibration.scaling(key, self.num_positions),
        )

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt whose every round has its whole block within the context."""
        reserved = self._settings.max_tokens + self.num_positions
        return self._engine.max_model_len - reserved

    def close(self) -> None:
        """Frees the engine."""
        self._engine.close()


def acceptance_figures(table: RoundTable) -> dict[str, Any]:
    """Acceptance by position; position k is the k-th entry of each list."""
    if len(table) == 0:
        return {"rounds": 0, "requests": 0}
    lengths = (table.num_accepted + 1).astype(np.float64)
    length = mean_interval(lengths, table.request_index)
    is_reached, is_accepted = table.is_reached, table.is_accepted
    conditional = [
        _round(is_accepted[rows, k].mean()) if (rows := is_reached[:, k]).any() else None
        for k in range(table.num_positions)
    ]
    return {
        "rounds": len(table),
        "requests": int(table.request_index.max()) + 1,
        "acceptance_length": _round(length.value),
        "acceptance_length_interval": [_round(length.low), _round(length.high)],
        "acceptance_rate": [_round(rate) for rate in is_accepted.mean(axis=0)],
        "conditional_acceptance": conditional,
        "rounds_reached": is_reached.sum(axis=0).tolist(),
    }


def confidence_figures(table: RoundTable, scaling: LogitScaling) -> dict[str, Any]:
    """Calibration of the survival, and AUC and Brier score of the conditional confidence.

    ``ece_noise`` is what the error would be if the survival were exactly right and rounds were
    independent, ``ece_request_noise`` what it would be with rounds of one request as alike as they
    are; both for want of rounds. A position that no round has a token at has ``None``.
    """
    confidences = scaling.apply(table.confidences)
    chances, outcomes = survival(confidences), table.is_accepted.astype(np.float64)
    figures: dict[str, list[Any]] = {
        name: []
        for name in ("ece", "ece_interval", "ece_noise", "ece_request_noise", "auc", "brier")
    }
    for k in range(table.num_positions):
        rows, reached = table.is_drafted[:, k], table.is_reached[:, k]
        values: list[Any] = [None] * len(figures)
        if rows.any():
            chance = chances[rows, k]
            index = np.unique(table.request_index[rows], return_inverse=True)[1]
            error = calibration_error_interval(chance, outcomes[rows, k], index)
            conditional, accepted = confidences[reached, k], table.is_accepted[reached, k]
            values = [
                _round(error.value),
                [_round(error.low), _round(error.high)],
                _round(calibration_noise(chance)),
                _round(calibration_request_noise(chance, outcomes[rows, k], index)),
                _round(area_under_curve(conditional, accepted)),
                _round(brier_score(conditional, accepted)),
            ]
        for name, value in zip(figures, values, strict=True):
            figures[name].append(value)
    return figures


def use_threads(num_threads: int | None) -> None:
    """CPU threads of target and drafter; unset: as torch chooses."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def _round(value: float | None) -> float | None:
    return None if value is None else round(float(value), _DIGITS)
