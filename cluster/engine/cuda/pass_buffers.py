"""What kernels need to know of a pass, at places in device memory that never change."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from cluster.engine.step_input import StepInput

TILE_TOKENS = 8  # a decoding sequence and seven guesses are one tile
_NUM_STAGED = 4


class PassBuffers:
    """The integers of one pass after the other, all copied to the device in one go.

    Whatever was launched or captured on these tensors sees the pass that was loaded last before it
    runs. What a pass does not fill stays as it was, but for the tokens up to the size that it is
    padded to: those have position 0, slot 0 (of the page that nobody holds), and no tile.

    Args:
        max_tokens: of a pass.
        max_sequences: of a pass.
        max_pages: of a sequence.
        device: where the tensors lie.

    Attributes:
        token_ids, positions, slots: ``[max_tokens]`` int32.
        tiles: ``[num_tiles, 3]`` int32: first token, number of tokens (0: none), sequence.
        context_lens: ``[max_sequences]`` int32, of the cached tokens after the pass.
        block_tables: ``[max_sequences, max_pages]`` int32.
        num_tokens: ``[1]`` int32, padding not counted.
    """

    tile_tokens = TILE_TOKENS

    def __init__(
        self, max_tokens: int, max_sequences: int, max_pages: int, device: torch.device
    ) -> None:
        self.max_tokens, self.max_sequences = max_tokens, max_sequences
        self._max_pages = max_pages
        sizes = [
            *(max_tokens,) * 3,
            self.num_tiles(max_tokens) * 3,
            max_sequences,
            max_sequences * max_pages,
            1,
        ]
        self._bounds = np.cumsum([0, *sizes]).tolist()
        on_device = torch.zeros(self._bounds[-1], dtype=torch.int32, device=device)
        self._on_device = on_device
        parts = torch.split(on_device, sizes)
        self.token_ids, self.positions, self.slots = parts[:3]
        self.tiles = parts[3].view(-1, 3)
        self.context_lens = parts[4]
        self.block_tables = parts[5].view(max_sequences, max_pages)
        self.num_tokens = parts[6]
        # The device reads a copy later than it is written here: the next pass gets another one.
        pinned = device.type == "cuda"
        self._staged = [
            torch.zeros(self._bounds[-1], dtype=torch.int32, pin_memory=pinned)
            for _ in range(_NUM_STAGED)
        ]
        self._copied = [torch.cuda.Event() if pinned else None for _ in range(_NUM_STAGED)]
        self._next = 0

    def num_tiles(self, num_tokens: int) -> int:
        """Most tiles that so many tokens can make."""
        return min(num_tokens, num_tokens // TILE_TOKENS + self.max_sequences)

    def load(self, step: StepInput, num_tokens: int | None = None) -> None:
        """Makes ``step`` the pass that kernels see.

        Args:
            step: no larger than the buffers.
            num_tokens: that it is padded to; unset: its own.
        """
        index = self._next
        self._next = (index + 1) % _NUM_STAGED
        event = self._copied[index]
        if event is not None:
            event.synchronize()
        staged = self._staged[index]
        self._fill(staged.numpy(), step, num_tokens or step.num_tokens)
        self._on_device.copy_(staged, non_blocking=True)
        if event is not None:
            event.record()

    def _fill(self, flat: np.ndarray, step: StepInput, padded: int) -> None:
        count, bounds = step.num_tokens, self._bounds
        token_ids, positions, slots, tiles, context_lens, tables, num_tokens = (
            flat[start:end] for start, end in pairwise(bounds)
        )
        for values, own in (
            (token_ids, step.token_ids),
            (positions, step.positions),
            (slots, step.slots),
        ):
            values[:count] = own
            values[count:padded] = 0
        _fill_tiles(tiles.reshape(-1, 3), step.query_lens)
        num_sequences, num_pages = step.block_tables.shape
        context_lens[:num_sequences] = step.context_lens
        shape = (self.max_sequences, self._max_pages)
        tables.reshape(shape)[:num_sequences, :num_pages] = step.block_tables
        num_tokens[0] = count


def _fill_tiles(tiles: np.ndarray, query_lens: np.ndarray) -> None:
    counts = -(-query_lens // TILE_TOKENS)
    owner = np.repeat(np.arange(len(query_lens)), counts)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.cumsum(query_lens) - query_lens
    offset = place * TILE_TOKENS
    filled = tiles[: len(owner)]
    filled[:, 0] = starts[owner] + offset
    filled[:, 1] = np.minimum(query_lens[owner] - offset, TILE_TOKENS)
    filled[:, 2] = owner
    tiles[len(owner) :] = 0
