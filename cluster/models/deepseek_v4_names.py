"""Names of a DeepSeek-V4 draft module's weights, in the published checkpoint and in the network.

Published, stage i is ``mtp.i``: a decoder layer as the target's own, ``main_proj`` and
``main_norm`` in the first, what follows the last layer in the last; each expert has tensors of its
own, which the network joins. Embedding and output head are the target's.
"""

from __future__ import annotations

import re

# Published names on the right.
_STAGE = {
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    "self_attn.sinks": "attn.attn_sink",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "attn_hc.fn": "hc_attn_fn",
    "attn_hc.base": "hc_attn_base",
    "attn_hc.scale": "hc_attn_scale",
    "ffn_hc.fn": "hc_ffn_fn",
    "ffn_hc.base": "hc_ffn_base",
    "ffn_hc.scale": "hc_ffn_scale",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
}
_FIRST = {"fc.weight": "main_proj.weight", "hidden_norm.weight": "main_norm.weight"}
_LAST = {
    "norm.weight": "norm.weight",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
    "markov_head.markov_w1.weight": "markov_head.markov_w1.weight",
    "markov_head.markov_w2.weight": "markov_head.markov_w2.weight",
    "confidence_head.proj.weight": "confidence_head.proj.weight",
}
_TARGET = {"embed_tokens.weight": "embed.weight", "lm_head.weight": "head.weight"}
# The same, as transformers names them when it writes a target.
_TARGET_ALIASES = {"model.embed_tokens.weight": "embed.weight", "lm_head.weight": "head.weight"}

_FLOAT32 = re.compile(r"attn_sink$|gate\.bias$|\.hc_\w+$")


def is_ours(name: str) -> bool:
    """Whether the tensor ``name`` of a DeepSeek-V4 checkpoint is part of its draft module."""
    return name.startswith("mtp.") or canonical(name) in _TARGET.values()


def canonical(name: str) -> str:
    """The published name of a tensor that has another one where transformers wrote the file."""
    return _TARGET_ALIASES.get(name, name)


def is_float32(name: str) -> bool:
    """Whether published checkpoints keep this tensor in fp32, whatever the others are in."""
    return _FLOAT32.search(name) is not None


def stage_of(name: str) -> int | None:
    """The stage that the published ``name`` belongs to; ``None`` if it is not of the module."""
    match = re.match(r"mtp\.(\d+)\.", name)
    return None if match is None else int(match[1])


def published_names(num_stages: int) -> dict[str, str]:
    """Published name by the network's name, for all tensors but experts."""
    names = dict(_TARGET)
    names |= {ours: f"mtp.0.{theirs}" for ours, theirs in _FIRST.items()}
    names |= {ours: f"mtp.{num_stages - 1}.{theirs}" for ours, theirs in _LAST.items()}
    for stage in range(num_stages):
        names |= {
            f"layers.{stage}.{ours}": f"mtp.{stage}.{theirs}" for ours, theirs in _STAGE.items()
        }
    return names
