"""The drafter method that a configuration names, with its first weights."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cluster.training.block_method import BlockMethod
from cluster.training.config import TrainConfig
from cluster.training.draft_method import DraftMethod
from cluster.training.draft_model_method import DraftModelMethod
from cluster.training.eagle3_method import Eagle3Method


def build_method(
    config: TrainConfig, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> DraftMethod:
    """The configured drafter on the target's device.

    Raises:
        ConfigError: a value does not fit the target.
        CheckpointError: ``drafter.init_from`` is broken or was made for another target.
    """
    if config.drafter.method == "draft_model":
        return DraftModelMethod(config, target, tokenizer)
    if config.drafter.method == "eagle3":
        return Eagle3Method(config, target)
    return BlockMethod(config, target, tokenizer)
