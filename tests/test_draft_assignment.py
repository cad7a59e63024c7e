"""Which drafter drafts for which sequences."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.speculation.draft_assignment import DrafterLoad, choose_drafter, sessions_to_move

_LOADS = st.lists(
    st.builds(
        DrafterLoad,
        st.integers(0, 40),
        st.floats(1e-4, 1.0),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


def _place(loads: list[DrafterLoad], count: int) -> list[DrafterLoad]:
    for _ in range(count):
        index = choose_drafter(loads)
        load = loads[index]
        loads[index] = DrafterLoad(load.num_sessions + 1, load.round_s, load.is_near)
    return loads


def test_equal_drafters_share_evenly() -> None:
    loads = _place([DrafterLoad(0, 0.002) for _ in range(3)], 12)
    assert [load.num_sessions for load in loads] == [4, 4, 4]


def test_a_drafter_on_the_same_host_comes_first_and_takes_more() -> None:
    loads = [DrafterLoad(0, 0.002), DrafterLoad(0, 0.002, is_near=True)]
    assert choose_drafter(loads) == 1
    near, far = (load.num_sessions for load in reversed(_place(loads, 18)))
    assert near == 10
    assert far == 8


def test_a_drafter_that_takes_three_times_as_long_gets_a_third() -> None:
    loads = _place([DrafterLoad(0, 0.001), DrafterLoad(0, 0.003)], 16)
    assert [load.num_sessions for load in loads] == [12, 4]


def test_a_new_drafter_gets_its_share_of_what_runs() -> None:
    loads = [DrafterLoad(8, 0.002), DrafterLoad(8, 0.002), DrafterLoad(0, 0.002)]
    assert sessions_to_move(loads, 100) == [2, 2, 0]
    assert sessions_to_move(loads, 1) == [1, 0, 0]


def test_one_session_stays_where_it_is() -> None:
    assert sessions_to_move([DrafterLoad(1, 0.002), DrafterLoad(0, 0.002)], 10) == [0, 0]
    assert sessions_to_move([DrafterLoad(2, 0.002), DrafterLoad(0, 0.002)], 10) == [1, 0]
    assert sessions_to_move([DrafterLoad(5, 0.002)], 10) == [0]
    assert sessions_to_move([], 10) == []


def test_small_differences_move_nothing() -> None:
    assert sessions_to_move([DrafterLoad(8, 0.0022), DrafterLoad(8, 0.002)], 10) == [0, 0]


@given(_LOADS, st.integers(0, 50))
def test_moves_come_to_rest_and_help_the_worst_off(loads: list[DrafterLoad], limit: int) -> None:
    leaving = sessions_to_move(loads, limit)
    assert sum(leaving) <= limit
    assert all(0 <= left <= load.num_sessions for left, load in zip(leaving, loads, strict=True))
    after = [
        DrafterLoad(load.num_sessions - left, load.round_s, load.is_near)
        for load, left in zip(loads, leaving, strict=True)
    ]
    after = _place(after, sum(leaving))
    if sum(leaving) > 0:
        before_worst = max(load.cost(load.num_sessions) for load in loads)
        assert max(load.cost(load.num_sessions) for load in after) <= before_worst
    if sum(leaving) < limit:
        assert sum(sessions_to_move(after, 50)) == 0
