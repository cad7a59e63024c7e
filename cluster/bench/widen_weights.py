"""The weights of a widened target and of its widened drafter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cluster.bench.widen_shape import Widening, widen_tensor
from cluster.models.dspark_config import DSparkConfig

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Rule:
    """What becomes of one kind of tensor: the arguments of ``widen_tensor``."""

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    scale: float = 1.0

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        has_columns = weight.dim() > 1  # a bias has none
        return widen_tensor(weight, self.rows, self.columns if has_columns else None, self.scale)


def widen_target(
    tensors: Mapping[str, torch.Tensor], widening: Widening, dtype: torch.dtype, *, is_tied: bool
) -> Tensors:
    """The wide target's weights by name, in ``dtype``.

    Args:
        tensors: those of a ``Qwen3ForCausalLM``; without ``lm_head.weight`` where ``is_tied``.
        is_tied: whether the embedding is the head as well.
    """
    scale = widening.residual_scale
    rules = {
        "model.embed_tokens": _Rule(columns=widening.residual, scale=scale),
        # A tied head brings the factor of the embedding along.
        "model.norm": _Rule(rows=widening.normed, scale=scale**-2 if is_tied else 1 / scale),
        "lm_head": _Rule(columns=widening.normed),
    }
    return _widen(tensors, widening, dtype, rules, prefix="model.layers.")


def widen_drafter(
    tensors: Mapping[str, torch.Tensor],
    config: DSparkConfig,
    widening: Widening,
    dtype: torch.dtype,
) -> Tensors:
    """The wide drafter's weights by name, in ``dtype``.

    Args:
        tensors: those of a ``Qwen3DSparkDrafter``.
        config: its configuration.
        widening: of the drafter; its width is the target's, narrow and wide.
    """
    scale, normed = widening.residual_scale, widening.normed
    width, rank = widening.narrow.hidden_size, torch.arange(config.markov_rank)
    features = [_behind(normed, i * width) for i in range(len(config.target_layer_ids))]
    previous = rank + width
    rules = {
        "embed_tokens": _Rule(columns=widening.residual, scale=scale),
        # It reads the target's residual, without a norm, and writes one: a / a.
        "fc": _Rule(rows=widening.residual, columns=torch.cat(features)),
        "hidden_norm": _Rule(rows=normed, scale=1 / scale),
        "norm": _Rule(rows=normed, scale=1 / scale),
        "lm_head": _Rule(columns=normed),
        "markov_head.markov_w1": _Rule(),
        "markov_head.markov_w2": _Rule(),
        # Each head joins its inputs in an order of its own (``cluster.models.markov``).
        "markov_head.gate_proj": _Rule(columns=torch.cat([normed, previous])),
        "markov_head.joint_proj": _Rule(
            columns=torch.cat([rank, rank + len(rank), _behind(normed, 2 * len(rank))])
        ),
        "confidence_head.proj": _Rule(
            columns=torch.cat([normed, previous]) if config.confidence_head_with_markov else normed
        ),
    }
    return _widen(tensors, widening, dtype, rules, prefix="layers.")


def _widen(
    tensors: Mapping[str, torch.Tensor],
    widening: Widening,
    dtype: torch.dtype,
    rules: Mapping[str, _Rule],
    prefix: str,
) -> Tensors:
    """Every tensor by its rule, and the added layers, which are all zero: identities."""
    layer_rules = _layer_rules(widening)
    wide: Tensors = {}
    for name, weight in tensors.items():
        if name.startswith(prefix):
            index, _, part = name.removeprefix(prefix).partition(".")
            rule = layer_rules[part.rpartition(".")[0]]
            wide[f"{prefix}{widening.layers[int(index)]}.{part}"] = rule(weight).to(dtype)
        else:
            wide[name] = rules[name.rpartition(".")[0]](weight).to(dtype)
    pattern = f"{prefix}{widening.layers[0]}."
    parts = {name.removeprefix(pattern): w for name, w in wide.items() if name.startswith(pattern)}
    for layer in sorted(set(range(widening.wide.num_layers)) - set(widening.layers)):
        wide |= {f"{prefix}{layer}.{part}": torch.zeros_like(w) for part, w in parts.items()}
    return wide


def _behind(axis: torch.Tensor, offset: int) -> torch.Tensor:
    """The axis of something that is ``offset`` further on in the narrow dimension."""
    return axis.where(axis < 0, axis + offset)


def _layer_rules(widening: Widening) -> dict[str, _Rule]:
    """What becomes of the parts of a decoder layer."""
    scale, normed = widening.residual_scale, widening.normed
    norm = _Rule(rows=normed, scale=1 / scale)
    return {
        "input_layernorm": norm,
        "post_attention_layernorm": norm,
        "self_attn.q_proj": _Rule(rows=widening.queries, columns=normed),
        "self_attn.k_proj": _Rule(rows=widening.keys, columns=normed),
        "self_attn.v_proj": _Rule(rows=widening.values, columns=normed),
        "self_attn.o_proj": _Rule(widening.residual, widening.attended, scale),
        "self_attn.q_norm": _Rule(rows=widening.head_norm, scale=widening.query_gain),
        "self_attn.k_norm": _Rule(rows=widening.head_norm),
        "mlp.gate_proj": _Rule(rows=widening.inner, columns=normed),
        "mlp.up_proj": _Rule(rows=widening.inner, columns=normed),
        "mlp.down_proj": _Rule(widening.residual, widening.inner, scale),
    }
