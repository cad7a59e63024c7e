"""The pool of pages: who holds which, which are found again, and that its check finds mistakes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.engine.pages import PagePool

PAGE_SIZE = 4


def filled(pool: PagePool, num_pages: int, *keys: bytes) -> list[int]:
    """So many pages of a new holder, the first ones under keys."""
    pages: list[int] = []
    assert pool.grow(pages, num_pages * PAGE_SIZE)
    for page, key in zip(pages, keys, strict=False):
        pool.set_key(page, key)
    return pages


def test_pages_are_handed_out_once_and_never_page_zero() -> None:
    pool = PagePool(num_pages=9, page_size=PAGE_SIZE)
    mine: list[int] = []
    assert pool.grow(mine, 10)
    assert len(mine) == 3
    others = filled(pool, 5)
    assert sorted(mine + others) == list(range(1, 9))
    assert not pool.grow([], 1)
    pool.shrink(mine, 5)
    assert len(mine) == 2
    assert pool.num_free == 1
    pool.check([mine, others])


def test_a_page_with_a_key_is_found_while_held_and_after() -> None:
    pool = PagePool(num_pages=5, page_size=PAGE_SIZE)
    first, second = pages = filled(pool, 2, b"a", b"b")
    pool.shrink(pages, 0)
    assert (pool.find(b"a"), pool.find(b"b"), pool.find(b"c")) == (first, second, None)
    assert pool.num_free == 4
    assert pool.usage == 0.0
    assert not pool.is_held(first)
    pool.hold(first)
    pool.hold(first)
    assert pool.is_held(first)
    assert pool.num_free == 3
    pool.check([[first], [first]])
    rest = filled(pool, 3)
    assert first not in rest
    pool.shrink([first], 0)
    assert pool.num_free == 0  # the other one holds it still
    pool.shrink([first], 0)
    assert pool.num_free == 1
    pool.check([rest])


def test_the_page_given_back_longest_ago_goes_first_and_behind_those_without_a_key() -> None:
    pool = PagePool(num_pages=8, page_size=PAGE_SIZE)
    old, new, plain = filled(pool, 2, b"a", b"b"), filled(pool, 2, b"c", b"d"), filled(pool, 1)
    for pages in (old, new, plain):
        pool.shrink(pages, 0)
    pool.hold(kept := pool.find(b"b") or 0)  # used once more, so it is the newest
    pool.shrink([kept], 0)
    evicted = []
    for _ in range(7):
        filled(pool, 1)
        evicted += [key for key in (b"a", b"b", b"c", b"d") if pool.find(key) is None]
    # Three pages without a key; then the oldest, of those given back at once the last first.
    assert list(dict.fromkeys(evicted)) == [b"a", b"d", b"c", b"b"]
    assert len(evicted) == 1 + 2 + 3 + 4
    assert pool.num_evictions == 4
    assert pool.num_keyed == 0


def test_the_first_page_under_a_key_stays_the_one_that_is_found() -> None:
    pool = PagePool(num_pages=5, page_size=PAGE_SIZE)
    (first,), (second,) = filled(pool, 1, b"a"), filled(pool, 1, b"a")
    assert pool.find(b"a") == first
    pool.check([[first], [second]])
    pool.shrink([second], 0)
    assert pool.find(b"a") == first
    pool.check([[first]])


def test_forgotten_keys_are_not_found_whether_held_or_not() -> None:
    pool = PagePool(num_pages=5, page_size=PAGE_SIZE)
    held, idle = filled(pool, 1, b"a"), filled(pool, 1, b"b")
    pool.shrink(idle, 0)
    pool.forget_keys()
    assert pool.find(b"a") is None
    assert pool.find(b"b") is None
    pool.check([held])
    assert pool.num_free == 3
    filled(pool, 3)
    assert pool.num_evictions == 0


def test_a_page_is_released_when_its_last_holder_gives_it_back() -> None:
    released: list[int] = []
    pool = PagePool(5, PAGE_SIZE, released.append)
    (page,) = filled(pool, 1, b"a")
    pool.hold(page)
    pool.shrink([page], 0)
    assert released == []
    pool.shrink([page], 0)
    assert released == [page]


def test_a_page_freed_twice_is_noticed() -> None:
    pool = PagePool(5, PAGE_SIZE)
    pages = filled(pool, 2)
    copy = list(pages)
    pool.shrink(pages, 0)
    with pytest.raises(RuntimeError, match="freed twice"):
        pool.shrink(copy, 0)


def _swap_keys(pool: PagePool) -> None:
    pool._by_key[b"a"], pool._by_key[b"b"] = pool._by_key[b"b"], pool._by_key[b"a"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pool: pool._free.pop(), "1 pages are neither free nor held"),
        (lambda pool: pool._free.append(pool._free[0]), "free twice"),
        (lambda pool: pool._num_holders.__setitem__(pool._free[0], 1), "nobody holds"),
        (lambda pool: pool.hold(2), "page 2 has 1 holders, counted were 2"),
        (lambda pool: pool._by_key.pop(b"a"), "another page"),
        (_swap_keys, "another page"),
        (lambda pool: pool._free.append(pool._idle.popitem()[0]), "without a key"),
    ],
    ids=["lost", "twice", "unheld", "miscounted", "no-key", "wrong-key", "kept-as-free"],
)
def test_the_check_finds(spoil: Callable[[PagePool], object], message: str) -> None:
    pool = PagePool(num_pages=9, page_size=PAGE_SIZE)
    held, idle = filled(pool, 3, b"a"), filled(pool, 2, b"b", b"c")
    assert held == [1, 2, 3]
    pool.shrink(idle, 0)
    pool.check([held])
    spoil(pool)
    with pytest.raises(RuntimeError, match=message):
        pool.check([held])


def test_the_check_knows_every_holder() -> None:
    pool = PagePool(num_pages=9, page_size=PAGE_SIZE)
    mine = filled(pool, 3)
    for holders in ([mine[:2]], [mine, mine], []):
        with pytest.raises(RuntimeError):
            pool.check(holders)
    pool.check([mine])
