"""A DeepSeek-V4 draft module's weights as published, and as the network holds them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cluster.models.deepseek_v4_names import published_names

_EXPERTS = "mlp.experts."


def to_published(state: Mapping[str, torch.Tensor], num_stages: int) -> dict[str, torch.Tensor]:
    """The network's state dict under the published names."""
    names = published_names(num_stages)
    published = {names[name]: value for name, value in state.items() if name in names}
    for stage in range(num_stages):
        prefix = f"layers.{stage}.{_EXPERTS}"
        both, down = state[f"{prefix}gate_up_proj"], state[f"{prefix}down_proj"]
        for expert, (gate_up, last) in enumerate(zip(both, down, strict=True)):
            gate, up = gate_up.chunk(2)
            parts = {"w1": gate, "w2": last, "w3": up}
            for part, value in parts.items():
                published[f"mtp.{stage}.ffn.experts.{expert}.{part}.weight"] = value
    return published


def to_network(tensors: Mapping[str, torch.Tensor], num_stages: int) -> dict[str, torch.Tensor]:
    """What ``to_published`` gives, back under the network's names."""
    state = {ours: tensors[theirs] for ours, theirs in published_names(num_stages).items()}
    for stage in range(num_stages):
        prefix = f"mtp.{stage}.ffn.experts."
        count = sum(name.startswith(prefix) for name in tensors) // 3
        gate, down, up = (
            torch.stack([tensors[f"{prefix}{expert}.{part}.weight"] for expert in range(count)])
            for part in ("w1", "w2", "w3")
        )
        state[f"layers.{stage}.{_EXPERTS}gate_up_proj"] = torch.cat([gate, up], dim=1)
        state[f"layers.{stage}.{_EXPERTS}down_proj"] = down
    return state
