"""Trains a drafter against a target: the work of ``dspark train``, without Ray."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from cluster.config import SpeculativeConfig
from cluster.engine.machine import check_device
from cluster.engine.target_config import load_text_config, load_tokenizer
from cluster.errors import CheckpointError, ConfigError, TrainingDivergedError
from cluster.models.calibration_file import drop_stale_calibration
from cluster.models.checkpoint import target_digest
from cluster.models.drafter_check import check_drafter
from cluster.models.hub import local_folder
from cluster.models.tensor_headers import read_headers
from cluster.training.config import TrainConfig, TrainedDrafter
from cluster.training.dataset import Batch
from cluster.training.draft_method import feature_layers
from cluster.training.drafter_loss import BlockLoss
from cluster.training.feature_cache import FeatureCache
from cluster.training.features import FeatureTarget
from cluster.training.methods import build_method
from cluster.training.optimization import Budget, Optimizers, learning_rate_factor
from cluster.training.parallel import Worker
from cluster.training.progress import Progress
from cluster.training.report import Reporter, check_extras
from cluster.training.resume import load_training_state, save_training_state, write_summary
from cluster.training.sources import Source, build_datasets, read_source


def train(config: TrainConfig, worker: Worker) -> dict[str, Any]:
    """One worker's part of a run; the run goes on from its last checkpoint where there is one.

    Returns:
        The summary that is also written to ``training.json``; empty on workers that do not lead.

    Raises:
        ConfigError, CheckpointError, DataError: before anything long starts.
        TrainingDivergedError: the loss is no number any more; the last checkpoint stays.
    """
    return DrafterTraining(config, worker).run()


def train_worker(config: TrainConfig, rank: int, count: int, device: str) -> None:
    """``train`` for a launcher of workers, inside its process group."""
    log_to_stderr()
    check_device("parallel.use_gpu", device)
    train(config, Worker(rank, count, torch.device(device)))


def log_to_stderr() -> None:
    """Shows what training logs."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("cluster").setLevel(logging.INFO)


def check_inputs(config: TrainConfig) -> tuple[PreTrainedTokenizerBase, Source]:
    """Reads what can be read without loading models: configurations, headers of weights, the
    tokenizer, the data. Then makes the output's folder.

    Raises:
        ConfigError, CheckpointError, DataError: something does not fit, is broken or is missing.
    """
    check_extras(config)
    trust = config.target.trust_remote_code
    folder = local_folder(config.target.model)
    if not folder.is_dir():
        raise ConfigError("target.model", f"no such folder: {folder}")
    text = load_text_config(config.target.model, trust_remote_code=trust)
    length = config.data.sequence_length
    if length > text.max_position_embeddings:
        raise ConfigError(
            "data.sequence_length",
            f"{length} exceeds the target's context of {text.max_position_embeddings}",
        )
    feature_layers(config, text.num_hidden_layers)
    read_headers(folder)
    if config.drafter.init_from is not None:
        _check_start(config.drafter, text.to_dict(), folder)
    tokenizer = load_tokenizer(config.target.model, trust_remote_code=trust)
    source = read_source(config, tokenizer)
    try:
        config.run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{config.run_folder} cannot be made: {error.strerror}"
        raise ConfigError("output.folder", message) from None
    return tokenizer, source


def _check_start(drafter: TrainedDrafter, target: dict[str, Any], target_folder: Path) -> None:
    """Whether ``drafter.init_from`` is of this method and belongs to this target."""
    start = str(drafter.init_from)
    served = SpeculativeConfig(method=drafter.method, model=start, num_speculative_tokens=1)
    try:
        check_drafter(served, local_folder(start), target, target_folder)
    except ConfigError as error:
        raise ConfigError("drafter.init_from", error.message) from None


class DrafterTraining:
    """One run, as one of its workers sees it.

    Guarantees: what a step does depends on the configuration, the data and the step's number
    alone, not on the number of workers (up to rounding) nor on interruptions; with one worker on
    a CPU and a budget in steps or epochs an interrupted run ends with the unbroken run's weights,
    bit for bit.
    """

    def __init__(self, config: TrainConfig, worker: Worker) -> None:
        """Reads and checks everything, then lets the target answer prompts and fills the feature
        cache where those are configured."""
        self._config = config
        self._worker = worker
        self._precision: torch.dtype = getattr(torch, config.optimization.precision)
        tokenizer, source = check_inputs(config)
        model = _load_target(config).to(worker.device)
        torch.manual_seed(config.optimization.seed)
        self.method = build_method(config, model, tokenizer)
        self._target = FeatureTarget(model, self.method.target_layer_ids)
        self._settings = _settings(config, source)
        self._optimizers, self._budget, self.step = self._restore()
        self._training, self._heldout = build_datasets(config, source, tokenizer, worker)
        if self.step == 0:
            self.method.prepare(self._training)
        self._caches = self._fill_caches(model.config.get_text_config().hidden_size)
        epochs = config.optimization.epochs
        if epochs is not None:
            steps = round(epochs * self._training.num_sequences / config.batch_size)
            self._budget.steps = max(1, steps)

    def run(self) -> dict[str, Any]:
        """Trains until the budget is spent. Returns the summary (empty where not leading)."""
        config, worker = self._config, self._worker
        self._budget.start()
        with Reporter(config, self.step, self._budget.steps, quiet=not worker.leads) as reporter:
            last_save = time.monotonic()
            while (progress := worker.agree(self._budget.progress(self.step))) < 1.0:
                loss, norm = self._train_step(progress)
                self.step += 1
                if not worker.leads:
                    continue
                reporter.step_done(self.step, progress, loss, norm)
                now = time.monotonic()
                is_due = now - last_save > config.output.save_seconds
                if is_due:
                    self._save()
                    last_save = now
                every = config.output.eval_steps
                if is_due if every is None else self.step % every == 0:
                    figures = self.heldout_acceptance(config.output.eval_sequences)
                    reporter.heldout(self.step, *figures)
            if not worker.leads:
                return {}
            self._save()
            length, rates = self.heldout_acceptance(self._heldout.num_sequences)
            reporter.heldout(self.step, length, rates)
        summary = {
            "method": config.drafter.method,
            "parameters": sum(p.numel() for p in self.method.network.parameters()),
            "steps": self.step,
            "sequences_seen": self.step * config.batch_size,
            "sequence_length": config.data.sequence_length,
            "heldout_acceptance_length": length,
            "heldout_acceptance": rates,
            "minutes": self._budget.spent_seconds / 60.0,
        }
        write_summary(Path(config.output.folder), summary)
        return summary

    @torch.no_grad()
    def heldout_acceptance(self, count: int) -> tuple[float, list[float]]:
        """Teacher-forced figures on ``count`` evenly spread held-out sequences, without autocast.

        Returns:
            ``(acceptance length at temperature 1, acceptance Σ min(p, q) of each position)``.
        """
        total = self._heldout.num_sequences
        count = min(count, total)
        alone = Worker(device=self._worker.device)
        generator = torch.Generator().manual_seed(0)
        sums = []
        with Progress("held-out sequences", count, quiet=not self._worker.leads) as progress:
            for index in range(count):
                sequence = self._heldout.sequence(index * total // count)
                batch = self.method.sample(sequence, generator).share(alone)
                loss = self.method.loss(batch, *self._run_target(batch, heldout=True))
                sums.append(torch.stack(loss.position_sums()))
                progress.advance()
        survival, acceptance, guesses = torch.stack(sums).sum(dim=0).cpu()
        guesses = guesses.clamp(min=1)  # no answer may be as long as a block
        return 1.0 + float((survival / guesses).sum()), (acceptance / guesses).tolist()

    def _train_step(self, progress: float) -> tuple[BlockLoss, float]:
        """Returns this worker's loss and the gradient norm."""
        config, worker = self._config, self._worker
        batch = self._training.batch(self.step, config.batch_size)
        if progress < config.data.short_phase:
            batch = batch.halve()
        # All workers choose for all rows, so that the choice is the same for any number of them.
        generator = torch.Generator().manual_seed((config.optimization.seed << 32) + self.step)
        batch = self.method.sample(batch, generator).share(worker)
        with self._autocast():
            loss = self.method.loss(batch, *self._run_target(batch))
        worker.share_of_mean(loss.total, loss.weight).backward()
        worker.average_gradients(self.method.network.parameters())
        optimization = config.optimization
        factor = learning_rate_factor(progress, optimization.warmup, optimization.decay)
        try:
            norm = self._optimizers.step(factor)
        except TrainingDivergedError as error:
            message = f"step {self.step + 1}: the loss is {loss.total.item():g}, {error}"
            raise TrainingDivergedError(message) from None
        return loss, norm

    def _run_target(self, batch: Batch, heldout: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        if self._caches is None:
            return self._target.run(batch.token_ids)
        features, hidden = self._caches[heldout].read(batch)
        dtype = self._target.model.dtype
        return features.to(dtype), self._target.logits(hidden.to(dtype))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self._worker.device.type,
            dtype=torch.bfloat16,
            enabled=self._precision is torch.bfloat16,
        )

    def _restore(self) -> tuple[Optimizers, Budget, int]:
        """Optimizers, budget and step as the last checkpoint has them, else as at the start."""
        config = self._config.optimization
        optimizers = Optimizers(
            self.method.network,
            self.method.adamw_names,
            muon_learning_rate=config.muon_learning_rate,
            adamw_learning_rate=config.adamw_learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
        )
        budget = Budget(minutes=config.minutes or 0.0, steps=config.steps)
        step = load_training_state(
            self._state_folder, self.method.network, optimizers, budget, self._settings
        )
        if self._worker.agree(step) != step:
            raise ConfigError(
                "output.folder", f"is not shared: worker {self._worker.rank} sees another state"
            )
        return optimizers, budget, step

    def _save(self) -> None:
        save_training_state(
            self._state_folder,
            self.step,
            self.method.network,
            self._optimizers,
            self._budget,
            self._settings,
        )
        folder = Path(self._config.output.folder)
        self.method.save(folder)
        drop_stale_calibration(folder)

    @property
    def _state_folder(self) -> Path:
        return self._config.run_folder / "state"

    def _fill_caches(self, hidden_size: int) -> tuple[FeatureCache, FeatureCache] | None:
        """The caches of training and held-out data, filled; ``None`` to compute on the fly."""
        config = self._config
        if config.features.mode == "compute":
            return None
        folder = Path(config.features.folder or config.run_folder / "features")
        caches = [
            FeatureCache(folder / name, config, dataset, self.method.target_layer_ids, hidden_size)
            for name, dataset in (("training", self._training), ("heldout", self._heldout))
        ]
        for cache in caches:
            with self._autocast():
                cache.fill(self._target, self._worker)
        return caches[0], caches[1]


def _load_target(config: TrainConfig) -> PreTrainedModel:
    path = config.target.model
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, config.target.dtype),
            trust_remote_code=config.target.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(path, None, str(error).split("\n")[0]) from error
    for kind in ("missing_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(kind, ()))
        if keys:
            raise CheckpointError(path, keys[0], kind.replace("_", " "))
    return model


def _settings(config: TrainConfig, source: Source) -> dict[str, Any]:
    """What an interrupted run must go on with, by dotted key: all that changes its arithmetic.

    Models and data are named by digest, so that they may move.
    """
    settings: dict[str, Any] = {}
    for section in ("target", "data", "drafter", "loss", "optimization"):
        for key, value in getattr(config, section).model_dump(mode="json").items():
            settings[f"{section}.{key}"] = value
    settings["target.model"] = target_digest(config.target.model)
    for key in ("data.files", "data.heldout_files"):
        settings[key] = len(settings[key])
    settings["data.files"] = source.digest
    for key in ("max_num_seqs", "kv_cache_memory_mb"):
        del settings["data.sampling"][key]
    return settings
