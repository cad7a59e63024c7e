"""What a target's shard takes for a drafter to read."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch

from cluster.engine.capture import FeatureCapture
from cluster.engine.compiled import CompiledLayers
from cluster.engine.cuda.graphed_layers import GraphedLayers
from cluster.models.checkpoint import Projection


class TargetFeatures(NamedTuple):
    """What a shard takes for one drafter.

    Attributes:
        digest: of the projection; two with the same one make the same features.
        size: values of one token's features; 0 without any.
        capture: where they are caught, on the ranks that project.
        cached: ``[slots, size]`` on rank 0.
        compiled: the layers in one graph that catches them, where they could be compiled.
    """

    digest: str = ""
    size: int = 0
    capture: FeatureCapture | None = None
    cached: torch.Tensor = torch.zeros(0)
    compiled: CompiledLayers | GraphedLayers | None = None


def projection_digest(projection: Projection | None) -> str:
    """Of the layers that are read and of the weights; empty without a projection."""
    if projection is None:
        return ""
    digest = hashlib.sha256(repr(tuple(projection.target_layer_ids)).encode())
    digest.update(projection.weight.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def feature_size(projection: Projection | None) -> int:
    """Values of one token's features."""
    return projection.weight.shape[0] if projection is not None else 0
