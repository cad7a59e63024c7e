"""Which kernels of our own there are for a device, and what they compute."""

from __future__ import annotations

import importlib.util
import logging

import torch
from torch import nn

from cluster.engine.cpu import kernels as cpu_kernels
from cluster.engine.cpu.packed_linear import packed as packed_for_cpu

logger = logging.getLogger(__name__)


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors like these can be attended in place; the kernels are loaded then."""
    if device.type == "cpu":
        return cpu_kernels.has_kernels(device, dtype)
    if importlib.util.find_spec("triton") is None:
        logger.warning("computing without kernels of our own: triton is not installed")
        return False
    from cluster.engine.cuda import operators

    return dtype in operators.DTYPES


def packed(linear: nn.Module, device: torch.device) -> nn.Module:
    """The layer as it is computed fastest on ``device``, hooks included, perhaps itself.

    Args:
        linear: any module; only plain linear layers change.
        device: which it is on, or will be moved to; its kernels must be loaded.
    """
    if device.type == "cpu":
        return packed_for_cpu(linear)
    from cluster.engine.cuda.streamed_linear import streamed

    return streamed(linear)


def pack_linears(module: nn.Module, device: torch.device) -> None:
    """Packs every linear layer inside ``module``, in place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            new = packed(child, device)
            if new is not child:
                setattr(parent, name, new)
