"""The DSpark drafter network (DeepSeek-AI, 2026), the same for training and serving.

A block's inputs are the anchor (the last committed token, whose target features do not exist
yet) and mask tokens; its slots attend to each other in both directions and to keys and values
made from the target's features. One pass gives every slot's base logits; a small sequential head
then adds what the token before says, slot by slot. The mathematics, configuration keys and weight
names are those of DeepSpec's ``deepspec/modeling/dspark/qwen3``.

Letters in shapes: ``N`` tokens, ``B`` sessions, ``L`` context length, ``S`` slots, ``A`` anchors,
``d`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

from cluster.models.dspark_config import DSparkConfig
from cluster.models.markov import build_markov_head

__all__ = ["DSparkConfig", "DSparkDrafter"]


class DSparkDrafter(nn.Module):
    """A DSpark drafter with random weights; ``cluster.models.checkpoint`` fills them.

    Tensors come out in the dtype of the weights, except logits, which are fp32.
    """

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        self.config = config
        qwen = Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            hidden_act=config.hidden_act,
            rope_parameters=dict(config.rope_parameters),
        )
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(
            _DecoderLayer(config, qwen) for _ in range(config.num_hidden_layers)
        )
        self.norm = Qwen3RMSNorm(width, eps=eps)
        self.rotary_emb = Qwen3RotaryEmbedding(qwen)
        self.fc = nn.Linear(len(config.target_layer_ids) * width, width, bias=False)
        self.hidden_norm = Qwen3RMSNorm(width, eps=eps)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.markov_head = build_markov_head(config)
        self.confidence_head = _ConfidenceHead(config) if config.enable_confidence_head else None
        self.apply(_initialize)

    def project_features(self, concat_features: torch.Tensor) -> torch.Tensor:
        """What travels on the wire: ``fc`` alone, before ``hidden_norm``.

        Args:
            concat_features: ``[*, len(target_layer_ids) * d]``, the target's residual stream
                after each of ``target_layer_ids``, joined in that order.

        Returns:
            ``[*, d]``.
        """
        return self.fc(concat_features)

    def context_kv(
        self, projected: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of context tokens, to be kept by session; each depends on its own
        token alone, so that feeding in parts gives the same as feeding at once.

        Args:
            projected: ``[N, d]`` from ``project_features``.
            positions: int64 ``[N]``, the tokens' absolute positions.

        Returns:
            ``(keys, values)``, each ``[num_hidden_layers, N, num_key_value_heads, head_dim]``.
        """
        features = self.hidden_norm(projected)
        rotary = self.rotary_emb(features, positions[None])
        attentions = [cast(_DecoderLayer, layer).self_attn for layer in self.layers]
        pairs = [attention.keys_values(features[None], rotary) for attention in attentions]
        keys = torch.stack([key[0].transpose(0, 1) for key, _ in pairs])
        values = torch.stack([value[0].transpose(0, 1) for _, value in pairs])
        return keys, values

    def block_hidden(
        self,
        anchor_token_ids: torch.Tensor,
        anchor_positions: torch.Tensor,
        context_keys: torch.Tensor,
        context_values: torch.Tensor,
        context_lengths: torch.Tensor,
        num_slots: int | None = None,
    ) -> torch.Tensor:
        """Runs one block for each of B sessions. Slot i (from 0) predicts position n + i.

        The whole block always runs, as it was trained; ``num_slots`` only says how many of its
        slots are wanted (default: all). Nothing of a block is cached.

        Args:
            anchor_token_ids: int64 ``[B]``, the last committed tokens.
            anchor_positions: int64 ``[B]``, their positions n - 1.
            context_keys: ``[num_hidden_layers, B, L, num_key_value_heads, head_dim]`` from
                ``context_kv``, padded at the end; padding is never read.
            context_values: likewise.
            context_lengths: int64 ``[B]``, how many entries of each session are real: n - 1
                (positions 0 to n - 2) where no feature is missing.

        Returns:
            ``[B, num_slots, d]``, after the final norm.

        Raises:
            ValueError: ``num_slots`` is not between 1 and ``block_size``.
        """
        size = self.config.block_size
        num_slots = size if num_slots is None else num_slots
        if not 1 <= num_slots <= size:
            raise ValueError(f"num_slots must be between 1 and {size}, not {num_slots}")
        batch, length = context_keys.shape[1:3]
        columns = torch.arange(length, device=context_keys.device)
        mask = torch.ones(batch, 1, size, length + size, dtype=torch.bool, device=columns.device)
        mask[..., :length] = (columns < context_lengths[:, None])[:, None, None]
        hidden = self._backbone(
            anchor_token_ids[:, None], anchor_positions[:, None], context_keys, context_values, mask
        )
        return hidden[:, 0, :num_slots]

    def packed_hidden(
        self, token_ids: torch.Tensor, projected: torch.Tensor, anchors: torch.Tensor
    ) -> torch.Tensor:
        """Runs the blocks of many anchors of each sequence in one pass, for training and
        evaluation. A block sees the features before its own anchor and no other block.

        Args:
            token_ids: int64 ``[B, L]``.
            projected: ``[B, L, d]`` from ``project_features``.
            anchors: int64 ``[B, A]``, positions of anchors in the sequences.

        Returns:
            ``[B, A, block_size, d]``, after the final norm.
        """
        batch, length = token_ids.shape
        size = self.config.block_size
        positions = torch.arange(length, device=token_ids.device).repeat(batch)
        keys, values = self.context_kv(projected.flatten(0, 1), positions)
        keys = keys.unflatten(1, (batch, length))
        values = values.unflatten(1, (batch, length))
        before = torch.arange(length, device=token_ids.device) < anchors[..., None]
        rows = anchors.shape[1]
        own = torch.eye(rows, dtype=torch.bool, device=token_ids.device)
        mask = torch.cat(
            [
                before.repeat_interleave(size, dim=1),
                own.repeat_interleave(size, 0).repeat_interleave(size, 1).expand(batch, -1, -1),
            ],
            dim=-1,
        )
        return self._backbone(token_ids.gather(1, anchors), anchors, keys, values, mask[:, None])

    def base_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits before the sequential head: ``[*, d]`` to fp32 ``[*, V]``."""
        return self.lm_head(hidden).float()

    def markov_step(
        self,
        base_logits_k: torch.Tensor,
        prev_token_ids: torch.Tensor,
        hidden_k: torch.Tensor,
        state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of slot k, given the token before it (the anchor for slot 0).

        Args:
            base_logits_k: fp32 ``[B, V]``.
            prev_token_ids: int64 ``[B]``.
            hidden_k: ``[B, d]``, slot k of ``block_hidden``.
            state: what the step before returned, ``None`` for slot 0.

        Returns:
            ``(logits fp32 [B, V], state)``; for DFlash the base logits themselves.
        """
        if self.markov_head is None:
            return base_logits_k, None
        bias, state = self.markov_head.step(prev_token_ids, hidden_k, state)
        return base_logits_k + bias.float(), state

    def block_logits(self, hidden: torch.Tensor, prev_token_ids: torch.Tensor) -> torch.Tensor:
        """``markov_step`` over all slots whose tokens are known: ``[*, S, d]`` and int64
        ``[*, S]`` to fp32 ``[*, S, V]``."""
        logits = self.base_logits(hidden)
        if self.markov_head is None:
            return logits
        return logits + self.markov_head.block(prev_token_ids, hidden).float()

    def confidence_logit(
        self,
        hidden_k: torch.Tensor,
        prev_token_ids: torch.Tensor,
        state: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logit of the chance that slot k's token is accepted if all before it are.

        It depends on slot k's hidden state and the token before, never on the token of slot k.

        Args:
            hidden_k: ``[*, d]``.
            prev_token_ids: int64 ``[*]``.
            state: the state that ``markov_step`` would take here. DeepSpec's heads leave it out.

        Returns:
            fp32 ``[*]``.

        Raises:
            ValueError: this drafter has no confidence head.
        """
        if self.confidence_head is None:
            raise ValueError("this drafter has no confidence head")
        if self.config.confidence_head_with_markov:
            assert self.markov_head is not None
            previous = self.markov_head.markov_w1(prev_token_ids)
            hidden_k = torch.cat([hidden_k, previous], dim=-1)
        return self.confidence_head(hidden_k).float()

    def _backbone(
        self,
        anchor_token_ids: torch.Tensor,
        anchor_positions: torch.Tensor,
        context_keys: torch.Tensor,
        context_values: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Blocks of anchors ``[B, A]`` under ``mask [B, 1, A * S, L + A * S]`` to
        ``[B, A, S, d]``."""
        size = self.config.block_size
        batch, rows = anchor_token_ids.shape
        inputs = anchor_token_ids[..., None].expand(-1, -1, size).clone()
        inputs[..., 1:] = self.config.mask_token_id
        offsets = torch.arange(size, device=inputs.device)
        positions = (anchor_positions[..., None] + offsets).flatten(1)
        hidden = self.embed_tokens(inputs.flatten(1))
        rotary = self.rotary_emb(hidden, positions)
        for index, layer in enumerate(self.layers):
            # Attention wants heads before tokens; sessions are stored tokens first.
            keys = context_keys[index].transpose(1, 2)
            values = context_values[index].transpose(1, 2)
            hidden = layer(hidden, rotary, keys, values, mask)
        return self.norm(hidden).view(batch, rows, size, -1)


class _Attention(nn.Module):
    """Grouped-query attention of a block over given context keys and values and its own."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(width, query_width, bias=bias)
        self.k_proj = nn.Linear(width, key_width, bias=bias)
        self.v_proj = nn.Linear(width, key_width, bias=bias)
        self.o_proj = nn.Linear(query_width, width, bias=bias)
        self.q_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def keys_values(
        self, inputs: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, N, d]`` to rotated keys and values, each ``[B, key-value heads, N, head_dim]``."""
        keys = self.k_norm(self._heads(self.k_proj(inputs))).transpose(1, 2)
        values = self._heads(self.v_proj(inputs)).transpose(1, 2)
        return _rotate(keys, rotary), values

    def forward(
        self,
        inputs: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        context_keys: torch.Tensor,
        context_values: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        queries = self.q_norm(self._heads(self.q_proj(inputs))).transpose(1, 2)
        own_keys, own_values = self.keys_values(inputs, rotary)
        attended = F.scaled_dot_product_attention(
            _rotate(queries, rotary),
            torch.cat([context_keys, own_keys], dim=2),
            torch.cat([context_values, own_values], dim=2),
            attn_mask=mask,
            enable_gqa=self.groups > 1,
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _heads(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.unflatten(-1, (-1, self.head_dim))


class _DecoderLayer(nn.Module):
    """A Qwen3 decoder layer whose attention also reads the context."""

    def __init__(self, config: DSparkConfig, qwen: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = Qwen3MLP(qwen)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        context_keys: torch.Tensor,
        context_values: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden)
        hidden = hidden + self.self_attn(normed, rotary, context_keys, context_values, mask)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class _ConfidenceHead(nn.Module):
    """Linear acceptance predictor over a slot's state and, with Markov, the token before it."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        extra = config.markov_rank if config.confidence_head_with_markov else 0
        self.proj = nn.Linear(config.hidden_size + extra, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.proj(inputs).squeeze(-1)


def _rotate(states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary positions: ``[B, heads, N, head_dim]`` by cosines and sines ``[B, N, head_dim]``."""
    cosine, sine = (part[:, None] for part in rotary)
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat([-second, first], dim=-1) * sine


def _initialize(module: nn.Module) -> None:
    """Qwen3's initialisation: normal with deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
