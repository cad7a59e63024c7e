"""Which pages a sequence finds, and what finding and keeping them costs."""

from __future__ import annotations

import pytest

from cluster.engine import prefix_cache
from cluster.engine.load import PrefixCacheStats
from cluster.engine.pages import PagePool
from cluster.engine.prefix_cache import PrefixCache, page_digest
from cluster.engine.sequence import Sequence
from cluster.request import Request

PAGE_SIZE = 4


@pytest.fixture
def pages() -> PagePool:
    return PagePool(num_pages=33, page_size=PAGE_SIZE)


@pytest.fixture
def prefixes(pages: PagePool) -> PrefixCache:
    return PrefixCache(pages, is_enabled=True)


def waiting(*token_ids: int) -> Sequence:
    request = Request(request_id="r", prompt_token_ids=token_ids)
    return Sequence.of(request, max_model_len=100, tokenizer=None)


def compute(sequence: Sequence, num_tokens: int, pages: PagePool, prefixes: PrefixCache) -> None:
    """What a pass over so many of its tokens does to it."""
    end = sequence.num_computed_tokens + num_tokens
    assert pages.grow(sequence.pages, end)
    sequence.num_computed_tokens = end
    prefixes.keep(sequence, end)


def computed(token_ids: range, pages: PagePool, prefixes: PrefixCache) -> Sequence:
    sequence = waiting(*token_ids)
    prefixes.start(sequence, prefixes.match(sequence))
    compute(sequence, sequence.num_missing_tokens, pages, prefixes)
    return sequence


@pytest.mark.parametrize(("length", "num_found"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (30, 3)])
def test_whole_pages_are_found_and_a_token_is_left(
    length: int, num_found: int, pages: PagePool, prefixes: PrefixCache
) -> None:
    first = computed(range(14), pages, prefixes)
    second = waiting(*range(length))
    found = prefixes.match(second)
    assert found == first.pages[:num_found]
    prefixes.start(second, found)
    assert second.num_computed_tokens == num_found * PAGE_SIZE < length
    pages.check([first.pages, second.pages])
    assert prefixes.stats().num_queried_tokens == 14 + length
    assert prefixes.stats().num_hit_tokens == num_found * PAGE_SIZE
    assert second.usage().cached_prompt_tokens == num_found * PAGE_SIZE


def test_what_is_computed_behind_a_match_goes_to_pages_of_its_own(
    pages: PagePool, prefixes: PrefixCache
) -> None:
    first = computed(range(12), pages, prefixes)
    second = waiting(*range(12))
    prefixes.start(second, prefixes.match(second))
    compute(second, 4, pages, prefixes)
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]
    third = waiting(*range(20))
    assert prefixes.match(third) == first.pages  # the first copy stays the one that is found
    pages.check([first.pages, second.pages])


def test_the_same_tokens_elsewhere_are_not_found(pages: PagePool, prefixes: PrefixCache) -> None:
    first = waiting(1, 2, 3, 4, 5, 6, 7, 8)
    compute(first, 8, pages, prefixes)
    assert prefixes.match(waiting(5, 6, 7, 8, 9)) == []  # at another position
    assert prefixes.match(waiting(9, 2, 3, 4, 5, 6, 7, 8, 9)) == []  # behind other tokens
    assert prefixes.match(waiting(1, 2, 3, 4, 5, 6, 7, 9, 9)) == first.pages[:1]


def test_a_page_that_is_lost_ends_the_match(pages: PagePool, prefixes: PrefixCache) -> None:
    first = computed(range(12), pages, prefixes)
    pages.shrink(first.pages, 0)
    crowd: list[int] = []
    assert pages.grow(crowd, 30 * PAGE_SIZE)  # all but two: the last page goes first
    assert len(prefixes.match(waiting(*range(13)))) == 2
    assert pages.grow(crowd, 32 * PAGE_SIZE)
    assert prefixes.match(waiting(*range(13))) == []


def test_only_full_pages_of_computed_tokens_are_found(
    pages: PagePool, prefixes: PrefixCache
) -> None:
    first = waiting(*range(16))
    for num_tokens, num_found in ((3, 0), (4, 1), (1, 2)):
        compute(first, num_tokens, pages, prefixes)
        assert prefixes.match(waiting(*range(16))) == first.pages[:num_found]


def test_pages_of_outdated_features_are_not_kept(pages: PagePool, prefixes: PrefixCache) -> None:
    first = computed(range(8), pages, prefixes)
    first.has_outdated_features = True
    prefixes.clear()
    first.token_ids += range(8, 16)
    compute(first, 8, pages, prefixes)
    assert prefixes.match(waiting(*range(16))) == []
    assert prefixes.stats().num_cached_pages == 0


def test_nothing_is_found_or_kept_where_it_is_off(pages: PagePool) -> None:
    prefixes = PrefixCache(pages, is_enabled=False)
    computed(range(8), pages, prefixes)
    second = computed(range(8), pages, prefixes)
    assert second.usage().cached_prompt_tokens == 0
    assert prefixes.stats() == PrefixCacheStats(num_queried_tokens=16)


def test_each_page_is_digested_once(
    pages: PagePool, prefixes: PrefixCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a sequence that waits for long, decodes token by token and starts again."""
    digested: list[tuple[int, ...]] = []

    def counting(parent: bytes, token_ids: list[int]) -> bytes:
        digested.append(tuple(token_ids))
        return page_digest(parent, token_ids)

    monkeypatch.setattr(prefix_cache, "page_digest", counting)
    sequence = waiting(*range(8))
    for _ in range(5):
        found = prefixes.match(sequence)
    prefixes.start(sequence, found)
    compute(sequence, 8, pages, prefixes)
    for token_id in range(8, 20):
        sequence.token_ids.append(token_id)
        compute(sequence, 1, pages, prefixes)
    pages.shrink(sequence.pages, 0)
    sequence.num_computed_tokens = 0
    prefixes.start(sequence, prefixes.match(sequence))
    compute(sequence, sequence.num_missing_tokens, pages, prefixes)
    assert digested == [tuple(range(i, i + 4)) for i in range(0, 20, 4)]
    assert prefixes.stats().num_hit_tokens == 0  # it counts as it first started


def test_digests_are_the_same_on_every_machine() -> None:
    first = page_digest(b"", (1, 2, 70000))
    assert first.hex().startswith("313a9de5")  # little-endian, 32 bits a token
    assert page_digest(first, (1, 2, 70000)) != first
