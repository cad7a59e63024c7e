"""How much a router takes on, and when who is refused may come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequestError, QueueFullError
from cluster.request import Priority
from cluster.routing.admission import MAX_RETRY_S, SHARES, Admission, Admitted


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(bound: int = 1000) -> tuple[Admission, Clock]:
    clock = Clock()
    return Admission(bound, clock=clock, seed=0), clock


def admit(
    admission: Admission,
    prompt_tokens: int,
    output_tokens: int,
    *,
    num_choices: int = 1,
    priority: Priority = Priority.INTERACTIVE,
) -> Admitted:
    return admission.admit(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        num_choices=num_choices,
        priority=priority,
    )


def test_a_request_holds_what_it_still_needs() -> None:
    admission, _ = make()
    with admit(admission, 100, 50, num_choices=2) as admitted:
        assert admission.num_queued_tokens == 300
        admitted.advance(1, 0)  # nothing has come
        assert admission.num_queued_tokens == 300
        admitted.advance(1, 5)
        assert admission.num_queued_tokens == 195  # a prompt and five tokens less
        admitted.advance(1, 45)
        admitted.advance(1, 3)  # more than it was to be counts for nothing
        assert admission.num_queued_tokens == 150
    assert admission.num_queued_tokens == 0


def test_the_less_urgent_leave_room_for_the_more_urgent() -> None:
    admission, _ = make()
    with admit(admission, 400, 100, priority=Priority.BATCH):
        for priority, fits in ((Priority.BATCH, 0), (Priority.DEFAULT, 400)):
            with pytest.raises(QueueFullError):
                admit(admission, fits + 1, 0, priority=priority)
        with admit(admission, 400, 0, priority=Priority.DEFAULT), admit(admission, 100, 0):
            assert admission.num_queued_tokens == 1000
            with pytest.raises(QueueFullError):
                admit(admission, 1, 0)


@pytest.mark.parametrize("priority", Priority)
def test_what_never_fits_is_bad_input(priority: Priority) -> None:
    admission, _ = make()
    bound = int(1000 * SHARES[priority])
    with admit(admission, 10, bound - 10, priority=priority):
        pass
    with pytest.raises(InvalidRequestError) as caught:
        admit(admission, 10, bound - 9, priority=priority)
    assert caught.value.field == "sampling.max_tokens"
    assert admission.num_queued_tokens == 0


def test_the_delay_is_what_the_excess_takes_and_differs() -> None:
    admission, clock = make()
    busy = admit(admission, 0, 1000)
    for _ in range(60):  # 20 tokens a second
        clock.now += 0.05
        busy.advance(0, 1)
    delays = []
    for _ in range(20):
        with pytest.raises(QueueFullError) as caught:
            admit(admission, 40, 60 + 60)  # 100 too many
        delays.append(caught.value.retry_after_s)
    assert all(4.5 <= delay <= 8.5 for delay in delays)  # 5 s, and up to half of it at random
    assert len(set(delays)) == 20
    clock.now += 3600  # nothing has been done for long
    assert admission.retry_after_s(100) <= 1.5 * MAX_RETRY_S
    assert admission.retry_after_s(0, at_least_s=2.0) >= 2.0


def test_the_first_refusal_has_a_delay_too() -> None:
    admission, _ = make()
    with admit(admission, 1000, 0), pytest.raises(QueueFullError) as caught:
        admit(admission, 1, 0)
    assert 1.0 <= caught.value.retry_after_s <= 1.5


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(Priority), st.integers(1, 400), st.integers(0, 400), st.integers(0, 9)
        ),
        max_size=60,
    )
)
def test_the_bound_holds_whatever_happens(steps: list[tuple[Priority, int, int, int]]) -> None:
    admission, clock = make()
    running: list[Admitted] = []
    for priority, prompt_tokens, output_tokens, action in steps:
        clock.now += 0.1
        if action < 6:
            before = admission.num_queued_tokens
            fits = before + prompt_tokens + output_tokens <= 1000 * SHARES[priority]
            try:
                running.append(admit(admission, prompt_tokens, output_tokens, priority=priority))
                assert fits
            except (QueueFullError, InvalidRequestError):
                assert not fits
                assert admission.num_queued_tokens == before
        elif running and action < 8:
            running[0].advance(0, output_tokens)
        elif running:
            running.pop().__exit__(None, None, None)
        assert 0 <= admission.num_queued_tokens <= 1000
    for admitted in running:
        admitted.__exit__(None, None, None)
    assert admission.num_queued_tokens == 0
