"""Attention over the paged KV cache, plugged into transformers' ``AttentionInterface``.

The model's own forward calls ``paged_attention`` once per layer with the flattened tokens of all
requests. Sequences with few query tokens (decoding, verification) are attended in one padded batch;
longer ones (prompt chunks) each on their own, so that padding never multiplies prompt work.

What a layer asks of attention beyond causality, a scale and a sliding window is refused, never left
out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cluster.engine.cuda.pass_buffers import PassBuffers
from cluster.engine.graph import EXAMPLE_TOKENS
from cluster.engine.in_place import InPlaceLayers, attend_in_place, begin_pass, end_pass
from cluster.engine.step_input import StepInput
from cluster.errors import ConfigError

ATTENTION_NAME = "dspark_paged"
MAX_SHORT_QUERY = 16
# Arguments of transformers' attention functions that change what comes out.
_ABSENT = {
    "s_aux": "attention sinks",
    "softcap": "a soft cap on scores",
    "indices": "a choice of keys",
    "position_bias": "a bias by position",
}


class KVCache:
    """Keys and values of this shard's layers, ``[num_pages, page_size, kv_heads, head_dim]`` each.

    Heads and their sizes may differ from layer to layer, and between a layer's keys and values. A
    layer's room is made when it first stores something, as only then its shape is known for any
    model; the profile that runs at start-up does that.

    Args:
        num_pages: page 0 included, which no sequence holds.
        page_size: tokens of a page.
        sources: layers that read another layer's keys and values instead of their own.
        in_place: whether pages are attended where they lie, by kernels of our own.
        buffers: with ``in_place`` on a CUDA device: what passes are loaded into.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        sources: Mapping[int, int] | None = None,
        *,
        in_place: bool = False,
        buffers: PassBuffers | None = None,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._in_place = in_place
        self.buffers = buffers
        self._sources = dict(sources or {})
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def keeps_pages(self) -> bool:
        """All that is held of a token lies in its page, so that another sequence can use it."""
        return True

    @property
    def bytes_per_token(self) -> int:
        """What a token takes, by the layers that have stored something."""
        tensors = [tensor for pair in self._layers.values() for tensor in pair]
        return sum(t.element_size() * t[0, 0].numel() for t in tensors)

    @property
    def bytes_per_sequence(self) -> int:
        """What a sequence takes besides its tokens: nothing."""
        return 0

    def serves(self, layer: int) -> bool:
        """Whether the layer has attended through this cache."""
        return self._sources.get(layer, layer) in self._layers

    def begin(self, step: StepInput) -> None:
        """Nothing to prepare: what a pass finds in its slots, rejected tokens', is overwritten."""

    def pretend(self, page: int, num_tokens: int) -> None:
        """Nothing to do: whatever lies in pages can be attended to."""

    def resize(self, num_pages: int) -> None:
        """Room for so many pages, and nothing in them."""
        self.num_pages = num_pages
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = (self._room(keys[0]), self._room(values[0]))

    def release(self, page: int) -> None:
        """Nothing to free: the next holder of the page overwrites it."""

    def batch(
        self, step: StepInput, device: torch.device, padded: int | None = None
    ) -> PagedBatch | InPlaceLayers:
        """What the layers need of the pass that comes next in this thread, up to ``end``.

        Args:
            padded: tokens that it is computed as; unset: its own.
        """
        # The first pass of all finds no layer's room yet: it makes them.
        if not (self._in_place and self._layers):
            return PagedBatch.build(step, self, device)
        keys, values = zip(*self._layers.values(), strict=True)
        begin_pass(step, keys, values, self.buffers, padded)
        return self.in_place_layers

    @cached_property
    def in_place_layers(self) -> InPlaceLayers:
        """The layers, which have all stored something, for passes that attend in place."""
        index = {layer: index for index, layer in enumerate(self._layers)}
        readers = {layer: source for layer, source in self._sources.items() if source in index}
        index |= {layer: index[source] for layer, source in readers.items()}
        return InPlaceLayers(index, frozenset(readers), on_cuda=self.buffers is not None)

    def end(self) -> None:
        """Ends the pass of this thread that ``batch`` was called for."""
        if self._in_place:
            end_pass(self.buffers)

    @contextmanager
    def rehearsal(self, device: torch.device) -> Iterator[None]:
        """Whatever this thread runs inside is a pass of nobody's ``EXAMPLE_TOKENS`` tokens.

        It may be called while another thread runs passes.
        """
        if self.buffers is None:
            yield
            return
        keys, values = zip(*self._layers.values(), strict=True)
        buffers = PassBuffers(EXAMPLE_TOKENS, 1, 1, device)
        begin_pass(StepInput.idle(EXAMPLE_TOKENS), keys, values, buffers)
        try:
            yield
        finally:
            end_pass(buffers)

    def store(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes tokens' keys and values to their slots; of a layer that reads another one's keys
        they are there already.

        Args:
            key: ``[N, kv_heads, head_dim]``; ``value``: ``[N, kv_heads, value_dim]``.
            slots: ``[N]`` int64, page * page_size + offset.

        Returns:
            The layer's whole keys and values.
        """
        if layer in self._sources:
            return self._layers[self._sources[layer]]
        if layer not in self._layers:
            self._layers[layer] = (self._room(key), self._room(value))
        keys, values = self._layers[layer]
        keys.flatten(0, 1).index_copy_(0, slots, key)
        values.flatten(0, 1).index_copy_(0, slots, value)
        return keys, values

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's whole keys and values, which it has stored already."""
        return self._layers[layer]

    def _room(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(self.num_pages, self.page_size, *like.shape[1:])


@dataclass
class _Group:
    """Sequences that are attended together.

    Attributes:
        token_index: ``[T]`` flat tokens of the group.
        padded_index: ``[T]`` where each lies in the padded ``[B * Q]`` layout.
        gather_index: ``[B * Q]`` flat token of each padded place (padding repeats token 0).
        block_table: ``[B, P]``.
        query_positions: ``[B, Q]`` place of each query in its sequence.
        key_length: keys used of each row, or ``None`` for all P * page_size with a mask.
    """

    batch_size: int
    query_length: int
    token_index: torch.Tensor
    padded_index: torch.Tensor
    gather_index: torch.Tensor
    block_table: torch.Tensor
    query_positions: torch.Tensor
    key_length: int | None
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)


@dataclass
class PagedBatch:
    """What ``paged_attention`` needs of one pass; built once, used by every layer."""

    cache: KVCache
    slots: torch.Tensor
    groups: list[_Group]

    @classmethod
    def build(cls, step: StepInput, cache: KVCache, device: torch.device) -> PagedBatch:
        """Groups the sequences of ``step``; index tensors are ``int64`` on ``device``."""
        starts = np.cumsum(step.query_lens) - step.query_lens
        short = np.flatnonzero(step.query_lens <= MAX_SHORT_QUERY)
        long = np.flatnonzero(step.query_lens > MAX_SHORT_QUERY)
        groups = []
        if len(short):
            groups.append(_make_group(step, starts, short, cache.page_size, device))
        for sequence in long:
            groups.append(
                _make_group(step, starts, np.asarray([sequence]), cache.page_size, device)
            )
        slots = torch.as_tensor(step.slots, device=device)
        return cls(cache=cache, slots=slots, groups=groups)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    paged: PagedBatch | InPlaceLayers,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Stores this pass's keys and values, then attends every query to its own sequence's cache.

    Args:
        query: ``[1, heads, N, head_dim]``; ``key``: ``[1, kv_heads, N, head_dim]``; ``value``:
            ``[1, kv_heads, N, value_dim]``.
        attention_mask: must be unset; causality follows from positions.
        scaling: of the scores; ``sliding_window``: keys further back are not seen.
        paged: this pass's layout.
        others: what else a layer hands over.

    Returns:
        ``[1, N, heads, value_dim]`` and ``None`` (no weights).

    Raises:
        ConfigError: the layer asks for something that is not here.
    """
    refuse_absent(module, attention_mask, others)
    layer = cast(int, module.layer_idx)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if isinstance(paged, InPlaceLayers):
        output = attend_in_place(layer, query, key, value, paged, scaling, sliding_window)
    else:
        keys, values = paged.cache.store(layer, key, value, paged.slots)
        output = attend(query, keys, values, paged, scaling, sliding_window)
    return output.unsqueeze(0), None


def refuse_absent(
    module: nn.Module, attention_mask: torch.Tensor | None, others: Mapping[str, Any]
) -> None:
    """Refuses a layer that asks for something that would be left out.

    Raises:
        ConfigError: names the layer's class and what it needs.
    """
    asked = [what for name, what in _ABSENT.items() if others.get(name) is not None]
    if attention_mask is not None:
        asked.append("a mask of its own")
    if not getattr(module, "is_causal", True):
        asked.append("later tokens")
    if asked:
        raise ConfigError(
            "target.model",
            f"{type(module).__name__} cannot be served: its attention needs {', '.join(asked)}",
        )


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    paged: PagedBatch,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attends every query to what its own sequence has in the cache.

    Args:
        query: ``[N, heads, head_dim]``.
        keys, values: of a layer, ``[num_pages, page_size, kv_heads, x]``.

    Returns:
        ``[N, heads, value_dim]``.
    """
    output = query.new_empty(*query.shape[:2], values.shape[3])
    for group in paged.groups:
        pages = group.block_table.reshape(-1)
        length = group.key_length or group.block_table.shape[1] * paged.cache.page_size
        group_keys = _gathered(keys, pages, group.batch_size)[:, :length]
        group_values = _gathered(values, pages, group.batch_size)[:, :length]
        queries = query.index_select(0, group.gather_index)
        queries = queries.view(group.batch_size, group.query_length, *query.shape[1:])
        attended = scaled_dot_product_attention(
            queries.transpose(1, 2),
            group_keys.transpose(1, 2),
            group_values.transpose(1, 2),
            attn_mask=_mask(group, length, sliding_window),
            scale=scaling,
            enable_gqa=query.shape[1] != keys.shape[2],
        )
        flat = attended.transpose(1, 2).reshape(-1, *attended.shape[1::2])
        output.index_copy_(0, group.token_index, flat.index_select(0, group.padded_index))
    return output


def _gathered(cached: torch.Tensor, pages: torch.Tensor, batch_size: int) -> torch.Tensor:
    """``[B, P * page_size, kv_heads, head_dim]`` of the given pages, ``[B * P]``."""
    return cached.index_select(0, pages).view(batch_size, -1, *cached.shape[2:])


def _make_group(
    step: StepInput,
    starts: np.ndarray,
    sequences: np.ndarray,
    page_size: int,
    device: torch.device,
) -> _Group:
    query_lens = step.query_lens[sequences]
    context_lens = step.context_lens[sequences]
    batch_size, query_length = len(sequences), int(query_lens.max())
    offsets = np.arange(query_length)
    real = offsets[None, :] < query_lens[:, None]
    tokens = np.where(real, starts[sequences][:, None] + offsets[None, :], 0)
    positions = (context_lens - query_lens)[:, None] + offsets[None, :]
    # A single query of a single sequence sees exactly its context: no mask, and so the same
    # arithmetic as the model's own incremental decoding (deterministic mode rests on it).
    exact = int(context_lens[0]) if batch_size == 1 else None
    num_pages = -(-int(context_lens.max()) // page_size)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.ascontiguousarray(array), device=device)

    return _Group(
        batch_size=batch_size,
        query_length=query_length,
        token_index=tensor(tokens[real]),
        padded_index=tensor(np.flatnonzero(real.reshape(-1))),
        gather_index=tensor(tokens.reshape(-1)),
        block_table=tensor(step.block_tables[sequences][:, :num_pages]),
        query_positions=tensor(positions),
        key_length=exact,
    )


def _mask(group: _Group, length: int, window: int | None) -> torch.Tensor | None:
    """``[B, 1, Q, length]`` bool, True where a query may look; ``None`` when it sees everything."""
    if window not in group.masks:
        one_query = group.batch_size == 1 and group.query_length == 1
        if one_query and (window is None or length <= window):
            group.masks[window] = None
        else:
            keys = torch.arange(length, device=group.query_positions.device)
            positions = group.query_positions.unsqueeze(-1)
            visible = keys <= positions
            if window is not None:
                visible &= keys > positions - window
            group.masks[window] = visible.unsqueeze(1)
    return group.masks[window]


AttentionInterface.register(ATTENTION_NAME, paged_attention)
