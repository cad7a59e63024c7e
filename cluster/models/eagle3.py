"""The EAGLE-3 drafter network (Li et al., 2025), the same for training and serving.

Entry t of a sequence joins the target's features of position t with the embedding of token t + 1,
at rotary position t; one decoder layer over entries 0 … t gives the law of token t + 2. To draft
further, the layer's own output takes the features' place. The mathematics and the weight names
are those of DeepSpec's ``deepspec/modeling/eagle3`` and of SafeAILab's ``LlamaForCausalLMEagle3``.

Letters in shapes: ``N`` entries, of one sequence or of many, ``d`` hidden size, ``V`` the target's
vocabulary, ``D`` the drafter's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from transformers import Gemma4TextConfig, LlamaConfig
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4RMSNorm,
    Gemma4TextMLP,
    Gemma4TextScaledWordEmbedding,
)
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from cluster.models.eagle3_config import GEMMA4, LLAMA, Eagle3Config

__all__ = ["Attend", "Eagle3Config", "Eagle3Drafter"]

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``attend(layer, query [N, heads, hd], key [N, kv heads, hd], value [N, kv heads, hd])`` keeps
the entries' keys and values and returns ``[N, heads, hd]``: softmax(query · key / √hd) over every
entry that the caller lets a query see, itself included. ``layer`` is always 0."""


class Eagle3Drafter(nn.Module):
    """An EAGLE-3 drafter with random weights; ``cluster.models.eagle3_checkpoint`` fills them.

    An entry's output depends on its own features, token and position and on the keys and values
    that ``attend`` shows it, on nothing else: so prefill in parts, batches and packed training
    give what one entry after another gives. Tensors come out in the dtype of the weights, except
    logits, which are fp32.
    """

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.rms_norm_eps
        gemma = config.architecture == GEMMA4
        self.embed_tokens: nn.Embedding = (
            Gemma4TextScaledWordEmbedding(config.vocab_size, width, None, embed_scale=width**0.5)
            if gemma
            else nn.Embedding(config.vocab_size, width)
        )
        self.fc = nn.Linear(len(config.target_layer_ids) * width, width, bias=False)
        self.layers = nn.ModuleList([_Gemma4Layer(config) if gemma else _Layer(config)])
        self.norm = _norm_class(config)(width, eps=eps)
        self.rotary_emb = LlamaRotaryEmbedding(_llama_config(config))
        self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        if config.has_vocabulary_map:
            self.d2t = nn.Buffer(torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.t2d = nn.Buffer(torch.arange(config.vocab_size) < config.draft_vocab_size)
        self.apply(_initialize)

    def project_features(self, concat_features: torch.Tensor) -> torch.Tensor:
        """What travels on the wire: ``fc`` of the target's features.

        Args:
            concat_features: ``[*, len(target_layer_ids) * d]``, the target's residual stream
                after each of ``target_layer_ids``, joined in that order.

        Returns:
            ``[*, d]``.
        """
        return self.fc(concat_features)

    def forward(
        self,
        features: torch.Tensor,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
    ) -> torch.Tensor:
        """Runs N entries of any number of sequences through the layer.

        Args:
            features: ``[N, d]``, of position t: from ``project_features``, or where the target
                has not been there yet what this method returned for entry t - 1.
            token_ids: int64 ``[N]``, token t + 1.
            positions: int64 ``[N]``, t.
            attend: see ``Attend``.

        Returns:
            ``[N, d]``, before the final norm: for ``logits``, and to be fed back.
        """
        layer = self._layer
        inputs = layer.inputs(self.embed_tokens(token_ids), features)
        return layer(features, inputs, self._rotary(features, positions), attend)

    def context_kv(
        self, features: torch.Tensor, token_ids: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of entries whose output nobody needs, at a fraction of the cost.

        Args as of ``forward``.

        Returns:
            ``(keys, values)``, each ``[N, kv heads, hd]``, as ``forward`` gives them to
            ``attend``.
        """
        layer = self._layer
        inputs = layer.inputs(self.embed_tokens(token_ids), features)
        return layer.self_attn.keys_values(inputs, self._rotary(features, positions))

    def draft_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits over the drafter's own vocabulary: ``[*, d]`` to fp32 ``[*, D]``."""
        logits = self.lm_head(self.norm(hidden)).float()
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits over the target's token ids: ``[*, d]`` to fp32 ``[*, V]``; ``-inf`` for tokens
        that the drafter does not know."""
        logits = self.draft_logits(hidden)
        if not self.config.has_vocabulary_map:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.config.vocab_size), float("-inf"))
        return full.index_copy(-1, self.draft_token_ids(), logits)

    def draft_token_ids(self) -> torch.Tensor:
        """The target's id of each token that the drafter knows: int64 ``[D]``."""
        ids = torch.arange(self.config.draft_vocab_size, device=self.lm_head.weight.device)
        # d2t holds differences: target id less draft id.
        return ids + self.d2t if self.config.has_vocabulary_map else ids

    def set_draft_token_ids(self, token_ids: torch.Tensor) -> None:
        """Chooses the tokens that the drafter knows.

        Args:
            token_ids: int64 ``[D]``, the target's ids, each once.

        Raises:
            ValueError: the format has no vocabulary map, or the ids are not as described.
        """
        config = self.config
        if not config.has_vocabulary_map:
            raise ValueError(f"{config.architecture} drafters know every token of the target")
        token_ids = token_ids.cpu()
        known = torch.zeros(config.vocab_size, dtype=torch.bool)
        valid = token_ids.shape == self.d2t.shape and bool(
            ((token_ids >= 0) & (token_ids < config.vocab_size)).all()
        )
        if valid:
            known[token_ids] = True
        if not valid or int(known.sum()) != config.draft_vocab_size:
            raise ValueError(
                f"need {config.draft_vocab_size} different ids below {config.vocab_size}"
            )
        self.d2t.copy_(token_ids - torch.arange(config.draft_vocab_size))
        self.t2d.copy_(known)

    @property
    def _layer(self) -> _Layer:
        return cast(_Layer, self.layers[0])

    def _rotary(
        self, features: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cosine, sine = self.rotary_emb(features, positions[None])
        return cosine[0], sine[0]


class _Attention(nn.Module):
    """Grouped-query attention that reads embedding and hidden state side by side."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(2 * width, query_width, bias=bias)
        self.k_proj = nn.Linear(2 * width, key_width, bias=bias)
        self.v_proj = (
            nn.Linear(2 * width, key_width, bias=bias) if not config.attention_k_eq_v else None
        )
        self.o_proj = nn.Linear(query_width, width, bias=bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.v_norm: nn.Module = nn.Identity()
        self.query_factor = 1.0
        size, eps = config.head_dim, config.rms_norm_eps
        if config.architecture != LLAMA:
            norm = _norm_class(config)
            self.q_norm, self.k_norm = norm(size, eps=eps), norm(size, eps=eps)
        if config.architecture == GEMMA4:
            self.v_norm = Gemma4RMSNorm(size, eps=eps, with_scale=False)
            # Gemma 4's queries are normed and its scores not scaled; callers divide by √hd.
            self.query_factor = size**0.5

    def forward(
        self, inputs: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], attend: Attend
    ) -> torch.Tensor:
        query = self.q_norm(self._heads(self.q_proj(inputs)))
        keys, values = self.keys_values(inputs, rotary)
        attended = attend(0, _rotate(query, rotary) * self.query_factor, keys, values)
        return self.o_proj(attended.flatten(1))

    def keys_values(
        self, inputs: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[N, 2 d]`` to rotated keys and values, each ``[N, kv heads, hd]``."""
        keys = self._heads(self.k_proj(inputs))
        values = keys if self.v_proj is None else self._heads(self.v_proj(inputs))
        return _rotate(self.k_norm(keys), rotary), self.v_norm(values)

    def _heads(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.unflatten(-1, (-1, self.head_dim))


class _Layer(nn.Module):
    """The decoder layer of the Qwen3 and Llama formats."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = _Attention(config)
        self.mlp = _build_mlp(config)
        norm = _norm_class(config)
        self.hidden_norm = norm(width, eps=eps)
        self.input_layernorm = norm(width, eps=eps)
        self.post_attention_layernorm = norm(width, eps=eps)

    def inputs(self, embedding: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What attention reads: ``[N, 2 d]``."""
        return torch.cat([self.input_layernorm(embedding), self.hidden_norm(hidden)], dim=-1)

    def forward(
        self,
        hidden: torch.Tensor,
        inputs: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
    ) -> torch.Tensor:
        hidden = hidden + self.self_attn(inputs, rotary, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class _Gemma4Layer(_Layer):
    """The decoder layer of the Gemma 4 format: norms on both sides of attention and MLP."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.pre_feedforward_layernorm = Gemma4RMSNorm(width, eps=eps)
        self.post_feedforward_layernorm = Gemma4RMSNorm(width, eps=eps)
        self.layer_scalar = nn.Buffer(torch.ones(1))

    def forward(
        self,
        hidden: torch.Tensor,
        inputs: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
    ) -> torch.Tensor:
        attended = self.self_attn(inputs, rotary, attend)
        hidden = hidden + self.post_attention_layernorm(attended)
        inner = self.mlp(self.pre_feedforward_layernorm(hidden))
        return (hidden + self.post_feedforward_layernorm(inner)) * self.layer_scalar


def _norm_class(config: Eagle3Config) -> type[LlamaRMSNorm] | type[Gemma4RMSNorm]:
    return Gemma4RMSNorm if config.architecture == GEMMA4 else LlamaRMSNorm


def _build_mlp(config: Eagle3Config) -> nn.Module:
    if config.architecture != GEMMA4:
        return LlamaMLP(_llama_config(config))
    gemma = Gemma4TextConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        hidden_activation=config.hidden_act,
        num_hidden_layers=1,
        layer_types=["full_attention"],
    )
    return Gemma4TextMLP(gemma, layer_idx=0)


def _llama_config(config: Eagle3Config) -> LlamaConfig:
    """What transformers' Llama modules need; Qwen3's MLP and rotary positions are the same."""
    return LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        hidden_act=config.hidden_act,
        mlp_bias=config.mlp_bias,
        rope_parameters=dict(config.rope_parameters),
    )


def _rotate(states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary positions: ``[N, heads, head_dim]`` by cosines and sines ``[N, head_dim]``."""
    cosine, sine = (part[:, None] for part in rotary)
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat([-second, first], dim=-1) * sine


def _initialize(module: nn.Module) -> None:
    """The initialisation of all three families: normal with deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
