"""Places in a pass: who gets tokens and pages, and that guesses only get what is left over."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import TargetConfig
from cluster.engine.pages import PagePool
from cluster.engine.prefix_cache import PrefixCache
from cluster.engine.scheduler import ScheduledSequence, Scheduler
from cluster.engine.sequence import Sequence
from cluster.request import Priority, Request
from cluster.speculation.proposal import DraftProposal

PAGE_SIZE = 4
BLOCK = 3


def make_scheduler(*, num_pages: int = 64, max_tokens: int = 64) -> tuple[Scheduler, PagePool]:
    config = TargetConfig(
        model="none", max_num_seqs=4, max_num_batched_tokens=max_tokens, page_size=PAGE_SIZE
    )
    pages = PagePool(num_pages + 1, PAGE_SIZE)  # one page is padding
    return Scheduler(config, pages, PrefixCache(pages, is_enabled=False), num_groups=1), pages


def decoding(scheduler: Scheduler, *lengths: int) -> list[Sequence]:
    """Sequences of so many committed tokens, computed but for the last, each with a proposal."""
    sequences = []
    for index, length in enumerate(lengths):
        request = Request(request_id=f"r{index}", prompt_token_ids=(0,) * (length - 1))
        tokens = list(request.prompt_token_ids)
        sequences.append(Sequence(request, tokens, len(tokens), max_output_tokens=100))
        scheduler.add(sequences[-1])
    for entry in scheduler.schedule(0, {}):
        assert entry.samples
        entry.sequence.num_computed_tokens += entry.num_tokens
        entry.sequence.token_ids.append(0)
        entry.sequence.proposal = DraftProposal((1,) * BLOCK, (0.5,) * BLOCK)
    return sequences


def schedule_whole_blocks(scheduler: Scheduler) -> list[ScheduledSequence]:
    limits = scheduler.draft_limits(0)
    return scheduler.schedule(0, {s: (1,) * limit for s, limit in limits.items()})


@pytest.mark.parametrize(("max_tokens", "limit"), [(16, 3), (15, 2), (8, 1), (7, 0), (4, 0)])
def test_guesses_share_the_tokens_that_every_sequence_leaves(max_tokens: int, limit: int) -> None:
    scheduler, _ = make_scheduler()
    sequences = decoding(scheduler, 5, 6, 7, 8)
    scheduler._config = scheduler._config.model_copy(update={"max_num_batched_tokens": max_tokens})
    assert scheduler.draft_limits(0) == dict.fromkeys(sequences, limit)
    entries = schedule_whole_blocks(scheduler)
    assert [entry.sequence for entry in entries] == sequences
    assert [len(entry.draft_token_ids) for entry in entries] == [limit] * 4


def test_guesses_leave_pages_to_every_sequence() -> None:
    # The first's guesses would need the page that the second needs for its own token.
    scheduler, pages = make_scheduler(num_pages=5)
    first, second = decoding(scheduler, 8, 5)
    pages.grow([], PAGE_SIZE)  # somebody else's
    assert pages.num_free == 1
    assert scheduler.draft_limits(0) == {first: 0, second: BLOCK}
    assert len(schedule_whole_blocks(scheduler)) == 2
    assert scheduler.num_preemptions == 0


def test_limits_do_not_depend_on_what_is_chosen_or_drafted() -> None:
    scheduler, _ = make_scheduler(num_pages=8)
    sequences = decoding(scheduler, 5, 8, 7)
    limits = scheduler.draft_limits(0)
    for sequence in sequences:
        sequence.proposal = DraftProposal((2,) * BLOCK, (0.1,) * BLOCK)
    assert scheduler.draft_limits(0) == limits


def test_sequences_without_a_proposal_have_no_limit() -> None:
    scheduler, _ = make_scheduler()
    sequences = decoding(scheduler, 5, 6)
    sequences[0].proposal = None
    assert scheduler.draft_limits(0) == {sequences[1]: BLOCK}
    sequences[1].proposal = None
    assert scheduler.draft_limits(0) == {}


def group_sizes(scheduler: Scheduler, num_groups: int) -> list[int]:
    return [len(scheduler.group_members(group)) for group in range(num_groups)]


def add_short(scheduler: Scheduler, count: int) -> None:
    for index in range(count):
        request = Request(request_id=f"{id(scheduler)}-{index}", prompt_token_ids=(1, 1))
        scheduler.add(Sequence(request, [1, 1], 2, max_output_tokens=100))


@pytest.mark.parametrize("num_groups", [2, 3])
def test_places_that_come_free_in_all_groups_at_once_are_taken_in_one_turn(num_groups: int) -> None:
    config = TargetConfig(model="m", max_num_seqs=12, max_num_batched_tokens=256)
    pages = PagePool(num_pages=101, page_size=16)
    prefixes = PrefixCache(pages, is_enabled=False)
    scheduler = Scheduler(config, pages, prefixes, num_groups=num_groups)
    add_short(scheduler, 40)
    full = [12 // num_groups] * num_groups
    for _ in range(3):
        for group in range(num_groups):
            scheduler.schedule(group, {})
        assert group_sizes(scheduler, num_groups) == full
        for group in range(num_groups):
            for sequence in scheduler.group_members(group)[:3]:
                scheduler.remove(sequence)


@pytest.mark.parametrize(("count", "sizes"), [(1, [1, 0]), (2, [1, 1]), (5, [3, 2]), (20, [2, 2])])
def test_few_sequences_are_spread_over_groups(count: int, sizes: list[int]) -> None:
    scheduler, _ = make_scheduler()
    scheduler.set_num_groups(2)
    add_short(scheduler, count)
    if count == 5:  # one place more than there is otherwise
        scheduler._config = scheduler._config.model_copy(update={"max_num_seqs": 5})
    for group in range(2):
        scheduler.schedule(group, {})
    assert group_sizes(scheduler, 2) == sizes


@pytest.mark.parametrize(
    ("count", "num_pages", "is_crowded"), [(4, 64, False), (5, 64, True), (4, 4, True)]
)
def test_it_is_crowded_while_places_or_pages_are_missing(
    count: int, num_pages: int, is_crowded: bool
) -> None:
    scheduler, _ = make_scheduler(num_pages=num_pages)
    add_short(scheduler, count)
    scheduler.schedule(0, {})
    assert scheduler.load().is_crowded == is_crowded


def test_what_waits_for_the_other_group_is_no_crowd() -> None:
    scheduler, _ = make_scheduler()
    scheduler.set_num_groups(2)
    add_short(scheduler, 4)
    scheduler.schedule(0, {})
    assert len(scheduler.waiting) == 2
    assert not scheduler.load().is_crowded


def test_a_preempted_sequence_waits_until_it_fits_as_a_whole() -> None:
    """Two requests that do not fit together are served one behind the other, without thrashing."""
    config = TargetConfig(model="m", max_num_batched_tokens=256, max_num_seqs=8)
    pages = PagePool(num_pages=101, page_size=16)
    scheduler = Scheduler(config, pages, PrefixCache(pages, is_enabled=False), num_groups=1)
    sequences = [
        Sequence(
            request=Request(request_id=str(i), prompt_token_ids=(1,) * 700),
            token_ids=[1] * 700,
            num_prompt_tokens=700,
            max_output_tokens=324,
        )
        for i in range(2)
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    num_computed = 0
    while scheduler.running or scheduler.waiting:
        entries = scheduler.schedule(0, {})
        assert entries
        for entry in entries:
            num_computed += entry.num_tokens
            sequence, samples = entry.sequence, entry.samples
            sequence.num_computed_tokens += entry.num_tokens
            if samples:
                sequence.token_ids.append(2)
            if sequence.room == 0:
                scheduler.remove(sequence)
    assert scheduler.num_preemptions <= 1
    assert num_computed <= 2 * 1024 + 1024  # at most one of them is computed a second time
    pages.check([])


@pytest.mark.parametrize(
    ("max_tokens", "load"), [(64, (3, 32)), (32, (3, 32)), (31, (2, 31)), (8, (2, 8)), (2, (2, 2))]
)
def test_a_prompt_counts_as_far_as_it_fits_and_samples_at_its_end(
    max_tokens: int, load: tuple[int, int]
) -> None:
    scheduler, _ = make_scheduler()
    decoding(scheduler, 5, 6)
    request = Request(request_id="prompt", prompt_token_ids=(0,) * 30)
    prompt = Sequence(request, [0] * 30, 30, max_output_tokens=100)
    scheduler.add(prompt)
    scheduler.schedule(0, {})  # admits it; nothing of it is computed
    scheduler._config = scheduler._config.model_copy(update={"max_num_batched_tokens": max_tokens})
    assert scheduler.base_load(0) == load


def waiting(name: str, arrival_time: float, priority: Priority, length: int = 8) -> Sequence:
    """A sequence that nothing was done for yet."""
    request = Request(
        request_id=name,
        prompt_token_ids=(0,) * length,
        arrival_time=arrival_time,
        priority=priority,
    )
    return Sequence.of(request, max_model_len=100, tokenizer=None)


def begun(scheduler: Scheduler) -> list[str]:
    """Who is begun, one after the other, when each ends before the next."""
    names = []
    while scheduler.waiting:
        (entry,) = scheduler.schedule(0, {})
        names.append(entry.sequence.request.request_id)
        scheduler.remove(entry.sequence)
    return names


def test_the_more_urgent_goes_first_and_nobody_starves() -> None:
    scheduler, _ = make_scheduler(max_tokens=8)
    for name, arrival_time, priority in [
        ("batch", 0.0, Priority.BATCH),
        ("default", 1.0, Priority.DEFAULT),
        ("urgent", 2.0, Priority.INTERACTIVE),
        ("urgent too", 5.9, Priority.INTERACTIVE),
        ("late", 6.1, Priority.INTERACTIVE),  # more than 5 s behind the default one
        ("default at last", 54.9, Priority.DEFAULT),
        ("urgent at last", 60.1, Priority.INTERACTIVE),  # more than a minute behind the batch
    ]:
        scheduler.add(waiting(name, arrival_time, priority))
    assert begun(scheduler) == [
        "urgent",
        "urgent too",
        "default",
        "late",
        "default at last",
        "batch",
        "urgent at last",
    ]


@given(
    arrivals=st.lists(
        st.tuples(st.floats(0, 200), st.sampled_from(Priority)), min_size=1, max_size=30
    )
)
def test_nobody_is_overtaken_by_what_comes_a_minute_later(
    arrivals: list[tuple[float, Priority]],
) -> None:
    scheduler, _ = make_scheduler(max_tokens=8)
    arrivals.sort(key=lambda arrival: arrival[0])
    for index, (arrival_time, priority) in enumerate(arrivals):
        scheduler.add(waiting(str(index), arrival_time, priority))
    order = [int(name) for name in begun(scheduler)]
    assert sorted(order) == list(range(len(arrivals)))
    for place, index in enumerate(order):
        arrival_time, priority = arrivals[index]
        for later in order[:place]:
            if later > index:  # has overtaken it
                assert arrivals[later][1] < priority
                assert arrivals[later][0] - arrival_time <= 60.0


def test_the_least_urgent_gives_its_pages_back() -> None:
    scheduler, pages = make_scheduler(num_pages=5)
    urgent = waiting("urgent", 1.0, Priority.INTERACTIVE)
    batch = waiting("batch", 0.0, Priority.BATCH, length=4)
    for sequence in (batch, urgent):
        scheduler.add(sequence)
    for entry in scheduler.schedule(0, {}):
        entry.sequence.num_computed_tokens += entry.num_tokens
        entry.sequence.token_ids.append(0)
    pages.grow([], pages.num_free * PAGE_SIZE)
    (entry,) = scheduler.schedule(0, {})
    assert entry.sequence is urgent
    assert scheduler.waiting == [batch]
