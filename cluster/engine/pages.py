"""The KV cache's pages: who holds which, and how many are free. No tensors here."""

from __future__ import annotations

from collections.abc import Callable

from cluster.errors import ConfigError


class PagePool:
    """Hands out page numbers 0 .. num_pages-1, each to one holder at a time.

    Page 0 is never handed out: padding of block tables points at it, so that a padded read is
    always of valid memory.

    Args:
        num_pages: page 0 included.
        page_size: tokens of a page.
        on_release: called with each page that is given back.

    Raises:
        ConfigError: there is no page but page 0.
    """

    def __init__(
        self, num_pages: int, page_size: int, on_release: Callable[[int], None] | None = None
    ) -> None:
        if num_pages < 2:
            raise ConfigError("target.num_pages", f"must be at least 2, got {num_pages}")
        self.page_size = page_size
        self.num_pages = num_pages - 1
        self._on_release = on_release
        self._free = list(range(num_pages - 1, 0, -1))
        self._is_free = bytearray(b"\x00" + b"\x01" * (num_pages - 1))

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of pages in use, 0..1."""
        return 1.0 - len(self._free) / self.num_pages

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def check_holds(self, max_model_len: int) -> None:
        """Checks that all pages together hold a context of ``max_model_len`` tokens.

        Raises:
            ConfigError: they do not.
        """
        if self.num_pages * self.page_size < max_model_len:
            raise ConfigError(
                "target.num_pages",
                f"{self.num_pages} usable pages of {self.page_size} tokens cannot hold one "
                f"context of {max_model_len}; raise kv_cache_memory_mb or lower max_model_len",
            )

    def grow(self, pages: list[int], num_tokens: int) -> bool:
        """Extends ``pages`` in place until they hold ``num_tokens`` tokens.

        Returns:
            False, with nothing changed, when too few pages are free.
        """
        missing = self.pages_for(num_tokens) - len(pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            page = self._free.pop()
            self._is_free[page] = 0
            pages.append(page)
        return True

    def shrink(self, pages: list[int], num_tokens: int) -> None:
        """Gives back, in place, the pages behind those that hold ``num_tokens`` tokens."""
        keep = self.pages_for(num_tokens)
        while len(pages) > keep:
            page = pages.pop()
            if self._is_free[page]:
                raise RuntimeError(f"page {page} was freed twice")
            self._is_free[page] = 1
            self._free.append(page)
            if self._on_release is not None:
                self._on_release(page)

    def check(self, holders: list[list[int]]) -> None:
        """Verifies that every page is either free or held once, given all holders' lists.

        Raises:
            RuntimeError: a page is leaked, shared or both free and held.
        """
        held = [page for pages in holders for page in pages]
        if len(held) != len(set(held)):
            raise RuntimeError("a page is held twice")
        if any(self._is_free[page] for page in held):
            raise RuntimeError("a held page is marked free")
        if len(held) + len(self._free) != self.num_pages:
            raise RuntimeError(
                f"{self.num_pages - len(held) - len(self._free)} pages are neither free nor held"
            )
