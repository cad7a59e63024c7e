"""The DSpark drafter network (DeepSeek-AI, 2026), the same for training and serving.

A block's inputs are the anchor (the last committed token, whose target features do not exist
yet) and mask tokens; its slots attend to each other in both directions and to keys and values
made from the target's features. One pass gives every slot's base logits; a small sequential head
then adds what the token before says, slot by slot. The mathematics, configuration keys and weight
names are those of DeepSpec's ``deepspec/modeling/dspark``. DFlash is the same without a
sequential head (``markov_rank`` 0).

What every architecture shares is here; its layers are transformers' own, in ``qwen3_dspark``,
``gemma4_dspark`` and ``deepseek_v4_dspark``. ``cluster.models.checkpoint`` knows which is which.

Letters in shapes: ``N`` tokens, ``B`` sessions, ``L`` context length, ``S`` slots, ``A`` anchors,
``d`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from cluster.models.dspark_config import DSparkConfig
from cluster.models.markov import build_markov_head

__all__ = ["DSparkConfig", "DSparkDrafter"]


class DSparkDrafter(nn.Module, ABC):
    """What drafters of every architecture do; subclasses bring the layers.

    Guarantees: tensors come out in the dtype of the weights, except logits, which are fp32;
    nothing of a block is kept; a context entry depends on its own token alone.

    Args:
        config: the drafter's shape.
        embed_tokens, layers, norm, hidden_norm, rotary_emb: the architecture's modules. A layer
            is called as transformers' decoder layers are.
        confidence_bias: whether the confidence head has a bias.
    """

    def __init__(
        self,
        config: DSparkConfig,
        *,
        embed_tokens: nn.Embedding,
        layers: Iterable[nn.Module],
        norm: nn.Module,
        hidden_norm: nn.Module,
        rotary_emb: nn.Module,
        confidence_bias: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.rotary_emb = rotary_emb
        self.fc = nn.Linear(len(config.target_layer_ids) * width, width, bias=False)
        self.hidden_norm = hidden_norm
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.markov_head = build_markov_head(config)
        self.confidence_head = (
            _ConfidenceHead(config, confidence_bias) if config.enable_confidence_head else None
        )
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
        features = self.hidden_norm(projected)[None]
        rotary = self._rotary(features, positions[None])
        pairs = [self._context_entry(layer.self_attn, features, rotary) for layer in self.layers]
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
                ``context_kv``, padded at the end; padding is never read. With a
                ``context_window`` w no more than the last w entries need be there.
            context_values: likewise.
            context_lengths: int64 ``[B]``, how many entries of each session are real: n - 1
                (positions 0 to n - 2) where no feature is missing.

        Returns:
            ``[B, num_slots, d]``, what the heads read.

        Raises:
            ValueError: ``num_slots`` is not between 1 and ``block_size``.
        """
        size = self.config.block_size
        num_slots = size if num_slots is None else num_slots
        if not 1 <= num_slots <= size:
            raise ValueError(f"num_slots must be between 1 and {size}, not {num_slots}")
        batch, length = context_keys.shape[1:3]
        mask = context_keys.new_ones(batch, 1, size, length + size, dtype=torch.bool)
        mask[..., :length] = self._visible(context_lengths[:, None], length)[:, None]
        hidden = self._backbone(
            anchor_token_ids[:, None], anchor_positions[:, None], context_keys, context_values, mask
        )
        return hidden[:, 0, :num_slots]

    def attend_by(self, attention: str) -> None:
        """Has the layers attend by another function of transformers' ``AttentionInterface``."""
        for layer in self.layers:
            module: Any = layer.self_attn
            module.config._attn_implementation = attention

    def block_tokens(self, anchor_token_ids: torch.Tensor) -> torch.Tensor:
        """What the blocks of anchors ``[*]`` begin with, int64 ``[*, block_size]``."""
        size = self.config.block_size
        token_ids = anchor_token_ids[..., None].expand(*anchor_token_ids.shape, size).clone()
        token_ids[..., 1:] = self.config.mask_token_id
        return token_ids

    def flat_block_hidden(
        self, token_ids: torch.Tensor, positions: torch.Tensor, **attention: Any
    ) -> torch.Tensor:
        """``block_hidden`` for whoever keeps contexts otherwise (see ``attend_by``): blocks of
        sessions one behind the other.

        Args:
            token_ids: int64 ``[N]``, of ``block_tokens``; ``positions``: ``[N]``, theirs.
            attention: for the attention function, which sees to what a block attends to.

        Returns:
            ``[N, d]``.
        """
        embedded, positions = self.embed_tokens(token_ids[None]), positions[None]
        rotary = self._rotary(embedded, positions)
        hidden = self._enter(embedded)
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=positions,
                position_embeddings=rotary,
                **attention,
            )
        return self._leave(hidden)[0]

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
            ``[B, A, block_size, d]``, what the heads read.
        """
        batch, length = token_ids.shape
        size = self.config.block_size
        positions = torch.arange(length, device=token_ids.device).repeat(batch)
        keys, values = self.context_kv(projected.flatten(0, 1), positions)
        keys = keys.unflatten(1, (batch, length))
        values = values.unflatten(1, (batch, length))
        rows = anchors.shape[1]
        own = torch.eye(rows, dtype=torch.bool, device=token_ids.device)
        mask = torch.cat(
            [
                self._visible(anchors, length).repeat_interleave(size, dim=1),
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

    def checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        """All weights under the names that published checkpoints of this architecture use."""
        return self.state_dict()

    def load_checkpoint_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes over what ``checkpoint_tensors`` gives, the tensors themselves; every name must
        be there."""
        self.load_state_dict(tensors, assign=True)

    def is_float32(self, name: str) -> bool:
        """Whether the tensor of this name, in ``state_dict`` or ``checkpoint_tensors``, is fp32
        whatever the dtype of the others."""
        return False

    def _visible(self, lengths: torch.Tensor, length: int) -> torch.Tensor:
        """Which of ``length`` context columns rows that see the first ``lengths [B, R]`` of them
        attend to: bool ``[B, R, length]``."""
        columns = torch.arange(length, device=lengths.device)
        visible = columns < lengths[..., None]
        if self.config.context_window is not None:
            visible &= columns >= lengths[..., None] - self.config.context_window
        return visible

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
        inputs = self.block_tokens(anchor_token_ids)
        offsets = torch.arange(size, device=inputs.device)
        positions = (anchor_positions[..., None] + offsets).flatten(1)
        embedded = self.embed_tokens(inputs.flatten(1))
        rotary = self._rotary(embedded, positions)
        hidden = self._enter(embedded)
        cache = _Context(context_keys, context_values)
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=self._attention_mask(mask, hidden.dtype),
                position_ids=positions,
                position_embeddings=rotary,
                past_key_values=cache,
            )
        return self._leave(hidden).view(batch, rows, size, -1)

    @abstractmethod
    def _context_entry(
        self, attention: Any, features: torch.Tensor, rotary: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[B, heads, N, head_dim]`` that a layer's attention reads for normed
        features ``[B, N, d]``."""

    def _rotary(self, like: torch.Tensor, positions: torch.Tensor) -> Any:
        """Rotary embeddings of int64 ``[B, N]`` positions, as the architecture's layers take
        them, in the dtype and on the device of ``like``."""
        return self.rotary_emb(like, positions)

    def _attention_mask(self, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The bool mask in the form that the layers' attention takes."""
        return mask

    def _enter(self, embedded: torch.Tensor) -> torch.Tensor:
        """``[B, N, d]`` to what the first layer takes."""
        return embedded

    def _leave(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the last layer gives to the ``[B, N, d]`` that the heads read."""
        return self.norm(hidden)


class _Context:
    """Takes a transformers cache's place in attention: puts the context in front of a block's own
    keys and values, and keeps nothing."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """``keys`` and ``values`` are ``[layers, B, L, heads, head_dim]``."""
        self._keys = keys
        self._values = values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, heads, S, head_dim]`` to ``[B, heads, L + S, head_dim]``."""
        # Attention wants heads before tokens; sessions are stored tokens first.
        keys = self._keys[layer_idx].transpose(1, 2)
        values = self._values[layer_idx].transpose(1, 2)
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)


class _ConfidenceHead(nn.Module):
    """Linear acceptance predictor over a slot's state and, with Markov, the token before it."""

    def __init__(self, config: DSparkConfig, bias: bool) -> None:
        super().__init__()
        extra = config.markov_rank if config.confidence_head_with_markov else 0
        self.proj = nn.Linear(config.hidden_size + extra, 1, bias=bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.proj(inputs).squeeze(-1)


def _initialize(module: nn.Module) -> None:
    """transformers' initialisation: normal with deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
