"""Writes a widened target and a widened drafter as ordinary checkpoints."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cluster.bench.widen_shape import Shape, Widening
from cluster.bench.widen_weights import widen_drafter, widen_target
from cluster.engine.target_model import load_text_config
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


def write_target(narrow: Path, out: Path, shape: Shape, dtype: torch.dtype) -> Widening:
    """Writes the target in folder ``narrow``, widened to ``shape``, to folder ``out``.

    Raises:
        CheckpointError: it cannot be read, or is no plain Qwen3.
        ConfigError: as ``Widening``.
    """
    config = load_text_config(str(narrow))
    values = config.to_dict()
    file = str(narrow / CONFIG)
    _check_plain(values, file)
    widening = Widening(Shape.of(values), shape)
    _check_rotary(values["rope_parameters"], widening, file)
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).state_dict()
    shapes = {name: weight.shape for name, weight in weights.items()}
    is_tied = bool(values["tie_word_embeddings"])
    if is_tied:
        del shapes["lm_head.weight"]
    tensors = widen_target(read_tensors(narrow, shapes), widening, dtype, is_tied=is_tied)
    write_checkpoint(out, {**read_json(narrow / CONFIG), **shape.config_values()}, tensors, dtype)
    _copy_text_files(narrow, out)
    return widening


def write_drafter(
    narrow: Path, out: Path, target: Widening, num_layers: int | None, dtype: torch.dtype
) -> Widening:
    """Writes the drafter in folder ``narrow``, widened for a target that ``target`` widens, to
    folder ``out``; with ``num_layers`` layers, by default as many as it has.

    Raises:
        CheckpointError: it cannot be read, is no DSpark drafter with Qwen3 layers, or is none of
            this target.
        ConfigError: as ``Widening``, and for ``--drafter-layers``.
    """
    config = load_drafter_config(narrow)
    file = str(narrow / CONFIG)
    if not isinstance(config, DSparkConfig) or config.architecture != QWEN3:
        raise CheckpointError(file, "architectures", f"only {QWEN3} can be widened")
    check_drafter_matches_target(
        config,
        {"vocab_size": config.vocab_size, **target.narrow.config_values()},
        file,
    )
    num_layers = num_layers or config.num_hidden_layers
    if num_layers < config.num_hidden_layers:
        raise ConfigError(
            "--drafter-layers", f"is {num_layers}, the drafter has {config.num_hidden_layers}"
        )
    widening = Widening(Shape.of(asdict(config)), target.wide.with_layers(num_layers))
    _check_rotary(config.rope_parameters, widening, file)
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
        shapes = {k: v.shape for k, v in build_drafter(config).checkpoint_tensors().items()}
    tensors = read_tensors(narrow, shapes, only_for="a DSpark drafter")
    write_checkpoint(out, wide.to_dict(), widen_drafter(tensors, config, widening, dtype), dtype)
    _copy_text_files(narrow, out)
    return widening


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
        return False
    written = read_json(drafter / FILE_NAME)["entries"]
    entries = [
        CalibrationEntry(
            key=key,
            temperatures=temperatures,
            num_rounds=entry["num_rounds"],
            metrics=entry["metrics"],
        )
        for (key, temperatures), entry in zip(fitted.items(), written, strict=True)
    ]
    save_calibration(wide_drafter, wide_target, entries)
    return True


def _check_plain(config: dict[str, Any], file: str) -> None:
    if config.get("architectures") != [_ARCHITECTURE]:
        raise CheckpointError(file, "architectures", f"only {_ARCHITECTURE} can be widened")
    if any(kind != "full_attention" for kind in config["layer_types"]):
        raise CheckpointError(file, "layer_types", "only 'full_attention' layers can be widened")
    if config.get("quantization_config"):
        raise CheckpointError(file, "quantization_config", "quantised weights cannot be widened")


def _check_rotary(rope_parameters: Any, widening: Widening, file: str) -> None:
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
