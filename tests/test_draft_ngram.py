"""Prompt lookup, against a search written as loops, and as a draft engine."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from cluster.config import DrafterConfig
from cluster.engine import draft_ngram
from cluster.engine.draft_client import DraftRound, DraftSampling, DraftSequence, SessionKey
from cluster.engine.draft_engine import DraftEngine
from cluster.engine.draft_ngram import NgramMethod, longest_match
from cluster.speculation.proposal import DraftProposal

GREEDY = DraftSampling(temperature=0.0)


def make_engine(*, low: int = 2, high: int = 4, block: int = 5, **options: int) -> DraftEngine:
    config = DrafterConfig(**{"kv_cache_memory_mb": 1, **options})
    method = NgramMethod(
        config, block, vocab_size=1000, max_model_len=100_000, min_match=low, max_match=high
    )
    return DraftEngine(method, config)


def draft(engine: DraftEngine, tokens: list[int], known: int, count: int = 5) -> DraftProposal:
    """A round behind ``tokens``, of which ``known`` positions were fed."""
    rows = len(tokens) - 1 - known
    sequence = DraftSequence(
        session=SessionKey("r", 0),
        committed_length=len(tokens),
        num_features=rows,
        new_token_ids=tuple(tokens[known:]),
        num_speculative_tokens=count,
    )
    ((result,),) = engine.draft([("a", DraftRound((sequence,), torch.empty(rows, 0)))])
    assert result.proposal is not None
    return result.proposal


def lookup(tokens: list[int], **options: int) -> DraftProposal:
    engine = make_engine(**options)
    engine.open("a", SessionKey("r", 0), GREEDY)
    return draft(engine, tokens, 0)


def slow_match(tokens: list[int], low: int, high: int) -> tuple[int, int] | None:
    for length in range(high, low - 1, -1):
        for place in range(len(tokens) - 1, length - 1, -1):
            if tokens[place - length : place] == tokens[-length:]:
                return place, length
    return None


def test_the_longest_and_then_the_most_recent_match_is_found() -> None:
    dice = random.Random(0)
    for _ in range(3000):
        tokens = [dice.randrange(3) for _ in range(dice.randint(1, 14))]
        low = dice.randint(1, 3)
        high = dice.randint(low, 5)
        array = np.array(tokens, dtype=np.int32)
        assert longest_match(array, low, high) == slow_match(tokens, low, high)


def test_what_followed_is_proposed_and_copied_on_behind_the_end() -> None:
    assert lookup([1, 2, 3, 4, 9, 8, 1, 2, 3]).draft_token_ids == (4, 9, 8, 1, 2)
    assert lookup([7, 1, 2, 1, 2, 1, 2]).draft_token_ids == (1, 2, 1, 2, 1)
    assert lookup([5, 5, 5, 5]).draft_token_ids == (5, 5, 5, 5, 5)
    assert lookup([1, 2, 3, 4]).draft_token_ids == ()
    assert lookup([3, 9, 3]).draft_token_ids == ()  # one token is too short a match
    assert lookup([3, 9, 3], low=1).draft_token_ids == (9, 3, 9, 3, 9)
    assert lookup([3], low=1).draft_token_ids == ()


def test_confidences_follow_from_the_length_of_the_match_alone() -> None:
    short = lookup([1, 2, 3, 4, 9, 8, 0, 2, 3])
    long = lookup([1, 2, 3, 4, 9, 8, 1, 2, 3])
    other = lookup([1, 2, 3, 5, 7, 6, 1, 2, 3])
    assert long.confidences == other.confidences
    assert long.draft_token_ids != other.draft_token_ids
    assert all(low < high for low, high in zip(short.confidences, long.confidences, strict=True))
    assert all(0 < chance < 1 for chance in short.confidences + long.confidences)


@pytest.mark.parametrize(
    "sampling", [DraftSampling(temperature=0.9, seed=3), DraftSampling(temperature=1.2)]
)
def test_drafts_are_the_same_however_the_request_samples(sampling: DraftSampling) -> None:
    engine = make_engine()
    engine.open("a", SessionKey("r", 0), sampling)
    tokens = [1, 2, 3, 4, 9, 8, 1, 2, 3]
    proposal = draft(engine, tokens, 0)
    assert proposal.draft_token_ids == lookup(tokens).draft_token_ids
    assert proposal.draft_prob_token_ids is None


def test_feeding_in_parts_and_by_rounds_equals_feeding_at_once() -> None:
    dice = random.Random(1)
    tokens = [dice.randrange(4) for _ in range(900)]
    engine = make_engine(low=1, high=8)
    key = SessionKey("r", 0)
    engine.open("a", key, GREEDY)
    for start, end in ((0, 300), (250, 600)):
        length = engine.append(
            "a", key, start, torch.empty(end - start, 0), tokens[start : end + 1]
        )
        assert length == end
    known = 600
    for length in (611, 612, 700, 899):
        proposal = draft(engine, tokens[:length], known)
        expected = lookup(tokens[:length], low=1, high=8)
        assert proposal.draft_token_ids == expected.draft_token_ids != ()
        assert proposal.confidences == expected.confidences
        known = length - 1
    engine.check_integrity()


def test_a_round_looks_no_further_back_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_ngram, "MAX_LOOKUP_TOKENS", 20)
    near = [1, 2, 3, *range(100, 110), 1, 2]
    far = [1, 2, 3, *range(100, 120), 1, 2]
    assert lookup(near).draft_token_ids[0] == 3
    assert lookup(far).draft_token_ids == ()


def test_memory_is_bounded_and_evicts() -> None:
    engine = make_engine(max_sessions=8)  # 1 MiB: 1024 pages of 256 tokens
    rows = torch.empty(90_000, 0)
    keys = [SessionKey(f"r{index}", 0) for index in range(4)]
    for key in keys:
        engine.open("a", key, GREEDY)
        assert engine.append("a", key, 0, rows, [1] * 90_001) == 90_000
    assert [engine.length_of("a", key) for key in keys] == [None, None, 90_000, 90_000]
    engine.check_integrity()
