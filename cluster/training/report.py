"""What a training run tells while it runs: progress, a history file, TensorBoard, plots."""

from __future__ import annotations

import importlib
import json
import logging
import os
import time
from types import TracebackType
from typing import Any

from cluster.errors import ConfigError
from cluster.training.config import TrainConfig
from cluster.training.drafter_loss import BlockLoss
from cluster.training.optimization import learning_rate_factor
from cluster.training.progress import Progress

_HISTORY = "history.jsonl"
_DISTRIBUTION = "dspark-cluster"

_logger = logging.getLogger(__name__)


def require_extra(key: str, module: str) -> None:
    """Checks that a module that comes with the extra ``train`` can be imported.

    Raises:
        ConfigError: naming the key that asks for it, and how to install it.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(key, f"needs pip install '{_DISTRIBUTION}[train]': {error}") from None


def check_extras(config: TrainConfig) -> None:
    """Checks that what the configured reports need is installed.

    Raises:
        ConfigError: as ``require_extra``.
    """
    if config.output.plots:
        require_extra("output.plots", "matplotlib")
    if config.output.tensorboard:
        require_extra("output.tensorboard", "tensorboard")


class Reporter:
    """One run's figures, every ``log_steps`` steps and at every held-out evaluation.

    Guarantees: ``history.jsonl`` in the run's folder has one line a figure, steps ascending, also
    over interruptions: what lies behind the step that a run goes on from is dropped. ``quiet``
    writes and shows nothing.
    """

    def __init__(
        self, config: TrainConfig, step: int, num_steps: int | None, quiet: bool = False
    ) -> None:
        """``step`` is where the run goes on; ``num_steps`` its length where that is known. What
        ``check_extras`` asks for is installed."""
        self._config = config
        self._folder = config.run_folder
        self._history: list[dict[str, Any]] = []
        self._last_log, self._logged_step = time.monotonic(), step
        self._writer: Any = None
        if not quiet:
            self._history = self._read_history(step)
            if config.output.tensorboard:
                module = importlib.import_module("torch.utils.tensorboard")
                folder = self._folder / "tensorboard"
                self._writer = module.SummaryWriter(str(folder), purge_step=step)
        self._progress = Progress("steps", num_steps, quiet=quiet, start=step)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.__exit__(exc_type, exc_value, traceback)
        if self._writer is not None:
            self._writer.close()

    def step_done(self, step: int, progress: float, loss: BlockLoss, norm: float) -> None:
        """Step ``step`` (from 1), begun at ``progress`` of the budget, has been taken."""
        self._progress.advance()
        output, optimization = self._config.output, self._config.optimization
        if step % output.log_steps:
            return
        now = time.monotonic()
        seconds = (now - self._last_log) / max(1, step - self._logged_step)
        self._last_log, self._logged_step = now, step
        factor = learning_rate_factor(progress, optimization.warmup, optimization.decay)
        _, acceptance, guesses = loss.position_sums()
        row = {
            "step": step,
            "progress": progress,
            "loss": loss.total.item(),
            **{name: value.item() for name, value in loss.terms.items()},
            "grad_norm": norm,
            "muon_learning_rate": optimization.muon_learning_rate * factor,
            "adamw_learning_rate": optimization.adamw_learning_rate * factor,
            "tokens_per_second": optimization.batch_tokens / seconds,
            "acceptance_length": loss.expected_length().item(),
            "acceptance": (acceptance / guesses.clamp(min=1)).tolist(),
        }
        self._add(row, "train")
        self._progress.note(
            f"step {step} progress {progress:.3f} loss {row['loss']:.4f} norm {norm:.2f} "
            f"acceptance length {row['acceptance_length']:.3f} seconds/step {seconds:.2f}"
        )

    def heldout(self, step: int, length: float, rates: list[float]) -> None:
        """Held-out figures behind step ``step``: acceptance length and Σ min(p, q) by position."""
        row = {"step": step, "heldout_acceptance_length": length, "heldout_acceptance": rates}
        self._add(row, "heldout")
        shown = [round(rate, 3) for rate in rates]
        self._progress.note(f"step {step} heldout {length:.3f} {shown}")
        if self._config.output.plots:
            from cluster.training.plots import plot_history

            plot_history(self._history, self._folder)

    def _add(self, row: dict[str, Any], group: str) -> None:
        self._history.append(row)
        with (self._folder / _HISTORY).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._writer is None:
            return
        for name, value in row.items():
            name = name.removeprefix("heldout_")
            if isinstance(value, list):
                for position, rate in enumerate(value, start=1):
                    self._writer.add_scalar(f"{group}/{name}/{position}", rate, row["step"])
            elif name != "step":
                self._writer.add_scalar(f"{group}/{name}", value, row["step"])

    def _read_history(self, step: int) -> list[dict[str, Any]]:
        """The figures up to ``step``; a line that a killed run left unfinished is dropped."""
        path = self._folder / _HISTORY
        if not path.exists():
            return []
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n") and (row := json.loads(line))["step"] <= step:
                rows.append(row)
        partial = path.with_suffix(".partial")
        text = "".join(json.dumps(row) + "\n" for row in rows)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)  # a run that is killed here keeps what it had
        return rows
