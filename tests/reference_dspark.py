"""DSpark, DFlash and DeepSeek-V4's draft module written out as loops over tokens and heads.

From the papers and the published configuration; nothing of ``cluster`` and nothing of
transformers is used. Slow on purpose, and in float64; the tests compare the networks with it.
Weights go by their published names.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.nn import functional as F

Rows = list[torch.Tensor]


def norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    scaled = x / torch.sqrt((x * x).mean() + epsilon)
    return scaled if weight is None else scaled * weight


def rotate_halves(x: torch.Tensor, position: int, frequencies: list[float]) -> torch.Tensor:
    """Entry i turns with entry i + half."""
    out, half = torch.empty_like(x), len(x) // 2
    for i, frequency in enumerate(frequencies):
        cosine, sine = math.cos(position * frequency), math.sin(position * frequency)
        out[i] = x[i] * cosine - x[i + half] * sine
        out[i + half] = x[i + half] * cosine + x[i] * sine
    return out


def rotate_pairs(x: torch.Tensor, position: int, frequencies: list[float]) -> torch.Tensor:
    """Entry 2 i turns with entry 2 i + 1, in the last ``2 * len(frequencies)`` entries."""
    out, start = x.clone(), len(x) - 2 * len(frequencies)
    for i, frequency in enumerate(frequencies):
        cosine, sine = math.cos(position * frequency), math.sin(position * frequency)
        first, second = x[start + 2 * i], x[start + 2 * i + 1]
        out[start + 2 * i] = first * cosine - second * sine
        out[start + 2 * i + 1] = second * cosine + first * sine
    return out


class Reference(ABC):
    """A drafter of one architecture: ``block`` runs its layers, ``draft`` adds its heads."""

    block_size_key, mask_key = "block_size", "mask_token_id"

    def __init__(self, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        self.config = config
        self.weights = {name: value.double() for name, value in weights.items()}
        self.epsilon = config["rms_norm_eps"]

    def block(self, features: torch.Tensor, token: int, position: int) -> torch.Tensor:
        """What the heads read, ``[slots, d]``, of the block behind the anchor ``token`` at
        ``position``; ``features`` are the target's, ``[positions, layers * d]``."""
        context = [self.project(row.double()) for row in features[:position]]
        size = self.config[self.block_size_key]
        tokens = [token] + [self.config[self.mask_key]] * (size - 1)
        return torch.stack(self.layers(tokens, position, context))

    def draft(self, hidden: torch.Tensor, previous: list[int]) -> tuple[torch.Tensor, Any]:
        """Logits ``[slots, V]`` and confidence logits ``[slots]`` (or ``None``) where
        ``previous[k]`` is the token before slot k."""
        logits, confidences = [], []
        memory: torch.Tensor | None = None
        for row, token in zip(hidden, previous, strict=True):
            base = self.base_logits(row)
            bias, memory = self.sequential(row, token, memory)
            logits.append(base + bias)
            confidences.append(self.confidence(row, token))
        known = confidences[0] is not None
        return torch.stack(logits), torch.stack(confidences) if known else None

    @abstractmethod
    def project(self, row: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def layers(self, tokens: list[int], position: int, context: Rows) -> Rows: ...

    @abstractmethod
    def base_logits(self, row: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def sequential(
        self, row: torch.Tensor, token: int, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor | float, torch.Tensor | None]: ...

    @abstractmethod
    def confidence(self, row: torch.Tensor, token: int) -> torch.Tensor | None: ...


class DeepSpecReference(Reference):
    """Qwen3 and Gemma 4 drafters as DeepSpec trains them."""

    def __init__(self, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        super().__init__(config, weights)
        self.gemma = config["architectures"] == ["Gemma4DSparkModel"]
        self.width = config["global_head_dim"] if self.gemma else config["head_dim"]
        half = self.width // 2
        rope = config["rope_parameters"]
        if self.gemma:
            rope = rope["full_attention"]
        turning = int(rope.get("partial_rotary_factor", 1.0) * half)
        self.frequencies = [
            rope["rope_theta"] ** (-2 * i / self.width) if i < turning else 0.0 for i in range(half)
        ]

    def project(self, row: torch.Tensor) -> torch.Tensor:
        projected = self.weights["fc.weight"] @ row
        return norm(projected, self.weights["hidden_norm.weight"], self.epsilon)

    def layers(self, tokens: list[int], position: int, context: Rows) -> Rows:
        hidden = [self.weights["embed_tokens.weight"][token] for token in tokens]
        if self.gemma:
            hidden = [row * math.sqrt(len(row)) for row in hidden]
        for index in range(self.config["num_hidden_layers"]):
            hidden = self._layer(f"layers.{index}.", hidden, position, context)
        return [norm(row, self.weights["norm.weight"], self.epsilon) for row in hidden]

    def _layer(self, prefix: str, hidden: Rows, position: int, context: Rows) -> Rows:
        own = {
            name.removeprefix(prefix): value
            for name, value in self.weights.items()
            if name.startswith(prefix)
        }
        normed = [norm(row, own["input_layernorm.weight"], self.epsilon) for row in hidden]
        sources = list(enumerate(context)) + [
            (position + slot, row) for slot, row in enumerate(normed)
        ]
        out = []
        for slot, row in enumerate(hidden):
            mixed = self._attend(own, normed[slot], position + slot, sources)
            if self.gemma:
                mixed = norm(mixed, own["post_attention_layernorm.weight"], self.epsilon)
            row = row + mixed
            name = "pre_feedforward_layernorm" if self.gemma else "post_attention_layernorm"
            x = norm(row, own[f"{name}.weight"], self.epsilon)
            gate = own["mlp.gate_proj.weight"] @ x
            gate = F.gelu(gate, approximate="tanh") if self.gemma else F.silu(gate)
            x = own["mlp.down_proj.weight"] @ (gate * (own["mlp.up_proj.weight"] @ x))
            if self.gemma:
                x = norm(x, own["post_feedforward_layernorm.weight"], self.epsilon)
                out.append((row + x) * own["layer_scalar"])
            else:
                out.append(row + x)
        return out

    def _attend(
        self,
        own: dict[str, torch.Tensor],
        row: torch.Tensor,
        position: int,
        sources: list[tuple[int, torch.Tensor]],
    ) -> torch.Tensor:
        heads = self.config["num_attention_heads"]
        group = heads * self.width // len(own["self_attn.k_proj.weight"])
        scale = 1.0 if self.gemma else 1 / math.sqrt(self.width)
        outputs = []
        for head in range(heads):
            query = self._part(own, "q", row, head)
            query = norm(query, own["self_attn.q_norm.weight"], self.epsilon)
            query = rotate_halves(query, position, self.frequencies)
            scores, values = [], []
            for place, source in sources:
                key = self._part(own, "k", source, head // group)
                shared = "self_attn.v_proj.weight" not in own
                value = key if shared else self._part(own, "v", source, head // group)
                key = norm(key, own["self_attn.k_norm.weight"], self.epsilon)
                scores.append(query @ rotate_halves(key, place, self.frequencies) * scale)
                values.append(norm(value, None, self.epsilon) if self.gemma else value)
            shares = torch.stack(scores).softmax(0)
            outputs.append(sum(a * v for a, v in zip(shares, values, strict=True)))
        joined = torch.cat(outputs)
        result = own["self_attn.o_proj.weight"] @ joined
        return result + own.get("self_attn.o_proj.bias", 0.0)

    def _part(
        self, own: dict[str, torch.Tensor], name: str, row: torch.Tensor, head: int
    ) -> torch.Tensor:
        whole = own[f"self_attn.{name}_proj.weight"] @ row
        whole = whole + own.get(f"self_attn.{name}_proj.bias", 0.0)
        return whole[head * self.width : (head + 1) * self.width]

    def base_logits(self, row: torch.Tensor) -> torch.Tensor:
        logits = self.weights["lm_head.weight"] @ row
        cap = self.config.get("final_logit_softcapping")
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def sequential(
        self, row: torch.Tensor, token: int, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor | float, torch.Tensor | None]:
        rank = self.config["markov_rank"]
        if rank == 0:
            return 0.0, None
        own = {
            name.removeprefix("markov_head."): value
            for name, value in self.weights.items()
            if name.startswith("markov_head.")
        }
        before = own["markov_w1.weight"][token]
        kind = self.config["markov_head_type"]
        if kind == "gated":
            joined = torch.cat([row, before])
            gate = own["gate_proj.weight"] @ joined + own["gate_proj.bias"]
            before = torch.sigmoid(gate) * before
        if kind == "rnn":
            memory = torch.zeros(rank).double() if memory is None else memory
            joined = torch.cat([memory, before, row])
            joint = own["joint_proj.weight"] @ joined + own["joint_proj.bias"]
            keep = torch.sigmoid(joint[:rank])
            memory = keep * memory + (1 - keep) * torch.tanh(joint[rank : 2 * rank])
            before = torch.tanh(joint[2 * rank :])
        return own["markov_w2.weight"] @ before, memory

    def confidence(self, row: torch.Tensor, token: int) -> torch.Tensor | None:
        if not self.config["enable_confidence_head"]:
            return None
        if self.config["confidence_head_with_markov"]:
            row = torch.cat([row, self.weights["markov_head.markov_w1.weight"][token]])
        weight = self.weights["confidence_head.proj.weight"][0]
        return weight @ row + self.weights["confidence_head.proj.bias"][0]


class DeepSeekV4Reference(Reference):
    """The draft module in ``mtp.*`` of a DeepSeek-V4 checkpoint."""

    block_size_key, mask_key = "dspark_block_size", "dspark_noise_token_id"

    def __init__(self, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        super().__init__(config, weights)
        self.last = max(int(name.split(".")[1]) for name in weights if name.startswith("mtp."))
        turning = config["qk_rope_head_dim"]
        self.frequencies = [config["rope_theta"] ** (-2 * i / turning) for i in range(turning // 2)]

    def project(self, row: torch.Tensor) -> torch.Tensor:
        projected = self.weights["mtp.0.main_proj.weight"] @ row
        return norm(projected, self.weights["mtp.0.main_norm.weight"], self.epsilon)

    def layers(self, tokens: list[int], position: int, context: Rows) -> Rows:
        streams = [
            self.weights["embed.weight"][token].repeat(self.config["hc_mult"], 1)
            for token in tokens
        ]
        for stage in range(self.last + 1):
            prefix = f"mtp.{stage}."
            own = {
                name.removeprefix(prefix): value
                for name, value in self.weights.items()
                if name.startswith(prefix)
            }
            streams = self._stage(own, streams, position, context)
        return [self._collapse(row) for row in streams]

    def _stage(
        self, own: dict[str, torch.Tensor], streams: Rows, position: int, context: Rows
    ) -> Rows:
        mixes = [self._mix(own, "attn", row) for row in streams]
        inputs = [
            norm(pre @ row, own["attn_norm.weight"], self.epsilon)
            for (pre, _, _), row in zip(mixes, streams, strict=True)
        ]
        seen = list(enumerate(context))[-self.config["sliding_window"] :]
        seen += [(position + slot, row) for slot, row in enumerate(inputs)]
        out = []
        for slot, ((_, post, comb), row) in enumerate(zip(mixes, streams, strict=True)):
            attended = self._attend(own, inputs[slot], position + slot, seen)
            row = post[:, None] * attended + comb.T @ row
            pre, post, comb = self._mix(own, "ffn", row)
            experts = self._experts(own, norm(pre @ row, own["ffn_norm.weight"], self.epsilon))
            out.append(post[:, None] * experts + comb.T @ row)
        return out

    def _mix(
        self, own: dict[str, torch.Tensor], name: str, streams: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights to read the streams, to write to them, and between them, whose rows and columns
        are made to sum to one in turns."""
        count, tiny = self.config["hc_mult"], self.config["hc_eps"]
        scale, base = own[f"hc_{name}_scale"], own[f"hc_{name}_base"]
        mixed = own[f"hc_{name}_fn"] @ norm(streams.flatten(), None, self.epsilon)
        pre = torch.sigmoid(mixed[:count] * scale[0] + base[:count]) + tiny
        post = 2 * torch.sigmoid(mixed[count : 2 * count] * scale[1] + base[count : 2 * count])
        comb = (mixed[2 * count :] * scale[2] + base[2 * count :]).reshape(count, count)
        comb = comb.softmax(1) + tiny
        comb = comb / (comb.sum(0) + tiny)
        for _ in range(self.config["hc_sinkhorn_iters"] - 1):
            comb = comb / (comb.sum(1)[:, None] + tiny)
            comb = comb / (comb.sum(0) + tiny)
        return pre, post, comb

    def _attend(
        self,
        own: dict[str, torch.Tensor],
        row: torch.Tensor,
        position: int,
        sources: list[tuple[int, torch.Tensor]],
    ) -> torch.Tensor:
        heads, width = self.config["num_attention_heads"], self.config["head_dim"]
        latent = norm(own["attn.wq_a.weight"] @ row, own["attn.q_norm.weight"], self.epsilon)
        queries = (own["attn.wq_b.weight"] @ latent).reshape(heads, width)
        shared = []
        for place, source in sources:
            entry = norm(own["attn.wkv.weight"] @ source, own["attn.kv_norm.weight"], self.epsilon)
            shared.append(rotate_pairs(entry, place, self.frequencies))
        outputs = []
        for head in range(heads):
            query = norm(queries[head], None, self.epsilon)
            query = rotate_pairs(query, position, self.frequencies)
            scores = [query @ entry / math.sqrt(width) for entry in shared]
            shares = torch.stack([*scores, own["attn.attn_sink"][head]]).softmax(0)[:-1]
            value = sum(a * v for a, v in zip(shares, shared, strict=True))
            # The values carry rotary positions; those relative to the query stay.
            outputs.append(rotate_pairs(value, -position, self.frequencies))
        groups = self.config["o_groups"]
        joined = torch.cat(outputs).reshape(groups, -1)
        inner = own["attn.wo_a.weight"].reshape(groups, -1, joined.shape[1])
        low = torch.cat([matrix @ part for matrix, part in zip(inner, joined, strict=True)])
        return own["attn.wo_b.weight"] @ low

    def _experts(self, own: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        scores = torch.sqrt(F.softplus(own["ffn.gate.weight"] @ row))
        order = (scores + own["ffn.gate.bias"]).argsort(descending=True)
        count = self.config.get("dspark_num_experts_per_tok", self.config["num_experts_per_tok"])
        chosen = order[:count].tolist()
        total = sum(float(scores[expert]) for expert in chosen)
        out = self._expert(own, "ffn.shared_experts", row)
        for expert in chosen:
            share = float(scores[expert]) / total * self.config["routed_scaling_factor"]
            out = out + share * self._expert(own, f"ffn.experts.{expert}", row)
        return out

    def _expert(self, own: dict[str, torch.Tensor], name: str, row: torch.Tensor) -> torch.Tensor:
        limit = self.config["swiglu_limit"]
        gate = (own[f"{name}.w1.weight"] @ row).clamp(max=limit)
        up = (own[f"{name}.w3.weight"] @ row).clamp(-limit, limit)
        return own[f"{name}.w2.weight"] @ (F.silu(gate) * up)

    def _collapse(self, streams: torch.Tensor) -> torch.Tensor:
        own = {name: self.weights[f"mtp.{self.last}.hc_head_{name}"] for name in _HEAD}
        mixed = own["fn"] @ norm(streams.flatten(), None, self.epsilon)
        shares = torch.sigmoid(mixed * own["scale"][0] + own["base"]) + self.config["hc_eps"]
        return shares @ streams

    def base_logits(self, row: torch.Tensor) -> torch.Tensor:
        normed = norm(row, self.weights[f"mtp.{self.last}.norm.weight"], self.epsilon)
        return self.weights["head.weight"] @ normed

    def sequential(
        self, row: torch.Tensor, token: int, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor | float, torch.Tensor | None]:
        head = f"mtp.{self.last}.markov_head"
        before = self.weights[f"{head}.markov_w1.weight"][token]
        return self.weights[f"{head}.markov_w2.weight"] @ before, None

    def confidence(self, row: torch.Tensor, token: int) -> torch.Tensor | None:
        before = self.weights[f"mtp.{self.last}.markov_head.markov_w1.weight"][token]
        weight = self.weights[f"mtp.{self.last}.confidence_head.proj.weight"][0]
        return weight @ torch.cat([row, before])


_HEAD = ("fn", "base", "scale")


def reference(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Reference:
    """The reference for a published configuration."""
    if "dspark_block_size" in config:
        return DeepSeekV4Reference(config, weights)
    return DeepSpecReference(config, weights)
