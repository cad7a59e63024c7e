"""What ``dspark train`` is told: one YAML file, validated once, unknown keys refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from cluster.config import DType
from cluster.errors import ConfigError
from cluster.section import Section, parse_section, parse_yaml, resolve_path

Method = Literal["dspark", "dflash", "eagle3", "draft_model"]


class FiniteSection(Section):
    """A section whose numbers are finite."""

    model_config = ConfigDict(allow_inf_nan=False)


class TrainingTarget(FiniteSection):
    """The model that the drafter will serve; it is never changed."""

    model: str = Field(description="Hugging Face checkpoint folder or hub id")
    dtype: DType = Field(default="float32", description="of its weights while training")
    trust_remote_code: bool = False


class AnswerSampling(FiniteSection):
    """How the target answers prompts."""

    temperature: float = Field(default=0.0, ge=0, le=100)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=512, ge=1, description="longest answer in tokens")
    seed: int = Field(default=0, ge=0, description="answer i is sampled with seed + i")
    max_num_seqs: int = Field(default=64, ge=1, description="answers made at once")
    kv_cache_memory_mb: int = Field(default=1024, ge=1)


class DataConfig(FiniteSection):
    """What the drafter learns from.

    Prompts are ``.jsonl`` files, one object a line: ``{"turns": [...]}``, ``{"prompt": ...}`` or
    ``{"messages": [...]}``. Documents are text files (any other name) or, without any files, the
    running Python's standard library.
    """

    files: tuple[str, ...] = Field(default=(), description="none: Python's standard library")
    heldout_files: tuple[str, ...] = Field(
        default=(), description="never trained on; unset: heldout_fraction of what files hold"
    )
    heldout_fraction: float = Field(default=0.05, gt=0, lt=1)
    regenerate: bool = Field(
        default=False, description="true: the target writes the answers that are learned from"
    )
    sampling: AnswerSampling = Field(default_factory=AnswerSampling)
    prompt_tokens: int = Field(
        default=128, ge=2, description="of each document's window that the target continues"
    )
    max_prompts: int | None = Field(default=None, ge=1, description="first so many are answered")
    sequence_length: int = Field(default=1024, ge=8, description="in tokens")
    short_phase: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="first part of the budget that runs documents at half the sequence length",
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="of the order")


class TrainedDrafter(FiniteSection):
    """The drafter's shape; what is unset is as the target has it."""

    method: Method = "dspark"
    init_from: str | None = Field(default=None, description="drafter checkpoint to go on from")
    num_hidden_layers: int = Field(default=2, ge=1)
    hidden_size: int | None = Field(default=None, ge=1, description="draft_model only")
    intermediate_size: int | None = Field(default=None, ge=1)
    num_attention_heads: int | None = Field(default=None, ge=1)
    num_key_value_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=2)
    block_size: int = Field(
        default=7, ge=1, description="guesses of one block; for eagle3 steps of the unrolling"
    )
    target_layer_ids: tuple[int, ...] | None = Field(
        default=None, description="layers whose output is read; unset: four, the last included"
    )
    num_anchors: int = Field(default=128, ge=2, description="blocks of each sequence")
    mask_token_id: int | None = Field(
        default=None, ge=0, description="fills a block's slots; unset: the tokenizer's"
    )
    markov_rank: int = Field(default=64, ge=1, description="dspark only")
    markov_head_type: Literal["vanilla", "gated", "rnn"] = "vanilla"
    enable_confidence_head: bool = Field(default=True, description="dspark only")
    draft_vocab_size: int | None = Field(
        default=None, ge=1, description="eagle3 only; unset: the whole vocabulary"
    )


class LossConfig(FiniteSection):
    """Weights of the losses; unset ones follow the method (``loss_weights``)."""

    cross_entropy: float | None = Field(default=None, ge=0)
    total_variation: float | None = Field(
        default=None, ge=0, description="distance to the target's law, that is distillation"
    )
    confidence: float | None = Field(default=None, ge=0)
    position_decay: float = Field(
        default=4.0,
        gt=0,
        description="guess k of a block weighs exp(-k / position_decay); eagle3, unset: 0.8 ** k",
    )


class OptimizationConfig(FiniteSection):
    """How long and how fast; exactly one of ``steps``, ``epochs`` and ``minutes``."""

    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    minutes: float | None = Field(default=None, gt=0, description="of wall-clock time")
    batch_tokens: int = Field(default=4096, ge=1, description="of one step, over all workers")
    muon_learning_rate: float = Field(default=0.004, gt=0, description="matrices inside layers")
    adamw_learning_rate: float = Field(default=0.002, gt=0, description="everything else")
    weight_decay: float = Field(default=0.1, ge=0)
    warmup: float = Field(default=0.02, ge=0, lt=1, description="part of the budget")
    decay: float = Field(default=0.5, gt=0, le=1, description="last part, linearly to zero")
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="of the arithmetic; weights are float32"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="of the first weights and the anchors")


class FeaturesConfig(FiniteSection):
    """Where the target's features come from."""

    mode: Literal["compute", "cache"] = Field(
        default="compute", description="compute: in every step; cache: once, kept on disk"
    )
    folder: str | None = Field(default=None, description="unset: in the output folder")
    max_gb: float = Field(default=20.0, gt=0, description="a larger cache is refused unmade")
    shard_sequences: int = Field(default=64, ge=1, description="sequences of one file")


class ParallelConfig(FiniteSection):
    """Workers; more than one run on Ray Train."""

    num_workers: int = Field(default=1, ge=1)
    use_gpu: bool = False
    cpus_per_worker: float = Field(default=1.0, gt=0)
    max_failures: int = Field(default=3, ge=0, description="restarts after a lost worker")


class OutputConfig(FiniteSection):
    """What a run leaves: the drafter in ``folder``, everything else in ``folder``/run."""

    folder: str = Field(description="of the drafter's checkpoint; shared by all workers")
    save_seconds: float = Field(default=300.0, gt=0, description="between checkpoints")
    log_steps: int = Field(default=10, ge=1)
    eval_steps: int | None = Field(
        default=None, ge=1, description="between held-out figures; unset: at every checkpoint"
    )
    eval_sequences: int = Field(default=16, ge=1, description="held-out sequences while training")
    tensorboard: bool = True
    plots: bool = True


# Which methods read a key, where not all do.
_METHODS_WITH: dict[str, tuple[Method, ...]] = {
    "drafter.hidden_size": ("draft_model",),
    "drafter.num_hidden_layers": ("dspark", "dflash", "draft_model"),
    "drafter.target_layer_ids": ("dspark", "dflash", "eagle3"),
    "drafter.num_anchors": ("dspark", "dflash", "eagle3"),
    "drafter.mask_token_id": ("dspark", "dflash"),
    "drafter.markov_rank": ("dspark",),
    "drafter.markov_head_type": ("dspark",),
    "drafter.enable_confidence_head": ("dspark",),
    "drafter.draft_vocab_size": ("eagle3",),
    "loss.cross_entropy": ("dspark", "dflash", "draft_model"),
    "loss.total_variation": ("dspark", "dflash", "draft_model"),
    "loss.confidence": ("dspark",),
    "loss.position_decay": ("dspark", "dflash", "eagle3"),
}


class TrainConfig(FiniteSection):
    """One training run."""

    target: TrainingTarget
    data: DataConfig = Field(default_factory=DataConfig)
    drafter: TrainedDrafter = Field(default_factory=TrainedDrafter)
    loss: LossConfig = Field(default_factory=LossConfig)
    optimization: OptimizationConfig
    features: FeaturesConfig = Field(default_factory=FeaturesConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    output: OutputConfig

    @property
    def batch_size(self) -> int:
        """Sequences of one step, over all workers."""
        return self.optimization.batch_tokens // self.data.sequence_length

    @property
    def run_folder(self) -> Path:
        """What training needs and serving does not: state, logs, plots, answers, features."""
        return Path(self.output.folder) / "run"

    def check_together(self) -> None:
        """Checks what no key can check by itself.

        Raises:
            ConfigError: naming the key to change.
        """
        self._check_method()
        budgets = ("steps", "epochs", "minutes")
        given = [name for name in budgets if getattr(self.optimization, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ConfigError(
                "optimization", f"needs exactly one of steps, epochs and minutes, not {found}"
            )
        length, tokens = self.data.sequence_length, self.optimization.batch_tokens
        if tokens % length:
            raise ConfigError(
                "optimization.batch_tokens", f"{tokens} is no multiple of data.sequence_length"
            )
        if self.batch_size % self.parallel.num_workers:
            raise ConfigError(
                "parallel.num_workers",
                f"{self.parallel.num_workers} does not divide the {self.batch_size} sequences of "
                "a step (optimization.batch_tokens / data.sequence_length)",
            )
        if self.data.short_phase > 0:
            self._check_short_phase()
        continues = self.data.regenerate and not self.has_prompts
        if continues and self.data.prompt_tokens >= length:
            raise ConfigError("data.prompt_tokens", f"leaves no answer in {length} tokens")
        if self.drafter.method == "draft_model" and self.features.mode == "cache":
            raise ConfigError("features.mode", "a draft_model reads no features")

    def _check_method(self) -> None:
        """Refuses what the drafter's method would ignore."""
        method = self.drafter.method
        drafter = {f"drafter.{name}" for name in self.drafter.model_fields_set}
        losses = {f"loss.{name}" for name in self.loss.model_fields_set}
        for key in sorted(drafter | losses):
            methods = _METHODS_WITH.get(key, (method,))
            if method not in methods:
                raise ConfigError(key, f"is for {' and '.join(methods)}, not for {method}")
        if self.loss.confidence and not self.drafter.enable_confidence_head:
            raise ConfigError("loss.confidence", "drafter.enable_confidence_head is false")

    def _check_short_phase(self) -> None:
        key = "data.short_phase"
        if self.data.regenerate or self.has_prompts:
            raise ConfigError(key, "is for documents, not for prompts and answers")
        if self.features.mode == "cache":
            raise ConfigError(key, "must be 0 where features are cached: halves have their own")
        if self.data.sequence_length % 2 or self.drafter.num_anchors % 2:
            raise ConfigError(key, "needs an even data.sequence_length and drafter.num_anchors")

    @property
    def has_prompts(self) -> bool:
        """Whether the data are prompts, as opposed to documents."""
        return any(name.endswith(".jsonl") for name in self.data.files)

    def loss_weights(self) -> tuple[float, float, float]:
        """Weights of cross-entropy, total variation and confidence: as given, else those of the
        method's paper (DSpark, section 3; DFlash and draft models: cross-entropy alone)."""
        usual = (0.1, 0.9, 1.0) if self.drafter.method == "dspark" else (1.0, 0.0, 0.0)
        given = (self.loss.cross_entropy, self.loss.total_variation, self.loss.confidence)
        cross_entropy, total_variation, confidence = (
            default if value is None else value for value, default in zip(given, usual, strict=True)
        )
        return cross_entropy, total_variation, confidence


# A path on the command line is relative to where the command runs, not to the file.
_PATHS = ("output.folder", "features.folder", "data.files", "data.heldout_files")
_MODELS = ("target.model", "drafter.init_from")


def load_train_config(path: Path, overrides: tuple[str, ...] = ()) -> TrainConfig:
    """Reads a training configuration; paths in it may be relative to its own folder.

    Args:
        path: the YAML file.
        overrides: ``section.key=value`` each, the value in YAML; paths in them are relative to
            the current folder.

    Raises:
        ConfigError: an unreadable file, or a bad key or value in it.
    """
    try:
        values = parse_yaml(str(path), path.read_bytes())
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise ConfigError(str(path), "is empty, or no mapping of sections")
    for override in overrides:
        _override(values, override)
    config = parse_section(TrainConfig, values)
    config.check_together()
    return _with_paths(config, path.resolve().parent)


def _override(values: Any, override: str) -> None:
    key, separator, value = override.partition("=")
    *sections, last = key.split(".")
    if not separator or not sections:
        raise ConfigError(override, "must be section.key=value")
    for part in sections:
        if not isinstance(values, dict):
            raise ConfigError(key, "is no section of the file")
        values = values.setdefault(part, {})
    if not isinstance(values, dict):
        raise ConfigError(key, "is no section of the file")
    parsed = parse_yaml(key, value)
    if key in _MODELS and isinstance(parsed, str):
        parsed = resolve_path(parsed, Path.cwd())
    elif key in _PATHS:
        parsed = [_here(v) for v in parsed] if isinstance(parsed, list) else _here(parsed)
    values[last] = parsed


def _here(value: Any) -> Any:
    return str(Path.cwd() / value) if isinstance(value, str) else value


def _with_paths(config: TrainConfig, base: Path) -> TrainConfig:
    """``config`` with absolute paths; a hub id that is no folder beside the file stays one."""
    drafter = config.drafter
    if drafter.init_from is not None:
        drafter = drafter.model_copy(update={"init_from": resolve_path(drafter.init_from, base)})
    target = {"model": resolve_path(config.target.model, base)}
    data = {
        name: tuple(str(base / file) for file in getattr(config.data, name))
        for name in ("files", "heldout_files")
    }
    features = config.features
    if features.folder is not None:
        features = features.model_copy(update={"folder": str(base / features.folder)})
    output = {"folder": str((base / config.output.folder).resolve())}
    return config.model_copy(
        update={
            "target": config.target.model_copy(update=target),
            "data": config.data.model_copy(update=data),
            "drafter": drafter,
            "features": features,
            "output": config.output.model_copy(update=output),
        }
    )
