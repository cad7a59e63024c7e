"""The caches of DeepSeek-V4, whose attention keeps more than keys and values by position.

A layer attends to a sliding window of keys and, in two of its three kinds, to entries that each
stand for a whole window of tokens (DeepSeek-V4, section 2.3). A window's entry exists once its last
token is there, so what a layer holds depends on how many tokens it has seen, and pages do not fit.
Instead every sequence has a transformers ``Cache`` of its own, whose layers keep what they need to
be cut back to the verified length: a rejected guess may have closed a window, and then the entry is
dropped and the window's tokens are gathered again.

Cost. Everything but attention runs over the tokens of all sequences at once, the experts above all;
attention runs sequence by sequence, each reading its attention weights again, and copies the
entries it attends to, which is linear in the context divided by the compress rate. Nothing is ever
computed twice, and guesses cost what they cost elsewhere. transformers' indexer scores all entries
for all queries and heads at once, so long contexts want small prompt chunks. A sequence holds its
entries, one window of keys, and the tokens since its last closed window; they go when its first
page is given back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from cluster.engine.step_input import StepInput

COMPRESSED_LAYER_TYPES = frozenset(
    {"sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"}
)


class WindowLayer(CacheLayerMixin):
    """Keys of the last tokens of one sequence; values are the same tensor.

    Attributes:
        keys: ``[1, 1, held, head_dim]``: those that the token after the last ``cut`` may see, and
            all since.
        length: tokens seen.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.length = 0
        self._cut_length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes room for no token, like the first ones that come."""
        self.keys = self.values = key_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends S tokens' keys; returns those that any of them may see, twice."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_new = key_states.shape[2]
        self.keys = self.values = torch.cat([self.keys, key_states], dim=2)
        self.length += num_new
        seen = self.keys[:, :, -(self.window - 1 + num_new) :]
        return seen, seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that ``update`` returns for so many tokens, and the position of the first."""
        num_keys = query_length
        if self.is_initialized:
            num_keys += min(self.keys.shape[2], self.window - 1)
        return num_keys, self.length + query_length - num_keys

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.length

    def get_max_length(self) -> int:
        """The window: no more keys are seen at once."""
        return self.window

    def stretched(self, length: int) -> WindowLayer:
        """A layer like this one, which has seen something, as after ``length`` tokens of zeros."""
        layer = WindowLayer(self.window)
        self._stretch_keys(layer, length)
        return layer

    def _stretch_keys(self, layer: WindowLayer, length: int) -> None:
        held = min(length, self.window - 1)
        layer.keys = layer.values = self.keys.new_zeros(1, 1, held, self.keys.shape[3])
        layer.length = layer._cut_length = length
        layer.is_initialized = True

    def cut(self, length: int) -> None:
        """Forgets the tokens from position ``length`` on, and keys that no later token sees.

        Args:
            length: at least that of the last cut.

        Raises:
            RuntimeError: what these tokens need is forgotten, or they never came.
        """
        if not self._cut_length <= length <= self.length:
            raise RuntimeError(
                f"cannot cut to {length} tokens: last cut to {self._cut_length}, seen {self.length}"
            )
        self._cut_length = length
        if not self.is_initialized:
            return
        end = self.keys.shape[2] - (self.length - length)
        # A copy: a view would keep the keys of a whole prompt chunk alive.
        self.keys = self.keys[:, :, max(0, end - (self.window - 1)) : end].clone()
        self.values = self.keys
        self.length = length


@dataclass
class _Stream:
    """What one compressor keeps of a sequence.

    Attributes:
        tokens: ``[2, 1, T, x]``, projected keys and gates of the tokens from ``start`` on.
        start: position of the first token kept, where a window begins.
        entries: ``[1, num_entries, head_dim]``, one for every closed window.
        overlaps: ``[2, 1, W, rate, head_dim]``, what the last W closed windows hand on to the next
            one (overlapping windows only).
    """

    tokens: torch.Tensor | None = None
    start: int = 0
    entries: torch.Tensor | None = None
    overlaps: torch.Tensor | None = None

    @property
    def num_entries(self) -> int:
        return 0 if self.entries is None else self.entries.shape[1]


class CompressedLayer(WindowLayer):
    """A window of keys, and the entries of one or two compressors.

    The three methods below are what transformers' compressors ask of their cache layer; unlike its
    own layers, this one keeps the tokens of windows that were closed since the last ``cut``.
    """

    def __init__(self, window: int, rate: int) -> None:
        super().__init__(window)
        self.rate = rate
        self._streams: dict[str, _Stream] = {}

    def store_compression_weights(
        self, name: str, kv: torch.Tensor, gate: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Appends tokens; returns those of windows that are now full, and their first position.

        Args:
            name: of the compressor.
            kv, gate: ``[1, S, x]``.
        """
        stream = self._streams.setdefault(name, _Stream())
        new = torch.stack([kv, gate])
        stream.tokens = new if stream.tokens is None else torch.cat([stream.tokens, new], dim=2)
        position = stream.num_entries * self.rate
        first = position - stream.start
        num_full = (stream.tokens.shape[2] - first) // self.rate
        full_kv, full_gate = stream.tokens[:, :, first : first + num_full * self.rate]
        return full_kv, full_gate, position

    def update_overlap_state(
        self, name: str, chunk_kv: torch.Tensor, chunk_gate: torch.Tensor, head_dim: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Appends what windows ``[1, n, rate, x]`` hand on; returns what the one before them did.

        Returns:
            keys and gates ``[1, rate, head_dim]``, or ``None`` twice before the first window.
        """
        stream = self._streams[name]
        new = torch.stack([chunk_kv[..., :head_dim], chunk_gate[..., :head_dim]])
        if stream.overlaps is None:
            stream.overlaps = new
            return None, None
        prior_kv, prior_gate = stream.overlaps[:, :, -1]
        stream.overlaps = torch.cat([stream.overlaps, new], dim=2)
        return prior_kv, prior_gate

    def update_compressor_states(self, name: str, compressed: torch.Tensor) -> torch.Tensor:
        """Appends entries ``[1, n, head_dim]``; returns all."""
        stream = self._streams[name]
        if stream.entries is None:
            stream.entries = compressed
        elif compressed.shape[1]:
            stream.entries = torch.cat([stream.entries, compressed], dim=1)
        return stream.entries

    def stretched(self, length: int) -> CompressedLayer:
        """A layer like this one, which has seen something, as after ``length`` tokens of zeros."""
        layer = CompressedLayer(self.window, self.rate)
        self._stretch_keys(layer, length)
        num_entries, num_open = divmod(length, self.rate)
        for name, stream in self._streams.items():
            if stream.tokens is None or stream.entries is None:
                continue
            width, dim = stream.tokens.shape[3], stream.entries.shape[2]
            layer._streams[name] = _Stream(
                tokens=stream.tokens.new_zeros(2, 1, num_open, width),
                start=num_entries * self.rate,
                entries=stream.entries.new_zeros(1, num_entries, dim),
            )
            if num_entries and width > dim:
                layer._streams[name].overlaps = stream.tokens.new_zeros(2, 1, 1, self.rate, dim)
        return layer

    def cut(self, length: int) -> None:
        """Forgets the tokens from position ``length`` on, and the entries they closed."""
        super().cut(length)
        num_entries = length // self.rate
        for stream in self._streams.values():
            if stream.tokens is None or stream.entries is None:
                continue
            if stream.overlaps is not None:
                # Only the last window that stays closed hands anything on.
                last = stream.overlaps.shape[2] - 1 - (stream.num_entries - num_entries)
                kept = stream.overlaps[:, :, last : last + 1].clone() if num_entries else None
                stream.overlaps = kept
            stream.entries = stream.entries[:, :num_entries]
            start = num_entries * self.rate
            stream.tokens = stream.tokens[
                :, :, start - stream.start : length - stream.start
            ].clone()
            stream.start = start


@dataclass(frozen=True)
class SequencePart:
    """One sequence's tokens in a pass: which they are, its cache, and what they see of its window.

    ``mask`` is ``[1, 1, S, keys]``, 0 or -inf.
    """

    rows: slice
    cache: Cache
    mask: torch.Tensor


class CompressedCaches:
    """The caches of all sequences of one shard, each known by the sequence's first page.

    A sequence that begins at position 0 gets a new cache. Page 0, which no sequence holds, is for
    trying things: what it holds is forgotten with every pass.

    Args:
        config: of the model.
        dtype: of activations.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self._config = config
        self._dtype = dtype
        self._caches: dict[int, Cache] = {}
        self._tried = self._new_cache()

    @property
    def keeps_pages(self) -> bool:
        """What is held of a token belongs to its sequence: no other one can use it."""
        return False

    @property
    def bytes_per_token(self) -> float:
        """What a token adds to a sequence's entries."""
        entries = sum(dim / rate for rate, dim, _ in self._compressors())
        return entries * self._dtype.itemsize

    @property
    def bytes_per_sequence(self) -> int:
        """What a sequence holds besides: windows of keys, and two windows of each compressor."""
        config = self._config
        keys = config.num_hidden_layers * (config.sliding_window - 1) * config.head_dim
        gathered = sum(2 * 2 * rate * width for rate, _, width in self._compressors())
        return (keys + gathered) * self._dtype.itemsize

    @property
    def num_sequences(self) -> int:
        """Sequences that hold something."""
        return len(self._caches)

    def serves(self, layer: int) -> bool:
        """Whether the layer has attended through the cache of page 0."""
        return self._tried.layers[layer].get_seq_length() > 0

    def begin(self, step: StepInput) -> None:
        """Cuts every sequence of a pass back to where the pass begins: rejected guesses go."""
        for page, start in zip(*_pages_and_starts(step), strict=True):
            if page == 0:
                continue
            if start == 0:
                self._caches[page] = self._new_cache()
            if page not in self._caches:
                raise RuntimeError(f"no sequence has its first page at {page}")
            for layer in self._caches[page].layers:
                layer.cut(start)

    def batch(self, step: StepInput, device: torch.device) -> list[SequencePart]:
        """What the layers need of one pass, or of a part of one."""
        parts = []
        row = 0
        for page, length in zip(step.block_tables[:, 0].tolist(), step.query_lens, strict=True):
            if page == 0:
                self._tried = self._new_cache()
            cache = self._caches[page] if page else self._tried
            mask = self._window_mask(cache, int(length), device)
            parts.append(SequencePart(slice(row, row + int(length)), cache, mask))
            row += int(length)
        return parts

    def pretend(self, page: int, num_tokens: int) -> None:
        """Lets a sequence that begins at ``page`` hold tokens that nobody computed (profiling)."""
        layers = [layer.stretched(num_tokens) for layer in self._tried.layers]
        self._caches[page] = Cache(layers=layers)

    def resize(self, num_pages: int) -> None:
        """Nothing to do: what sequences hold does not lie in pages."""

    def end(self) -> None:
        """Nothing to do behind a pass."""

    def release(self, page: int) -> None:
        """Forgets the sequence whose first page this was, if it was one's."""
        self._caches.pop(page, None)

    def _new_cache(self) -> Cache:
        config = self._config
        return Cache(
            layers=[
                CompressedLayer(config.sliding_window, config.compress_rates[layer_type])
                if layer_type in config.compress_rates
                else WindowLayer(config.sliding_window)
                for layer_type in config.layer_types
            ]
        )

    def _window_mask(self, cache: Cache, num_queries: int, device: torch.device) -> torch.Tensor:
        num_keys, _ = cache.layers[0].get_mask_sizes(num_queries)
        keys = torch.arange(num_keys, device=device) - (num_keys - num_queries)
        queries = torch.arange(num_queries, device=device).unsqueeze(1)
        hidden = (keys > queries) | (keys <= queries - self._config.sliding_window)
        mask = torch.zeros(num_queries, num_keys, dtype=self._dtype, device=device)
        return mask.masked_fill_(hidden, float("-inf"))[None, None]

    def _compressors(self) -> list[tuple[int, int, int]]:
        """Rate, size of an entry and of a projected token of every compressor of every layer."""
        config = self._config
        found = []
        for layer_type in config.layer_types:
            if layer_type == "heavily_compressed_attention":
                found.append((config.compress_rates[layer_type], config.head_dim, config.head_dim))
            elif layer_type == "compressed_sparse_attention":
                for dim in (config.head_dim, config.index_head_dim):  # entries, and their index
                    found.append((config.compress_rates[layer_type], dim, 2 * dim))
        return found


def _pages_and_starts(step: StepInput) -> tuple[list[int], list[int]]:
    """First page of each sequence, and tokens that it has before this pass."""
    return step.block_tables[:, 0].tolist(), (step.context_lens - step.query_lens).tolist()
