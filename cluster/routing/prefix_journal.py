"""What a replica's prefix cache can find, told in changes to whoever follows it."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from cluster.routing.page_digests import PrefixLayout, page_key

MAX_REPORTED_PAGES = 8192


@dataclass(frozen=True)
class PrefixChanges:
    """What changed since a version, or all there is.

    Attributes:
        version: to ask for what comes behind these.
        is_full: ``added`` is everything, whatever was there before.
        added, removed: keys (``page_key``), no key in both, none twice.
    """

    version: int
    is_full: bool = False
    added: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()


class PrefixJournal:
    """Follows a cache's pages; thread-safe.

    Guarantees: whoever applies ``changes`` one behind the other, each from the version of the one
    before, holds exactly the pages that are reported now. There are never more than
    ``MAX_REPORTED_PAGES`` of them, and no answer is longer; pages that come beyond that are not
    reported, ever.

    Args:
        num_pages: of the cache; 0: nothing is cached, and nothing reported.
        page_size: tokens of a page.

    Attributes:
        layout: which pages are reported: so few of each prefix that what is reported spans the
            cache. ``None``: none.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        stride = -(-num_pages // MAX_REPORTED_PAGES)
        self.layout = PrefixLayout(page_size, stride) if stride else None
        self._pages: dict[int, None] = {}
        self._entries: deque[tuple[int, bool]] = deque()  # key, and whether it came or went
        self._first_version = 0  # that of the first entry
        self._lock = threading.Lock()

    def add(self, index: int, digest: bytes) -> None:
        """The page that ends the prefix of ``index`` + 1 pages can be found from now on."""
        if self.layout is None or (index + 1) % self.layout.stride:
            return
        key = page_key(digest)
        with self._lock:
            if len(self._pages) < MAX_REPORTED_PAGES and key not in self._pages:
                self._pages[key] = None
                self._note(key, True)

    def remove(self, digest: bytes) -> None:
        """The page with this digest can be found no more."""
        key = page_key(digest)
        with self._lock:
            if key in self._pages:
                del self._pages[key]
                self._note(key, False)

    def clear(self) -> None:
        """No page can be found any more."""
        with self._lock:
            self._pages.clear()
            self._first_version += len(self._entries) + 1  # nobody knows a version from before
            self._entries.clear()

    def changes(self, since: int) -> PrefixChanges:
        """What changed behind version ``since``; -1 knows nothing, and is told everything."""
        with self._lock:
            version = self._first_version + len(self._entries)
            skip = since - self._first_version
            if skip < 0 or len(self._entries) - skip > len(self._pages):
                return PrefixChanges(version, True, tuple(self._pages))
            last: dict[int, bool] = {}
            for entry in range(skip, len(self._entries)):
                key, is_there = self._entries[entry]
                last[key] = is_there
            added = tuple(key for key, is_there in last.items() if is_there)
            removed = tuple(key for key, is_there in last.items() if not is_there)
        return PrefixChanges(version, False, added, removed)

    def _note(self, key: int, is_there: bool) -> None:
        self._entries.append((key, is_there))
        if len(self._entries) > MAX_REPORTED_PAGES:
            self._entries.popleft()
            self._first_version += 1
