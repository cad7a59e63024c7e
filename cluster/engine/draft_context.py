"""Paged memory for the keys and values that a block drafter makes of context features."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

# Never handed out: stands in page tables behind a session's last page, and padding reads it.
_PADDING_PAGE = 0


class DraftContext:
    """Keys and values of context positions, all layers of a page together.

    Guarantees: memory is allocated once, here; the padding page stays zero. Who owns which page
    is the engine's business.

    Args:
        num_pages: pages in all, the padding page included.
        page_size: positions a page holds.
        keys, values: examples ``[layers, N, heads, dim]`` of what will be stored.
    """

    def __init__(
        self, num_pages: int, page_size: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._keys, self._values = (
            example.new_zeros(len(example), num_pages * page_size, *example.shape[2:])
            for example in (keys, values)
        )

    def write(self, slots: npt.NDArray[np.int64], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores N positions.

        Args:
            slots: ``[N]``, page times page size plus the offset in the page; each once.
            keys, values: ``[layers, N, heads, dim]``.
        """
        index = torch.from_numpy(slots).to(self._keys.device, non_blocking=True)
        self._keys.index_copy_(1, index, keys)
        self._values.index_copy_(1, index, values)

    def layers(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Keys and values of each layer, ``[num_pages, page_size, heads, dim]``, as they lie."""
        shape = (self.num_pages, self.page_size)
        keys, values = (list(t.unflatten(1, shape)) for t in (self._keys, self._values))
        return keys, values

    def gather(
        self,
        page_table: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads B contexts, padded to the longest (at least one position).

        Args:
            page_table: ``[B, P]``, each row's pages in order, the padding page behind them; a
                row that holds more positions than its pages goes round in them.
            starts: ``[B]`` first positions.
            lengths: ``[B]`` positions to read from there.

        Returns:
            Keys and values ``[layers, B, L, heads, dim]``; zero behind a row's length.
        """
        longest = max(int(lengths.max(initial=0)), 1)
        columns = np.arange(longest)
        positions = starts[:, None] + columns
        rows = np.arange(len(lengths))[:, None]
        pages = positions // self.page_size % page_table.shape[1]
        slots = page_table[rows, pages] * self.page_size + positions % self.page_size
        # What an earlier owner left in the last page must not be read, not even to be masked.
        slots[columns >= lengths[:, None]] = _PADDING_PAGE * self.page_size
        index = torch.from_numpy(slots.ravel()).to(self._keys.device)
        shape = (len(lengths), longest)
        keys = self._keys.index_select(1, index).unflatten(1, shape)
        values = self._values.index_select(1, index).unflatten(1, shape)
        return keys, values
