"""EAGLE-3 written out as loops over entries and heads, from the papers' description.

It shares nothing with ``cluster``: no module, no transformers, only the names of the weights. It
is slow on purpose; the tests compare the real network with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F


@dataclass
class ReferenceEagle3:
    """One sequence's drafter: ``add`` runs an entry, ``logits`` reads a hidden state.

    ``family`` is "qwen3", "llama" or "gemma4"; ``weights`` are DeepSpec's names (``layers.0``).
    """

    weights: dict[str, torch.Tensor]
    family: str
    heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int
    theta: float = 10000.0
    rotated: float = 1.0
    epsilon: float = 1e-6
    cap: float | None = None
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return self.weights["fc.weight"] @ features

    def add(self, hidden: torch.Tensor, token: int) -> torch.Tensor:
        """Runs the next entry; its position is the number of those before it."""
        position = len(self.keys)
        layer = {
            name.removeprefix("layers.0."): value
            for name, value in self.weights.items()
            if name.startswith("layers.0.")
        }
        embedding = self.weights["embed_tokens.weight"][token]
        if self.family == "gemma4":
            embedding = embedding * math.sqrt(len(embedding))
        joined = torch.cat(
            [
                self._norm(embedding, layer["input_layernorm.weight"]),
                self._norm(hidden, layer["hidden_norm.weight"]),
            ]
        )
        hidden = hidden + self._attention(joined, layer, position)
        if self.family == "gemma4":
            inner = self._norm(hidden, layer["pre_feedforward_layernorm.weight"])
            gate = F.gelu(layer["mlp.gate_proj.weight"] @ inner, approximate="tanh")
            down = layer["mlp.down_proj.weight"] @ (gate * (layer["mlp.up_proj.weight"] @ inner))
            hidden = hidden + self._norm(down, layer["post_feedforward_layernorm.weight"])
            return hidden * layer["layer_scalar"]
        inner = self._norm(hidden, layer["post_attention_layernorm.weight"])
        gate = F.silu(layer["mlp.gate_proj.weight"] @ inner)
        return hidden + layer["mlp.down_proj.weight"] @ (
            gate * (layer["mlp.up_proj.weight"] @ inner)
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Over the target's ids; ``-inf`` where the drafter has no token."""
        own = self.weights["lm_head.weight"] @ self._norm(hidden, self.weights["norm.weight"])
        if self.cap is not None:
            own = self.cap * torch.tanh(own / self.cap)
        full = torch.full((self.vocab_size,), float("-inf"))
        for draft_id, value in enumerate(own):
            offset = int(self.weights["d2t"][draft_id]) if "d2t" in self.weights else 0
            full[draft_id + offset] = value
        return full

    def forget(self, length: int) -> None:
        """Keeps the first ``length`` entries."""
        del self.keys[length:], self.values[length:]

    def _attention(
        self, joined: torch.Tensor, layer: dict[str, torch.Tensor], position: int
    ) -> torch.Tensor:
        size = self.head_dim
        query = layer["self_attn.q_proj.weight"] @ joined
        key = layer["self_attn.k_proj.weight"] @ joined
        name = "self_attn.v_proj.weight"
        value = layer[name] @ joined if name in layer else key
        own_keys, own_values = [], []
        for head in range(self.key_value_heads):
            one = key[head * size : (head + 1) * size]
            if "self_attn.k_norm.weight" in layer:
                one = self._norm(one, layer["self_attn.k_norm.weight"])
            own_keys.append(self._rotate(one, position))
            one = value[head * size : (head + 1) * size]
            if self.family == "gemma4":
                one = self._norm(one, torch.ones(size))
            own_values.append(one)
        self.keys.append(torch.stack(own_keys))
        self.values.append(torch.stack(own_values))
        mixed = []
        for head in range(self.heads):
            one = query[head * size : (head + 1) * size]
            if "self_attn.q_norm.weight" in layer:
                one = self._norm(one, layer["self_attn.q_norm.weight"])
            one = self._rotate(one, position)
            shared = head * self.key_value_heads // self.heads
            scale = 1.0 if self.family == "gemma4" else 1.0 / math.sqrt(size)
            scores = torch.stack([one @ past[shared] * scale for past in self.keys]).softmax(0)
            parts = [part * past[shared] for part, past in zip(scores, self.values, strict=True)]
            mixed.append(torch.stack(parts).sum(0))
        output = layer["self_attn.o_proj.weight"] @ torch.cat(mixed)
        if self.family == "gemma4":
            output = self._norm(output, layer["post_attention_layernorm.weight"])
        return output

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean() + self.epsilon) * weight

    def _rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """Pairs i and i + half turn by position / theta^(i / half); the last pairs stand still
        where only a part is rotated."""
        half = len(x) // 2
        out = x.clone()
        for i in range(int(self.rotated * half)):
            angle = position * self.theta ** (-i / half)
            out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
            out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
        return out
