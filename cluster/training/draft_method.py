"""What the training loop asks of a drafter method, and what methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cluster.errors import ConfigError
from cluster.training.config import TrainConfig
from cluster.training.dataset import Batch, Dataset
from cluster.training.drafter_loss import BlockLoss


class DraftMethod(ABC):
    """One way of drafting, as training sees it.

    Attributes:
        network: what is trained; parameters without gradients stay as they are.
        target_layer_ids: the target's layers whose output ``loss`` takes; empty for none.
        adamw_names: matrices whose name contains one of these go to AdamW, not Muon.
    """

    network: nn.Module
    target_layer_ids: tuple[int, ...]
    adamw_names: tuple[str, ...]

    def prepare(self, dataset: Dataset) -> None:  # noqa: B027 (most methods choose nothing)
        """What the drafter takes from the training data before the first step of a new run."""

    @abstractmethod
    def sample(self, batch: Batch, generator: torch.Generator) -> Batch:
        """``batch`` with what the loss chooses at random; over all workers' rows at once."""

    @abstractmethod
    def loss(self, batch: Batch, features: torch.Tensor, logits: torch.Tensor) -> BlockLoss:
        """The loss of one worker's rows.

        Args:
            batch: from ``sample``.
            features: ``[B, L, len(target_layer_ids) * d]``.
            logits: ``[B, L, V]`` of the target.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the drafter's checkpoint; each file is replaced atomically."""


def feature_layers(config: TrainConfig, num_layers: int, minimum: int = -1) -> tuple[int, ...]:
    """The target's layers that the drafter reads: as configured, else four spread over it.

    Raises:
        ConfigError: a layer that the target does not have, or layers out of order.
    """
    given = config.drafter.target_layer_ids
    if given is None:
        spread = {num_layers * part // 4 - 1 for part in range(1, 5)}
        return tuple(sorted(layer for layer in spread if layer >= minimum))
    key = "drafter.target_layer_ids"
    for layer in given:
        if not minimum <= layer < num_layers:
            raise ConfigError(
                key, f"{layer} is out of range: the target has layers {minimum} to {num_layers - 1}"
            )
    if not given or sorted(set(given)) != list(given):
        raise ConfigError(key, f"must increase, not {list(given)}")
    return given


def freeze_output(network: nn.Module, target: PreTrainedModel) -> None:
    """Gives the drafter the target's embedding and output head, which are not trained."""
    embedding, head = network.get_submodule("embed_tokens"), network.get_submodule("lm_head")
    sources = (target.get_input_embeddings(), target.get_output_embeddings())
    with torch.no_grad():
        for module, source in zip((embedding, head), sources, strict=True):
            _weight(module).copy_(_weight(source))
            module.requires_grad_(False)


def is_gemma4(target: PreTrainedModel) -> bool:
    """Whether the drafter is to have Gemma 4's layers, as its target has."""
    return str(target.config.get_text_config().model_type).startswith("gemma4")


def shape_of(config: TrainConfig, target: PreTrainedModel) -> dict[str, Any]:
    """The drafter's widths and heads: as configured, else the target's."""
    text = target.config.get_text_config()
    # Of Gemma 4's two kinds of layers drafters have the one without a window.
    layer = text.per_layer_config["full_attention"] if is_gemma4(target) else text
    heads = text.num_attention_heads
    defaults = {
        "intermediate_size": text.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "head_dim": getattr(layer, "head_dim", None) or text.hidden_size // heads,
    }
    given = {name: getattr(config.drafter, name) for name in defaults}
    shape = {name: defaults[name] if given[name] is None else given[name] for name in defaults}
    if shape["head_dim"] % 2:
        raise ConfigError("drafter.head_dim", f"must be even, not {shape['head_dim']}")
    if shape["num_attention_heads"] % shape["num_key_value_heads"]:
        raise ConfigError(
            "drafter.num_key_value_heads",
            f"{shape['num_key_value_heads']} does not divide the {shape['num_attention_heads']} "
            "attention heads",
        )
    return shape


def layers_of(target: PreTrainedModel) -> dict[str, Any]:
    """What else the layers of a drafter that reads features have from the target's."""
    text = target.config.get_text_config()
    if not is_gemma4(target):
        return {"rope_parameters": dict(text.rope_parameters)}
    return {
        "rope_parameters": dict(text.rope_parameters["full_attention"]),
        "hidden_act": text.hidden_activation,
        "attention_k_eq_v": text.attention_k_eq_v,
        "final_logit_softcapping": text.final_logit_softcapping,
    }


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{type(module).__name__} has no weight")
    return weight
