"""The drafter's paged memory for context keys and values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

# Never handed out: stands in block tables behind a session's last page, and padding reads it.
PADDING_PAGE = 0


class DraftPages:
    """A pool of equal pages of context keys and values, all layers of a page together.

    Guarantees: a page has at most one owner; the padding page has none and stays zero; memory is
    allocated once, here. Who owns which page is the sessions' business.

    Args:
        num_pages: pages in all, the padding page included; at least 2.
        page_size: positions a page holds.
        num_layers, num_kv_heads, head_dim: shape of one position's keys.
        dtype, device: of keys and values.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages must be 2 or more, got {num_pages}")
        self.num_pages = num_pages
        self.page_size = page_size
        shape = (num_layers, num_pages * page_size, num_kv_heads, head_dim)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._free = list(range(num_pages - 1, PADDING_PAGE, -1))

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    def pages_for(self, length: int) -> int:
        """Pages that ``length`` positions fill."""
        return -(-length // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` pages, of which the caller knows that they are free."""
        if count > len(self._free):
            raise RuntimeError(f"{count} draft pages asked for, {len(self._free)} are free")
        return [self._free.pop() for _ in range(count)]

    def release(self, pages: list[int]) -> None:
        """Gives pages back. Their contents are left: what is read is bounded by lengths."""
        self._free.extend(pages)

    def write(self, slots: npt.NDArray[np.int64], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores N positions.

        Args:
            slots: ``[N]``, page times page size plus the offset in the page.
            keys, values: ``[layers, N, kv heads, dim]``.
        """
        index = torch.from_numpy(slots).to(self._keys.device)
        self._keys.index_copy_(1, index, keys.to(self._keys.dtype))
        self._values.index_copy_(1, index, values.to(self._values.dtype))

    def gather(
        self, block_tables: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads B contexts, padded to the longest (at least one position).

        Args:
            block_tables: ``[B, P]``, each row's pages in order, the padding page behind them.
            lengths: ``[B]`` positions to read.

        Returns:
            Keys and values ``[layers, B, L, kv heads, dim]``; zero behind a row's length.
        """
        longest = max(int(lengths.max(initial=0)), 1)
        positions = np.arange(longest)
        slots = block_tables[:, positions // self.page_size] * self.page_size
        slots += positions % self.page_size
        # What an earlier owner left in the last page must not be read, not even to be masked.
        slots[positions >= lengths[:, None]] = PADDING_PAGE * self.page_size
        index = torch.from_numpy(slots.ravel()).to(self._keys.device)
        shape = (len(lengths), longest)
        keys = self._keys.index_select(1, index).unflatten(1, shape)
        values = self._values.index_select(1, index).unflatten(1, shape)
        return keys, values

    def check_integrity(self, owned: list[int]) -> None:
        """Checks that free pages and ``owned`` ones are all pages, each once.

        Raises:
            RuntimeError: a page leaked or has two owners.
        """
        seen = sorted([*self._free, *owned])
        expected = [page for page in range(self.num_pages) if page != PADDING_PAGE]
        if seen != expected:
            raise RuntimeError(
                f"draft pages: {len(self._free)} free and {len(owned)} owned of {len(expected)}"
            )
