"""Cutting a Hugging Face model for one shard, by the plans that transformers ships with it.

transformers' own way applies the same plans through DTensor, whose dispatch costs several times the
forward pass of a small model; here weights are sliced once into plain tensors, and a forward hook
carries each collective.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from cluster.engine.layout import check_heads
from cluster.errors import ConfigError

AllReduce = Callable[[torch.Tensor], torch.Tensor]

_NOTHING_TO_CUT = {"replicated_with_grad_allreduce", "replicate"}
_COLUMN_STYLES = {"colwise"}
_GATHERED_STYLES = {"colwise_gather_output", "colwise_rep"}
_ROW_STYLES = {"rowwise"}


def cut_stage(model: PreTrainedModel, layers: range) -> None:
    """Keeps only ``layers`` of the decoder, in place. Their ``layer_idx`` stay as they were."""
    base = model.base_model
    base.layers = nn.ModuleList(base.layers[index] for index in layers)
    config = base.config
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in layers]
    config.num_hidden_layers = len(layers)


def cut_tensor_parallel(
    model: PreTrainedModel, *, tensor_rank: int, tensor_parallel_size: int, all_reduce: AllReduce
) -> None:
    """Slices the model's weights for one tensor-parallel rank, in place, and hooks its collectives.

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
    check_heads(model.config.get_text_config().to_dict(), tensor_parallel_size)
    for name, module in model.named_modules():
        if module is model.get_output_embeddings():
            continue
        style = next((s for pattern, s in plan.items() if pattern.fullmatch(name)), None)
        if style is None or style in _NOTHING_TO_CUT or isinstance(module, nn.Embedding):
            continue
        if not isinstance(module, nn.Linear) or style not in _COLUMN_STYLES | _ROW_STYLES:
            raise ConfigError(
                "target.tensor_parallel_size",
                f"the plan's style '{style}' of {name} is not supported; use 1 or pipeline stages",
            )
        if style in _COLUMN_STYLES:
            _keep_rows(module, name, tensor_rank, tensor_parallel_size)
        else:
            _keep_columns(module, name, tensor_rank, tensor_parallel_size)
            module.register_forward_hook(lambda _m, _i, output: all_reduce(output))


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
    _keep_rows(head, names[id(head)], tensor_rank, tensor_parallel_size)
    return True


def _pattern(plan_name: str) -> re.Pattern[str]:
    return re.compile(re.escape(plan_name).replace(r"\*", r"\d+"))


def _share(size: int, name: str, rank: int, parts: int) -> slice:
    if size % parts:
        raise ConfigError(
            "target.tensor_parallel_size", f"{parts} does not divide the size {size} of {name}"
        )
    step = size // parts
    return slice(rank * step, (rank + 1) * step)


def _keep_rows(module: nn.Linear, name: str, rank: int, parts: int) -> None:
    rows = _share(module.weight.shape[0], name, rank, parts)
    module.weight = nn.Parameter(module.weight[rows].clone(), requires_grad=False)
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias[rows].clone(), requires_grad=False)
    module.out_features = module.weight.shape[0]


def _keep_columns(module: nn.Linear, name: str, rank: int, parts: int) -> None:
    columns = _share(module.weight.shape[1], name, rank, parts)
    module.weight = nn.Parameter(module.weight[:, columns].clone(), requires_grad=False)
    if module.bias is not None and rank > 0:
        module.register_parameter("bias", None)  # the sum over ranks must hold it once
    module.in_features = module.weight.shape[1]
