"""The drafter's engine, on a tiny drafter with random weights."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from cluster.engine.draft_client import DraftOutcome, DraftSampling, SessionKey
from cluster.engine.draft_engine import DraftEngine
from cluster.engine.local_drafter import LocalDraftClient
from cluster.errors import InvalidRequestError
from cluster.speculation.coupling import coupled_pick, gumbel_noise
from cluster.speculation.proposal import dequantize_draft_probs
from tests.draft_helpers import (
    BLOCK,
    VOCAB,
    D,
    append,
    feed,
    make_drafter,
    make_engine,
    round_of,
    sequence,
)

GREEDY = DraftSampling(temperature=0.0)
COUPLED = DraftSampling(temperature=0.9, top_k=20, seed=7)
SAMPLED = DraftSampling(temperature=0.8, top_p=0.95, send_probs=True)


def features(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(length, D, generator=torch.Generator().manual_seed(seed))


def open_with(
    engine: DraftEngine,
    name: str,
    length: int,
    sampling: DraftSampling = GREEDY,
    *,
    replica: str = "a",
    seed: int = 0,
) -> SessionKey:
    key = SessionKey(name, 0)
    engine.open(replica, key, sampling)
    assert append(engine, replica, key, 0, features(length, seed)) == length
    return key


def draft_one(engine: DraftEngine, key: SessionKey, length: int, **kwargs):
    ((result,),) = engine.draft([("a", round_of(sequence(key, length, **kwargs)))])
    return result


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_a_batch_drafts_what_each_sequence_drafts_alone(head):
    drafter = make_drafter(head=head)
    lengths, samplings = [3, 17, 9, 30], [GREEDY, COUPLED, GREEDY, COUPLED]
    alone = []
    for index, (length, sampling) in enumerate(zip(lengths, samplings, strict=True)):
        engine = make_engine(drafter)
        key = open_with(engine, f"r{index}", length, sampling, seed=index)
        alone.append(draft_one(engine, key, length + 1).proposal)
    engine = make_engine(drafter, page_size=8)
    keys = [
        open_with(engine, f"r{index}", length, sampling, seed=index)
        for index, (length, sampling) in enumerate(zip(lengths, samplings, strict=True))
    ]
    one, two = (
        round_of(*(sequence(keys[i], lengths[i] + 1) for i in rows)) for rows in ((0, 1), (2, 3))
    )
    for key in keys[2:]:  # the second round is another replica's
        engine.open("b", key, samplings[keys.index(key)])
        append(engine, "b", key, 0, features(lengths[keys.index(key)], keys.index(key)))
    results = [r for rows in engine.draft([("a", one), ("b", two)]) for r in rows]
    for result, expected in zip(results, alone, strict=True):
        assert result.proposal.draft_token_ids == expected.draft_token_ids
        assert result.proposal.confidences == pytest.approx(expected.confidences, abs=1e-5)
    engine.check_integrity()


@pytest.mark.parametrize("sampling", [GREEDY, COUPLED])
def test_feeding_in_parts_and_by_rounds_equals_feeding_at_once(sampling):
    drafter, rows = make_drafter(), features(23)
    whole, parts = make_engine(drafter), make_engine(drafter)
    key = SessionKey("r", 0)
    for engine in (whole, parts):
        engine.open("a", key, sampling)
    append(whole, "a", key, 0, rows)
    assert append(parts, "a", key, 0, rows[:5]) == 5
    assert append(parts, "a", key, 5, rows[5:12]) == 12
    # Overlap is skipped, and rounds append too.
    assert append(parts, "a", key, 10, rows[10:14]) == 14
    draft_one(parts, key, 18, features=rows[14:17])
    draft_one(parts, key, 21, features=rows[15:20])
    at_once = draft_one(whole, key, 24)
    by_rounds = draft_one(parts, key, 24, features=rows[20:23])
    assert by_rounds.proposal.draft_token_ids == at_once.proposal.draft_token_ids
    assert by_rounds.proposal.confidences == pytest.approx(at_once.proposal.confidences, abs=1e-5)


def test_coupled_tokens_are_the_drafters_law_with_the_shared_noise():
    drafter, rows = make_drafter(), features(12)
    engine = make_engine(make_drafter())
    key = SessionKey("r", 0)
    sampling = DraftSampling(temperature=1.0, seed=-3, choice_index=2)
    engine.open("a", key, sampling)
    append(engine, "a", key, 0, rows)
    tokens = draft_one(engine, key, 13, anchor=5).proposal.draft_token_ids
    with torch.inference_mode():
        keys, values = drafter.context_kv(rows, torch.arange(12))
        anchor, position = torch.tensor([5]), torch.tensor([12])
        hidden = drafter.block_hidden(anchor, position, keys[:, None], values[:, None], position)
        base, state, previous, expected = drafter.base_logits(hidden), None, anchor, []
        for index in range(BLOCK):
            logits, state = drafter.markov_step(base[:, index], previous, hidden[:, index], state)
            noise = gumbel_noise(
                seeds=torch.tensor([-3]),
                choice_indices=torch.tensor([2]),
                positions=torch.tensor([13 + index]),
                token_ids=torch.arange(VOCAB),
            )
            previous = coupled_pick(logits.log_softmax(-1), noise)
            expected.append(int(previous))
    assert list(tokens) == expected


def test_fewer_tokens_are_a_prefix_of_more():
    drafter = make_drafter()
    drafted = []
    for count in (2, BLOCK):
        engine = make_engine(drafter)
        key = open_with(engine, "r", 9, COUPLED)
        drafted.append(draft_one(engine, key, 10, count=count).proposal)
    assert len(drafted[0].draft_token_ids) == len(drafted[0].confidences) == 2
    assert drafted[0].draft_token_ids == drafted[1].draft_token_ids[:2]


def test_sampled_tokens_follow_the_law_that_is_sent():
    """Chi-square of first tokens, and of second tokens given the first, against the q sent."""
    engine = make_engine(make_drafter(), draft_top_k=6, seed=11)
    count = 100
    sampling = DraftSampling(temperature=1.3, top_p=0.9, send_probs=True)
    keys = [open_with(engine, f"r{i}", 4, sampling) for i in range(count)]
    firsts: Counter[int] = Counter()
    seconds: dict[int, Counter[int]] = {}
    laws: dict[int | None, dict[int, float]] = {}
    for step in range(40):
        engine_round = round_of(*(sequence(key, 5, count=2) for key in keys))
        (results,) = engine.draft([("a", engine_round)])
        for result in results:
            proposal = result.proposal
            proposal.validate(vocab_size=VOCAB, max_tokens=2)
            probs = dequantize_draft_probs(torch.from_numpy(proposal.draft_prob_values)).numpy()
            first, second = proposal.draft_token_ids
            firsts[first] += 1
            seconds.setdefault(first, Counter())[second] += 1
            for condition, row in ((None, 0), (first, 1)):
                law = dict(zip(proposal.draft_prob_token_ids[row], probs[row], strict=True))
                assert sum(law.values()) == pytest.approx(1.0, abs=1e-6)
                known = laws.setdefault(condition, law)
                assert known.keys() == law.keys()
        for key in keys:  # a base is drafted once only: start anew
            engine.close("a", key)
        keys = [open_with(engine, f"r{step}-{i}", 4, sampling) for i in range(count)]
    _check_law(firsts, laws[None])
    for first, counts in seconds.items():
        _check_law(counts, laws[first])


def _check_law(counts: Counter[int], law: dict[int, float]) -> None:
    total = counts.total()
    assert counts.keys() <= {token for token, prob in law.items() if prob > 0}
    for token, prob in law.items():
        bound = 5 * math.sqrt(max(total * prob * (1 - prob), 1))
        assert abs(counts[token] - total * prob) <= bound


def test_missing_unknown_and_stale_bases_are_not_guessed_at():
    engine = make_engine(make_drafter())
    key = open_with(engine, "r", 10)
    gap = draft_one(engine, key, 16, features=features(2))
    assert (gap.outcome, gap.missing_from) == (DraftOutcome.MISSING, 10)
    assert draft_one(engine, SessionKey("r", 1), 11).outcome is DraftOutcome.UNKNOWN_SESSION
    assert draft_one(engine, key, 11).outcome is DraftOutcome.DRAFTED
    assert draft_one(engine, key, 14, features=features(3)).outcome is DraftOutcome.DRAFTED
    for length in (11, 12, 13):
        assert draft_one(engine, key, length).outcome is DraftOutcome.UNKNOWN_SESSION
    assert append(engine, "a", key, 20, features(2)) == 13  # a gap
    assert append(engine, "b", key, 13, features(2)) is None  # another replica's session
    ((other,),) = engine.draft([("b", round_of(sequence(key, 14)))])
    assert other.outcome is DraftOutcome.UNKNOWN_SESSION
    engine.check_integrity()


def test_a_base_gets_one_proposal():
    engine = make_engine(make_drafter())
    key = open_with(engine, "r", 10, SAMPLED)
    first = draft_one(engine, key, 11)
    for _ in range(5):
        assert draft_one(engine, key, 11).proposal is first.proposal
    cut = draft_one(engine, key, 11, count=2).proposal
    assert cut.draft_token_ids == first.proposal.draft_token_ids[:2]
    assert np.array_equal(cut.draft_prob_values, first.proposal.draft_prob_values[:2])


def test_a_round_without_tokens_still_appends():
    engine = make_engine(make_drafter())
    key = open_with(engine, "r", 10)
    assert draft_one(engine, key, 13, features=features(2), count=0).proposal.num_draft_tokens == 0
    assert engine.length_of("a", key) == 12


def test_beyond_the_drafters_context_nothing_is_drafted():
    engine = make_engine(make_drafter(max_positions=24))
    key = open_with(engine, "r", 24 - BLOCK)
    assert draft_one(engine, key, 25 - BLOCK).proposal.num_draft_tokens == BLOCK
    beyond = draft_one(engine, key, 26 - BLOCK, features=features(1))
    assert beyond.proposal.num_draft_tokens == 0
    assert append(engine, "a", key, 25 - BLOCK, features(40)) == 65 - BLOCK
    assert draft_one(engine, key, 66 - BLOCK).proposal.num_draft_tokens == 0
    engine.check_integrity()


def test_least_recently_used_sessions_make_room():
    engine = make_engine(make_drafter(), max_sessions=3)
    keys = [open_with(engine, f"r{i}", 5) for i in range(3)]
    draft_one(engine, keys[0], 6)
    open_with(engine, "new", 5)
    assert [engine.length_of("a", key) for key in keys] == [5, None, 5]
    assert draft_one(engine, keys[1], 6).outcome is DraftOutcome.UNKNOWN_SESSION
    engine.check_integrity()


def test_short_memory_drops_idle_sessions_and_then_the_one_that_asks():
    drafter = make_drafter(max_positions=4096)
    engine = make_engine(drafter, page_size=512)  # 1 MiB: 8 pages, 7 of them usable
    two, four = 1024 - BLOCK, 2048 - BLOCK  # pages, with those of the block itself
    keys = [open_with(engine, f"r{i}", two) for i in range(3)]
    wide = open_with(engine, "wide", four)  # the oldest two sessions go
    assert [engine.length_of("a", key) for key in keys] == [None, None, two]
    assert draft_one(engine, wide, four + 1).outcome is DraftOutcome.DRAFTED
    huge = SessionKey("huge", 0)
    engine.open("a", huge, GREEDY)
    assert append(engine, "a", huge, 0, features(3800)) is None
    assert engine.length_of("a", huge) is None
    assert engine.length_of("a", wide) == four  # nothing was dropped in vain
    engine.check_integrity()


def test_sessions_expire_and_die_with_their_replica():
    now = [0.0]
    engine = make_engine(make_drafter(), clock=lambda: now[0])
    old = open_with(engine, "old", 5)
    now[0] = 50.0
    young = open_with(engine, "young", 5)
    open_with(engine, "other", 5, replica="b")
    now[0] = 61.0
    engine.expire()
    assert engine.length_of("a", old) is None
    assert engine.length_of("a", young) == 5
    engine.drop_replica("a")
    assert engine.num_sessions == 1
    engine.drop_replica("b")
    engine.check_integrity()
    assert engine.num_sessions == 0


def test_other_sampling_for_an_open_session_is_refused():
    engine = make_engine(make_drafter())
    key = open_with(engine, "r", 5)
    engine.open("a", key, GREEDY)
    with pytest.raises(InvalidRequestError, match=r"chunk\.sampling"):
        engine.open("a", key, COUPLED)


def test_local_client_is_a_draft_client():
    engine = make_engine(make_drafter())
    client = LocalDraftClient(engine)
    key = SessionKey("r", 0)
    assert client.is_ready()
    assert client.open_session(key, GREEDY)
    assert feed(client, key, 0, features(6)) == 6
    assert client.acknowledged_length(key) == 6
    (result,) = client.collect(client.start_round(round_of(sequence(key, 7))), 1.0)
    assert result.proposal.num_draft_tokens == client.block_size == BLOCK
    (stale,) = client.collect(client.start_round(round_of(sequence(key, 5))), 1.0)
    assert stale.outcome is DraftOutcome.UNKNOWN_SESSION
    assert not client.has_session(key)
    client.close()
    assert not client.is_ready()
    assert not client.open_session(key, GREEDY)
    engine.check_integrity()
    assert engine.num_sessions == 0
