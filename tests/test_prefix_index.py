"""What replicas tell of their prefix caches, and what routers find in it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.engine.pages import PagePool
from cluster.engine.prefix_cache import PrefixCache
from cluster.engine.sequence import Sequence
from cluster.request import Request
from cluster.routing import prefix_journal
from cluster.routing.page_digests import PrefixLayout, page_digest, page_key, prefix_keys
from cluster.routing.prefix_index import PrefixIndex
from cluster.routing.prefix_journal import PrefixChanges, PrefixJournal


def digest(number: int) -> bytes:
    return page_digest(b"", [number])


def follow(held: set[int], changes: PrefixChanges) -> set[int]:
    assert not set(changes.added) & set(changes.removed)
    assert len(changes.added) <= prefix_journal.MAX_REPORTED_PAGES
    kept = set() if changes.is_full else held - set(changes.removed)
    return kept | set(changes.added)


@given(
    steps=st.lists(st.tuples(st.sampled_from("aaarrc?"), st.integers(0, 12)), max_size=80),
    bound=st.integers(1, 8),
)
def test_who_applies_the_changes_holds_what_is_there(
    steps: list[tuple[str, int]], bound: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_journal, "MAX_REPORTED_PAGES", bound)
        journal = PrefixJournal(num_pages=bound, page_size=4)
        there: dict[int, None] = {}
        held: set[int] = set()
        version = -1
        for action, number in steps:
            key = page_key(digest(number))
            if action == "a":
                journal.add(0, digest(number))
                if len(there) < bound:
                    there[key] = None
            elif action == "r":
                journal.remove(digest(number))
                there.pop(key, None)
            elif action == "c":
                journal.clear()
                there.clear()
            else:
                changes = journal.changes(version)
                version = changes.version
                held = follow(held, changes)
                assert held == set(there)
                assert journal.changes(version) == PrefixChanges(version)
        assert follow(set(), journal.changes(-1)) == set(there)
        assert follow(held, journal.changes(version)) == set(there)


def test_a_large_cache_reports_some_pages_of_each_prefix() -> None:
    journal = PrefixJournal(num_pages=3 * prefix_journal.MAX_REPORTED_PAGES, page_size=16)
    assert journal.layout == PrefixLayout(16, 3)
    for index in range(9):
        journal.add(index, digest(index))
    assert journal.changes(-1).added == tuple(page_key(digest(index)) for index in (2, 5, 8))
    nothing = PrefixJournal(num_pages=0, page_size=16)
    nothing.add(0, digest(0))
    assert nothing.layout is None
    assert nothing.changes(-1).added == ()


@given(data=st.data())
def test_an_index_finds_how_far_each_replica_has_a_prompt(data: st.DataObject) -> None:
    """Caches let go of the ends of prefixes first, so each has a beginning of each prompt."""
    prompts = [[7] * 8 + [number] * 32 for number in range(3)]  # that begin alike
    layout = PrefixLayout(4, 1)
    keys = [prefix_keys(prompt, layout) for prompt in prompts]
    index = PrefixIndex()
    lengths = np.zeros((40, 3), dtype=int)
    for slot in data.draw(st.lists(st.integers(0, 39), unique=True, max_size=12)):
        lengths[slot] = [data.draw(st.integers(0, len(keys[0]))) for _ in prompts]
        pages = {key for p, n in enumerate(lengths[slot]) for key in keys[p][:n]}
        expected = data.draw(st.sets(st.sampled_from(sorted(pages)))) if pages else set()
        index.apply(slot, PrefixChanges(1, True, tuple(pages - expected)))
        index.expect(slot, expected)
        if data.draw(st.booleans()):
            index.drop(slot)
            index.expect_no_more(slot, expected)
            lengths[slot] = 0
    shared = np.minimum(lengths.max(axis=1), 2)  # pages of the beginning that all have
    for number, prompt_keys in enumerate(keys):
        cached = np.zeros(40, dtype=np.int64)
        index.match(prompt_keys, 4, cached)
        want = np.maximum(lengths[:, number], shared)
        assert cached.tolist() == (want * 4).tolist()
        assert [index.match_one(slot, prompt_keys) for slot in range(40)] == want.tolist()
    for slot in range(40):
        index.apply(slot, PrefixChanges(1, True))
    assert index.num_keys == 0


def test_what_is_expected_twice_is_expected_until_both_are_settled() -> None:
    index = PrefixIndex()
    for slot in (3, 3, 5):
        index.expect(slot, [1, 2])
    index.expect_no_more(3, [1, 2])
    assert index.match_one(3, [1, 2]) == 2
    index.expect_no_more(3, [1, 2])
    assert index.match_one(3, [1, 2]) == 0
    assert index.match_one(5, [1, 2]) == 2


def test_the_journal_follows_the_cache_through_evictions() -> None:
    pages = PagePool(num_pages=9, page_size=4)
    cache = PrefixCache(pages, is_enabled=True)
    index = PrefixIndex()
    version = -1
    for number in range(12):
        request = Request(request_id="r", prompt_token_ids=tuple(range(number, number + 14)))
        sequence = Sequence.of(request, max_model_len=100, tokenizer=None)
        cache.start(sequence, cache.match(sequence))
        assert pages.grow(sequence.pages, 14)
        cache.keep(sequence, 14)
        pages.shrink(sequence.pages, 0)
        changes = cache.journal.changes(version)
        version = changes.version
        index.apply(0, changes)
        assert index.num_keys == pages.num_keyed
        for first in range(number + 1):
            again = Request(request_id="s", prompt_token_ids=tuple(range(first, first + 14)))
            other = Sequence.of(again, max_model_len=100, tokenizer=None)
            keys = prefix_keys(again.prompt_token_ids, PrefixLayout(4, 1))
            assert index.match_one(0, keys) == len(cache.match(other))
    assert pages.num_evictions > 0
    cache.clear()
    index.apply(0, cache.journal.changes(version))
    assert index.num_keys == 0
