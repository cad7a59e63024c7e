"""Which sequences are computed again for another drafter's sake, and when."""

from __future__ import annotations

import pytest

from cluster.engine.feature_refresh import FeatureRefresh
from cluster.engine.scheduler import Scheduler
from cluster.engine.sequence import Sequence
from cluster.request import Request
from cluster.speculation.cost_model import CostModel
from tests.test_scheduler import decoding, make_scheduler

# A pass takes a second for each token, so that 20 computed tokens pay from 21 tokens of room on.
COST_MODEL = CostModel({1: 1.0, 101: 101.0})


def outdated(*lengths: int) -> tuple[Scheduler, list[Sequence], FeatureRefresh]:
    scheduler, _ = make_scheduler()
    sequences = decoding(scheduler, *lengths)
    refresh = FeatureRefresh(scheduler, COST_MODEL)
    refresh.mark(sequences, are_read=True, are_kept=False)
    return scheduler, sequences, refresh


def test_one_after_the_other_is_computed_again() -> None:
    scheduler, sequences, refresh = outdated(5, 6, 7)
    for sequence in sequences:
        assert sequence.has_outdated_features
        refresh.advance()
        assert list(scheduler.waiting) == [sequence]
        assert not sequence.has_outdated_features
        assert sequence.num_computed_tokens == 0
        refresh.advance()  # it is not back yet
        assert len(scheduler.waiting) == 1
        for entry in scheduler.schedule(0, {}):
            entry.sequence.num_computed_tokens += entry.num_tokens
    refresh.advance()
    assert scheduler.num_preemptions == 3
    assert set(scheduler.running) == set(sequences)


def test_first_tokens_come_first() -> None:
    scheduler, sequences, refresh = outdated(5)
    newcomer = Sequence(Request(request_id="new", prompt_token_ids=(1,)), [1], 1, 10)
    scheduler.add(newcomer)
    refresh.advance()
    assert list(scheduler.running) == sequences
    scheduler.remove(newcomer)
    refresh.advance()
    assert list(scheduler.waiting) == sequences


@pytest.mark.parametrize(("room", "is_computed_again"), [(20, False), (21, True)])
def test_only_where_it_takes_less_time_than_what_is_left(
    room: int, is_computed_again: bool
) -> None:
    scheduler, (sequence,), refresh = outdated(21)
    assert sequence.num_computed_tokens == 20
    sequence.max_output_tokens = sequence.num_output_tokens + room
    refresh.advance()
    assert bool(scheduler.waiting) == is_computed_again
    # Else it goes on, and is never drafted for with features that are not the drafter's.
    assert sequence.has_outdated_features != is_computed_again


def test_what_is_in_flight_is_left_alone() -> None:
    scheduler, (sequence,), refresh = outdated(5)
    sequence.is_in_flight = True
    refresh.advance()
    assert not scheduler.waiting
    sequence.is_in_flight = False
    refresh.advance()
    assert scheduler.waiting


def test_what_has_ended_is_forgotten() -> None:
    scheduler, sequences, refresh = outdated(5, 6)
    scheduler.remove(sequences[0])
    refresh.advance()
    assert list(scheduler.waiting) == [sequences[1]]


def test_a_mark_stays_until_features_are_the_drafters_own() -> None:
    _, (sequence,), refresh = outdated(5)
    refresh.mark([sequence], are_read=True, are_kept=True)  # the same projection once more
    assert sequence.has_outdated_features
    refresh.mark([sequence], are_read=False, are_kept=False)  # one that reads none
    assert not sequence.has_outdated_features
