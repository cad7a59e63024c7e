"""Whether a drafter's checkpoint belongs to a method and to a target, by its small files
and the headers of its large ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.config import SpeculativeConfig
from cluster.errors import CheckpointError, ConfigError
from cluster.models.drafter_config import (
    check_drafter_files,
    has_draft_module,
    load_drafter_config,
)
from cluster.models.dspark_config import DSparkConfig, check_drafter_matches_target
from cluster.models.eagle3_config import Eagle3Config, is_eagle3
from cluster.models.json_files import read_json
from cluster.models.tensor_headers import read_headers

_CONFIG = "config.json"
_TOKENIZER = "tokenizer.json"
_LANGUAGE_MODELS = ("ForCausalLM", "ForConditionalGeneration")


def check_drafter(
    speculative: SpeculativeConfig, folder: Path, target: Mapping[str, Any], target_folder: Path
) -> DSparkConfig | Eagle3Config | None:
    """Checks a drafter before anything is loaded.

    Args:
        speculative: of a method with a checkpoint.
        folder: the drafter's.
        target: the target's (text) configuration as a dictionary.
        target_folder: where its tokenizer is.

    Returns:
        The drafter's configuration; ``None`` for a language model.

    Raises:
        CheckpointError: a file is broken, or the drafter was made for another target.
        ConfigError: method, checkpoint and ``num_speculative_tokens`` do not belong together.
    """
    file = folder / _CONFIG
    data = read_json(file)
    if speculative.method == "draft_model":
        _check_language_model(data, file, target)
        _check_tokenizer(folder / _TOKENIZER, target_folder / _TOKENIZER)
        read_headers(folder)
        return None
    if _is_language_model(data) and not has_draft_module(data):
        _check_method(speculative, file, ("draft_model",), "a language model")
    config = load_drafter_config(folder, int(target["num_hidden_layers"]))
    if isinstance(config, Eagle3Config):
        _check_method(speculative, file, ("eagle3",), "an EAGLE-3 drafter")
    elif config.markov_rank == 0:
        _check_method(speculative, file, ("dflash",), "a DFlash drafter (markov_rank 0)")
    else:
        _check_method(speculative, file, ("dspark",), "a DSpark drafter")
    check_drafter_matches_target(config, target, str(file))
    check_drafter_files(folder, config)
    if isinstance(config, DSparkConfig):
        _check_num_speculative_tokens(speculative, config)
    return config


def _check_method(
    speculative: SpeculativeConfig, file: Path, methods: tuple[str, ...], what: str
) -> None:
    if speculative.method not in methods:
        raise ConfigError(
            "speculative.method",
            f"is {speculative.method}, but {file} describes {what}, "
            f"which is for method {methods[0]}",
        )


def _is_language_model(data: Mapping[str, Any]) -> bool:
    names = data.get("architectures")
    return (
        isinstance(names, list)
        and len(names) == 1
        and str(names[0]).endswith(_LANGUAGE_MODELS)
        and not is_eagle3(data)
    )


def _check_language_model(data: Mapping[str, Any], file: Path, target: Mapping[str, Any]) -> None:
    if not _is_language_model(data):
        raise CheckpointError(
            str(file),
            "architectures",
            f"must name a causal language model for method draft_model, "
            f"not {data.get('architectures')!r}",
        )
    vocab_size = (data.get("text_config") or data).get("vocab_size")
    if vocab_size != target["vocab_size"]:
        raise CheckpointError(
            str(file), "vocab_size", f"is {vocab_size}, but the target's is {target['vocab_size']}"
        )


def _check_tokenizer(ours: Path, theirs: Path) -> None:
    """A drafter without a tokenizer is taken to use the target's."""
    if not (ours.exists() and theirs.exists()) or ours.read_bytes() == theirs.read_bytes():
        return
    for key in ("model", "added_tokens"):
        # Other parts of the file do not change what a token id means.
        if _tokens(read_json(ours), key) != _tokens(read_json(theirs), key):
            raise CheckpointError(
                str(ours), key, f"differs from the target's in {theirs}: token ids mean other text"
            )


def _tokens(tokenizer: Mapping[str, Any], key: str) -> Any:
    if key == "added_tokens":
        return sorted((t.get("id"), t.get("content")) for t in tokenizer.get(key) or [])
    return json.dumps((tokenizer.get(key) or {}).get("vocab"), sort_keys=True)


def _check_num_speculative_tokens(speculative: SpeculativeConfig, config: DSparkConfig) -> None:
    guesses = speculative.num_speculative_tokens
    key = "speculative.num_speculative_tokens"
    if guesses is None or guesses == 0:
        return
    if guesses > config.block_size:
        raise ConfigError(key, f"is {guesses}, the drafter's block_size is {config.block_size}")
    if guesses < config.min_speculative_tokens:
        raise ConfigError(
            key,
            f"is {guesses}, but the drafter's block of {config.block_size} was trained as a whole "
            "and its slots depend on each other: ask for all of it or leave this unset",
        )
