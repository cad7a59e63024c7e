"""Prefix caching: a prompt that begins like an earlier one takes over the pages of that beginning.

A full page is known by a digest of its tokens and of the page before it, and so of everything its
keys, values and context features depend on (``page_digest``). A match ends before the last token of
a sequence, because that one must run through the target for there to be logits. So what is computed
after a match always begins in a page of the sequence's own: pages that are shared, or may be, are
never written, and none is ever copied. Recomputing the up to ``page_size`` tokens of a whole match
takes part in a pass that is needed anyway; copying one page in every layer would be one more way
to write the cache.
"""

from __future__ import annotations

import time

from cluster.engine.load import PrefixCacheStats
from cluster.engine.pages import PagePool
from cluster.engine.sequence import Sequence
from cluster.routing.page_digests import page_digest
from cluster.routing.prefix_journal import PrefixJournal

_NO_PAGE = b""


class PrefixCache:
    """Finds computed pages for sequences that are about to start, and keeps those of all others.

    Guarantees: a page is found only with keys, values and context features of exactly the tokens
    that it is looked up for, at their positions, all of them committed; a sequence has at least one
    token left to compute; each page is digested once for a sequence, whatever it goes through.

    A page can be found from when the pass that fills it is scheduled: passes are computed in order,
    and within one each layer stores all tokens before any of them attends. So equal prompts that
    come together, as the choices of one request do, are computed once.

    Pages of a sequence that has outdated features are not kept; when all features become outdated
    at once, ``clear`` must be called.

    Args:
        pages: of the engine's cache.
        is_enabled: ``False`` finds and keeps nothing.

    Attributes:
        journal: what can be found, for those who want to know from elsewhere.
    """

    def __init__(self, pages: PagePool, is_enabled: bool) -> None:
        self._pages = pages
        self._is_enabled = is_enabled
        self.journal = PrefixJournal(pages.num_pages if is_enabled else 0, pages.page_size)
        pages.on_evict = self.journal.remove
        self._num_queried_tokens = 0
        self._num_hit_tokens = 0

    def stats(self) -> PrefixCacheStats:
        """Counts; a sequence counts once, however often it is preempted."""
        return PrefixCacheStats(
            num_queried_tokens=self._num_queried_tokens,
            num_hit_tokens=self._num_hit_tokens,
            num_cached_pages=self._pages.num_keyed,
            num_evicted_pages=self._pages.num_evictions,
        )

    def match(self, sequence: Sequence) -> list[int]:
        """The pages of the longest prefix that is there; nobody holds them by that yet.

        None, where log-probabilities of the prompt are wanted: they come with computing it.
        """
        found: list[int] = []
        if not self._is_enabled or sequence.wants_prompt_logprobs:
            return found
        for index in range((len(sequence.token_ids) - 1) // self._pages.page_size):
            page = self._pages.find(self._digest(sequence, index))
            if page is None:
                break
            found.append(page)
        return found

    def start(self, sequence: Sequence, found: list[int]) -> None:
        """Lets a sequence without pages start behind what ``match`` has just found for it."""
        for page in found:
            self._pages.hold(page)
        sequence.pages = found
        sequence.num_kept_pages = len(found)
        sequence.num_computed_tokens = len(found) * self._pages.page_size
        if sequence.num_cached_tokens is None:
            sequence.started_at = time.monotonic()
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self._num_queried_tokens += len(sequence.token_ids)
            self._num_hit_tokens += sequence.num_computed_tokens

    def keep(self, sequence: Sequence, num_tokens: int) -> None:
        """Lets others find the sequence's full pages among its first tokens.

        Args:
            num_tokens: committed tokens that have been computed, or will be by the pass that is
                being scheduled.
        """
        if not self._is_enabled or sequence.has_outdated_features:
            return
        num_full = num_tokens // self._pages.page_size
        for index in range(sequence.num_kept_pages, num_full):
            digest = self._digest(sequence, index)
            self._pages.set_key(sequence.pages[index], digest)
            self.journal.add(index, digest)
        sequence.num_kept_pages = num_full

    def clear(self) -> None:
        """Lets nothing be found that was computed until now."""
        self._pages.forget_keys()
        self.journal.clear()

    def _digest(self, sequence: Sequence, index: int) -> bytes:
        """Of the page at ``index``, at most one behind those that were asked for before."""
        digests = sequence.page_digests
        if index == len(digests):
            size = self._pages.page_size
            token_ids = sequence.token_ids[index * size : (index + 1) * size]
            digests.append(page_digest(digests[-1] if digests else _NO_PAGE, token_ids))
        return digests[index]
