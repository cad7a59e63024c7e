"""The KV cache's pages: who holds which, and which can be found again. No tensors here."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

from cluster.errors import ConfigError


class PagePool:
    """Hands out page numbers 1 .. num_pages-1 and counts each one's holders.

    Page 0 is never handed out: padding of block tables points at it, so that a padded read is
    always of valid memory.

    A page can be given a key under which it is found again (``find``), by others while it is held
    and after that too: it can be allocated like any free page then, but keeps key and content until
    no page without a key is left, and those that were given back longest ago go first. So keys are
    never more than pages, and cost no memory that is wanted for something else.

    Args:
        num_pages: page 0 included.
        page_size: tokens of a page.
        on_release: called with each page that its last holder gives back.

    Attributes:
        on_evict: called with each key that is taken from a page because the page is needed.

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
        self.num_evictions = 0
        self.on_evict: Callable[[bytes], None] | None = None
        self._on_release = on_release
        self._num_holders = [0] * num_pages
        self._free = list(range(num_pages - 1, 0, -1))  # without a key
        self._idle: OrderedDict[int, None] = OrderedDict()  # with a key; oldest first
        self._keys: dict[int, bytes] = {}
        self._by_key: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now: nobody holds them."""
        return len(self._free) + len(self._idle)

    @property
    def num_keyed(self) -> int:
        """Pages that can be found, held or not."""
        return len(self._keys)

    @property
    def usage(self) -> float:
        """Share of pages that are held, 0..1."""
        return 1.0 - self.num_free / self.num_pages

    def free_pages(self) -> list[int]:
        """The pages that nobody holds."""
        return [*self._free, *self._idle]

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
        """Extends ``pages`` in place, with pages of its own, until they hold ``num_tokens`` tokens.

        Returns:
            False, with nothing changed, when too few pages are free.
        """
        missing = self.pages_for(num_tokens) - len(pages)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            page = self._free.pop() if self._free else self._evict()
            self._num_holders[page] = 1
            pages.append(page)
        return True

    def shrink(self, pages: list[int], num_tokens: int) -> None:
        """Gives back, in place, the pages behind those that hold ``num_tokens`` tokens.

        The last goes first, so that a prefix outlives what only continues it.
        """
        keep = self.pages_for(num_tokens)
        while len(pages) > keep:
            page = pages.pop()
            if not self._num_holders[page]:
                raise RuntimeError(f"page {page} was freed twice")
            self._num_holders[page] -= 1
            if self._num_holders[page]:
                continue
            if page in self._keys:
                self._idle[page] = None
            else:
                self._free.append(page)
            if self._on_release is not None:
                self._on_release(page)

    def find(self, key: bytes) -> int | None:
        """The page that was given ``key`` and still has it; finding it does not hold it."""
        return self._by_key.get(key)

    def is_held(self, page: int) -> bool:
        """Whether somebody holds the page."""
        return self._num_holders[page] > 0

    def hold(self, page: int) -> None:
        """Makes the caller one more holder of a page that it has found."""
        if not self._num_holders[page]:
            del self._idle[page]
        self._num_holders[page] += 1

    def set_key(self, page: int, key: bytes) -> None:
        """Lets a held page be found from now on, unless another one already is under this key."""
        if key not in self._by_key:
            self._by_key[key] = page
            self._keys[page] = key

    def forget_keys(self) -> None:
        """Lets no page be found any more."""
        self._keys.clear()
        self._by_key.clear()
        self._free.extend(self._idle)
        self._idle.clear()

    def check(self, holders: list[list[int]]) -> None:
        """Verifies that every page is held exactly by whom it should be, else free.

        Args:
            holders: the pages of each holder, of all of them.

        Raises:
            RuntimeError: a page is leaked, held by too few or too many, or both free and held, or
                the keys do not belong to the pages that are found by them.
        """
        held = Counter(page for pages in holders for page in pages)
        for page, count in held.items():
            if self._num_holders[page] != count:
                raise RuntimeError(
                    f"page {page} has {count} holders, counted were {self._num_holders[page]}"
                )
        if sum(self._num_holders) != held.total():
            raise RuntimeError("a page that nobody holds is counted as held")
        places = [*self._free, *self._idle, *held]
        if len(set(places)) != len(places):
            raise RuntimeError("a page is both free and held, or free twice")
        if len(places) != self.num_pages:
            raise RuntimeError(f"{self.num_pages - len(places)} pages are neither free nor held")
        if {key: page for page, key in self._keys.items()} != self._by_key:
            raise RuntimeError("a key leads to another page than the one that has it")
        if not self._idle.keys() <= self._keys.keys() or not self._keys.keys().isdisjoint(
            self._free
        ):
            raise RuntimeError("a page without a key is kept, or one with a key is not")

    def _evict(self) -> int:
        """Takes the key of the page that was given back longest ago."""
        page, _ = self._idle.popitem(last=False)
        key = self._keys.pop(page)
        del self._by_key[key]
        self.num_evictions += 1
        if self.on_evict is not None:
            self.on_evict(key)
        return page
