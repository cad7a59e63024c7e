"""Optimizers, learning-rate schedule and progress shared by target and drafter training."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cluster.errors import TrainingDivergedError

MUON_LEARNING_RATE = 0.004
ADAMW_LEARNING_RATE = 0.002
WEIGHT_DECAY = 0.1
_WARMUP = 0.02
_DECAY = 0.5


def learning_rate_factor(progress: float, warmup: float = _WARMUP, decay: float = _DECAY) -> float:
    """Warm-up, plateau, linear decay to zero, of the part of the budget that is spent (0 to 1).

    ``warmup`` and ``decay`` are the first and the last part of the budget.
    """
    if progress < warmup:
        return max(progress, 1e-4) / warmup
    return min(1.0, max(0.0, 1.0 - progress) / decay)


class Optimizers:
    """Muon for the matrices inside layers, AdamW for embeddings, vectors and output matrices."""

    def __init__(
        self,
        model: nn.Module,
        adamw_names: tuple[str, ...],
        muon_learning_rate: float = MUON_LEARNING_RATE,
        adamw_learning_rate: float = ADAMW_LEARNING_RATE,
        weight_decay: float = WEIGHT_DECAY,
        max_grad_norm: float = 1.0,
    ) -> None:
        """``adamw_names``: matrices whose name contains one of these go to AdamW."""
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            by_muon = parameter.ndim == 2 and not any(part in name for part in adamw_names)
            (matrices if by_muon else rest).append(parameter)
        self.parameters = matrices + rest
        muon = torch.optim.Muon(
            matrices,
            lr=muon_learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        adamw = torch.optim.AdamW(rest, lr=adamw_learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self._optimizers: list[torch.optim.Optimizer] = [muon, adamw]
        self._base = [muon_learning_rate, adamw_learning_rate]
        self._max_grad_norm = max_grad_norm

    def step(self, factor: float) -> float:
        """Clips gradients, steps at ``factor`` of the full rate, clears gradients.

        Returns the gradient norm before clipping.

        Raises:
            TrainingDivergedError: the norm is no number; the weights are as before.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self._max_grad_norm))
        if not math.isfinite(norm):
            raise TrainingDivergedError(f"the gradient norm is {norm}: use lower learning rates")
        for optimizer, base in zip(self._optimizers, self._base, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> list[dict[str, Any]]:
        """State of both optimizers, for a training checkpoint."""
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Restores what ``state_dict`` gave."""
        for optimizer, part in zip(self._optimizers, state, strict=True):
            optimizer.load_state_dict(part)


@dataclass
class Budget:
    """How long to train: wall-clock minutes, or a number of steps where ``steps`` is given.

    Time spent before an interruption counts: ``spent_seconds`` is stored in checkpoints.
    """

    minutes: float
    steps: int | None = None
    spent_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Time counts from now on."""
        self._last = time.monotonic()

    def progress(self, step: int) -> float:
        """The part of the budget spent before step ``step``, from 0; 1 or more means stop."""
        now = time.monotonic()
        self.spent_seconds += now - self._last
        self._last = now
        if self.steps is not None:
            return step / self.steps
        return self.spent_seconds / (60.0 * self.minutes)
