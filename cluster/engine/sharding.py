"""Cutting a Hugging Face model for one shard, by the plans that transformers ships with it.

transformers' own way applies the same plans through DTensor, whose dispatch costs several times the
forward pass of a small model; here weights are sliced once into plain tensors, and a forward hook
carries each collective.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from cluster.errors import ConfigError

AllReduce = Callable[[torch.Tensor], torch.Tensor]

_NOTHING_TO_CUT = {"replicated_with_grad_allreduce", "replicate"}
_COLUMN_STYLES = {"colwise"}
_GATHERED_STYLES = {"colwise_gather_output", "colwise_rep"}
_ROW_STYLES = {"rowwise"}
_PACKED_STYLES = {"packed_colwise"}
_EXPERTS_STYLES = {"moe_tp_experts"}


def cut_stage(decoder: PreTrainedModel, layers: range) -> None:
    """Keeps only ``layers`` of the decoder, in place. Their ``layer_idx`` stay as they were."""
    decoder.layers = nn.ModuleList(decoder.layers[index] for index in layers)
    config = decoder.config
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in layers]
    config.num_hidden_layers = len(layers)


def cut_tensor_parallel(
    model: PreTrainedModel, *, tensor_rank: int, tensor_parallel_size: int, all_reduce: AllReduce
) -> None:
    """Slices the decoder's weights for one tensor-parallel rank, in place, and hooks its
    collectives. What the plan does not name every rank holds and computes whole.

    The output head is left to ``cut_output_head``: its rows are gathered by the caller.

    Raises:
        ConfigError: the model has no plan, the plan has a style that is not supported, or a size
            does not divide.
    """
    plan = {_pattern(name): style for name, style in model.tp_plan.items()}
    if not plan:
        raise ConfigError(
            "target.tensor_parallel_size",
            f"{type(model).__name__} has no tensor-parallel plan in transformers; use 1",
        )

    def style_of(name: str) -> str | None:
        return next((style for pattern, style in plan.items() if pattern.fullmatch(name)), None)

    decoder = model.get_decoder()
    in_decoder = {id(module) for module in decoder.modules()}
    for name, module in model.named_modules():
        style = style_of(name)
        if (
            id(module) not in in_decoder
            or style is None
            or style in _NOTHING_TO_CUT
            or isinstance(module, nn.Embedding)
        ):
            continue
        # Heads are cut whole: half a head's projection would be wrong without any sign of it.
        unit = getattr(model.get_submodule(name.rpartition(".")[0]), "head_dim", 1)
        share = _Share(name, tensor_rank, tensor_parallel_size, unit)
        if style in _EXPERTS_STYLES:
            _cut_experts(module, name, style_of, share)
            module.register_forward_hook(lambda _m, _i, output: all_reduce(output))
        elif isinstance(module, nn.Linear) and style in _COLUMN_STYLES:
            _keep_rows(module, share)
        elif isinstance(module, nn.Linear) and style in _ROW_STYLES:
            _keep_columns(module, share)
            module.register_forward_hook(lambda _m, _i, output: all_reduce(output))
        else:
            raise ConfigError(
                "target.tensor_parallel_size",
                f"the plan's style '{style}' of {name} is not supported; use 1 or pipeline stages",
            )


def cut_output_head(model: PreTrainedModel, *, tensor_rank: int, tensor_parallel_size: int) -> bool:
    """Slices the output head by vocabulary where the plan says so.

    Returns:
        Whether each rank now holds only its slice of the vocabulary (to be gathered).
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    names = {id(module): name for name, module in model.named_modules()}
    style = model.tp_plan.get(names[id(head)])
    if style not in _GATHERED_STYLES or head.weight.shape[0] % tensor_parallel_size:
        return False
    _keep_rows(head, _Share(names[id(head)], tensor_rank, tensor_parallel_size))
    return True


def _pattern(plan_name: str) -> re.Pattern[str]:
    return re.compile(re.escape(plan_name).replace(r"\*", r"\d+"))


@dataclass(frozen=True)
class _Share:
    """One rank's part of a size; ``unit`` features always stay together."""

    name: str
    rank: int
    parts: int
    unit: int = 1

    def of(self, size: int) -> slice:
        """Raises: ConfigError: the size cannot be shared out evenly."""
        if size % (self.parts * self.unit):
            raise ConfigError(
                "target.tensor_parallel_size",
                f"{self.parts} does not divide the size {size} of {self.name}"
                + (f" into heads of {self.unit}" if self.unit > 1 else ""),
            )
        step = size // self.parts
        return slice(self.rank * step, (self.rank + 1) * step)


def _cut_experts(
    experts: nn.Module, name: str, style_of: Callable[[str], str | None], share: _Share
) -> None:
    """Keeps a slice of every expert: ``[experts, out, in]`` weights, gate and up packed in one."""
    for key, weight in list(experts.named_parameters(recurse=False)):
        style = style_of(f"{name}.{key}")
        if style in _PACKED_STYLES:
            gate_and_up = weight.unflatten(1, (2, -1))
            kept = gate_and_up[:, :, share.of(gate_and_up.shape[2])].flatten(1, 2)
        elif style in _ROW_STYLES:
            kept = weight[:, :, share.of(weight.shape[2])]
        else:
            raise ConfigError(
                "target.tensor_parallel_size",
                f"the plan's style '{style}' of {name}.{key} is not supported; use 1",
            )
        setattr(experts, key, nn.Parameter(kept.clone(), requires_grad=False))


def _keep_rows(module: nn.Linear, share: _Share) -> None:
    rows = share.of(module.weight.shape[0])
    module.weight = nn.Parameter(module.weight[rows].clone(), requires_grad=False)
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias[rows].clone(), requires_grad=False)
    module.out_features = module.weight.shape[0]


def _keep_columns(module: nn.Linear, share: _Share) -> None:
    columns = share.of(module.weight.shape[1])
    module.weight = nn.Parameter(module.weight[:, columns].clone(), requires_grad=False)
    if module.bias is not None and share.rank > 0:
        module.register_parameter("bias", None)  # the sum over ranks must hold it once
    module.in_features = module.weight.shape[1]
