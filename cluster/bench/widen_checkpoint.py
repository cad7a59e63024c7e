"""Writes a widened target and a widened drafter as ordinary checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cluster.bench.widen_shape import Shape, Widening
from cluster.bench.widen_weights import widen_drafter, widen_target
from cluster.engine.target_config import load_text_config
from cluster.errors import CheckpointError, ConfigError
from cluster.models.calibration_file import (
    FILE_NAME,
    CalibrationEntry,
    load_calibration,
    save_calibration,
)
from cluster.models.checkpoint import build_drafter
from cluster.models.checkpoint_files import CONFIG, read_tensors, write_checkpoint
from cluster.models.drafter_config import load_drafter_config
from cluster.models.dspark_config import QWEN3, DSparkConfig, check_drafter_matches_target
from cluster.models.json_files import read_json

_ARCHITECTURE = "Qwen3ForCausalLM"
_TEXT_FILES = ("tokenizer*", "generation_config.json", "special_tokens_map.json", "chat_template*")


def target_widening(folder: Path, shape: Shape) -> Widening:
    """How the target in a folder becomes one of ``shape``.

    Raises:
        CheckpointError: it cannot be read, or is no plain Qwen3.
        ConfigError: as ``Widening``.
    """
    config, file = load_text_config(str(folder)).to_dict(), str(folder / CONFIG)
    if config.get("architectures") != [_ARCHITECTURE]:
        raise CheckpointError(file, "architectures", f"only {_ARCHITECTURE} can be widened")
    if any(kind != "full_attention" for kind in config["layer_types"]):
        raise CheckpointError(file, "layer_types", "only 'full_attention' layers can be widened")
    if config.get("quantization_config"):
        raise CheckpointError(file, "quantization_config", "quantised weights cannot be widened")
    widening = Widening(Shape.of(config), shape)
    _check_rotary(config["rope_parameters"], widening, file)
    return widening


def drafter_widening(
    folder: Path, target_folder: Path, target: Widening, num_layers: int | None
) -> Widening:
    """How the drafter in a folder becomes one of the wide target's shape.

    Args:
        target_folder: the narrow target.
        target: how that becomes the wide one.
        num_layers: of the wide drafter; ``None``: as many as it has.

    Raises:
        CheckpointError: it cannot be read, is no DSpark drafter with Qwen3 layers, or is none of
            this target.
        ConfigError: as ``Widening``, and for ``--drafter-layers``.
    """
    config, file = load_drafter_config(folder), str(folder / CONFIG)
    if not isinstance(config, DSparkConfig) or config.architecture != QWEN3:
        raise CheckpointError(file, "architectures", f"only {QWEN3} can be widened")
    check_drafter_matches_target(config, read_json(target_folder / CONFIG), file)
    least = config.num_hidden_layers
    num_layers = num_layers or least
    if num_layers < least:
        raise ConfigError("--drafter-layers", f"is {num_layers}, but the drafter has {least}")
    widening = Widening(Shape.of(asdict(config)), target.wide.with_layers(num_layers))
    _check_rotary(config.rope_parameters, widening, file)
    return widening


def write_target(folder: Path, out: Path, widening: Widening, dtype: torch.dtype) -> None:
    """Writes the target in ``folder``, widened, to ``out``, with its tokenizer.

    Raises:
        CheckpointError: a weight is missing, broken or of another shape.
    """
    config = load_text_config(str(folder))
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).state_dict()
    shapes = {name: weight.shape for name, weight in weights.items()}
    is_tied = bool(config.tie_word_embeddings)
    if is_tied:
        del shapes["lm_head.weight"]
    tensors = widen_target(read_tensors(folder, shapes), widening, dtype, is_tied=is_tied)
    values = {**read_json(folder / CONFIG), **widening.wide.config_values()}
    write_checkpoint(out, values, tensors, dtype)
    _copy_text_files(folder, out)


def write_drafter(
    folder: Path, out: Path, target: Widening, widening: Widening, dtype: torch.dtype
) -> None:
    """Writes the drafter in ``folder``, widened by ``widening``, to ``out``.

    Raises:
        CheckpointError: a weight is missing, unexpected, broken or of another shape.
    """
    config = load_drafter_config(folder)
    assert isinstance(config, DSparkConfig)  # drafter_widening has seen to it
    sizes = widening.wide.config_values()
    del sizes["layer_types"]
    wide = replace(
        config,
        **sizes,
        target_layer_ids=tuple(
            layer if layer == -1 else target.layers[layer] for layer in config.target_layer_ids
        ),
        num_target_layers=target.wide.num_layers,
    )
    with torch.device("meta"):
        weights = build_drafter(config).checkpoint_tensors()
    shapes = {name: weight.shape for name, weight in weights.items()}
    tensors = read_tensors(folder, shapes, only_for="a DSpark drafter")
    write_checkpoint(out, wide.to_dict(), widen_drafter(tensors, config, widening, dtype), dtype)
    _copy_text_files(folder, out)


def carry_calibration(
    *, drafter: Path, target: Path, wide_drafter: Path, wide_target: Path
) -> bool:
    """Writes the calibration of the narrow pair for the wide one, whose confidences are the same.

    Returns:
        Whether there was any.

    Raises:
        CheckpointError: it is there and was not fitted for the narrow pair.
    """
    fitted = load_calibration(drafter, target).fitted
    if not fitted:
        (wide_drafter / FILE_NAME).unlink(missing_ok=True)  # of an earlier run
        return False
    written = read_json(drafter / FILE_NAME)["entries"]
    entries = [
        CalibrationEntry(
            key=key,
            scaling=scaling,
            num_rounds=entry["num_rounds"],
            metrics=entry["metrics"],
        )
        for (key, scaling), entry in zip(fitted.items(), written, strict=True)
    ]
    save_calibration(wide_drafter, wide_target, entries)
    return True


def _check_rotary(rope_parameters: Mapping[str, Any], widening: Widening, file: str) -> None:
    """Frequencies of other kinds depend on the head's dimension by more than their index."""
    is_wider = widening.wide.head_dim > widening.narrow.head_dim
    if is_wider and rope_parameters["rope_type"] != "default":
        kind = rope_parameters["rope_type"]
        raise CheckpointError(
            file, "rope_parameters", f"heads with {kind!r} frequencies cannot be widened"
        )


def _copy_text_files(source: Path, out: Path) -> None:
    for pattern in _TEXT_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, out / path.name)
