"""The EAGLE-3 drafter against the loops of ``reference_eagle3``."""

import pytest
import torch

from cluster.models.eagle3 import Eagle3Drafter
from cluster.models.eagle3_config import LLAMA, QWEN3
from tests.eagle3_tools import (
    ARCHITECTURES,
    VOCAB,
    WIDTH,
    PlainCache,
    make_eagle3,
    make_reference,
)

LENGTH = 9
STEPS = 5
EXACT = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=ARCHITECTURES)
def drafter(request: pytest.FixtureRequest) -> Eagle3Drafter:
    return make_eagle3(request.param)


def make_text(seed: int = 1, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenated features of positions 0 … and the tokens one further on."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(length, 3 * WIDTH, generator=generator)
    return features, torch.randint(VOCAB, (length,), generator=generator)


def run(
    drafter: Eagle3Drafter,
    cache: PlainCache,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    start: int = 0,
) -> torch.Tensor:
    """Entries ``start``, ``start + 1``, … of sequence 0 in one pass."""
    positions = torch.arange(start, start + len(tokens))
    owners = torch.zeros_like(positions)
    return drafter(hidden, tokens, positions, cache.attend(owners, positions))


def reference_prefill(drafter: Eagle3Drafter, features: torch.Tensor, tokens: torch.Tensor):
    reference = make_reference(drafter)
    rows = [
        reference.add(reference.project(row), int(token))
        for row, token in zip(features, tokens, strict=True)
    ]
    return reference, torch.stack(rows)


def test_prefill_agrees_with_loops(drafter):
    features, tokens = make_text()
    hidden = run(drafter, PlainCache(), drafter.project_features(features), tokens)
    reference, expected = reference_prefill(drafter, features, tokens)
    torch.testing.assert_close(hidden, expected, **EXACT)
    logits = torch.stack([reference.logits(row) for row in expected])
    torch.testing.assert_close(drafter.logits(hidden), logits, **EXACT)


def test_prefill_in_parts_agrees_with_loops(drafter):
    features, tokens = make_text()
    projected, cache = drafter.project_features(features), PlainCache()
    parts = [
        run(drafter, cache, projected[low:high], tokens[low:high], low)
        for low, high in ((0, 4), (4, 5), (5, 9))
    ]
    _, expected = reference_prefill(drafter, features, tokens)
    torch.testing.assert_close(torch.cat(parts), expected, **EXACT)


def test_drafting_deep_and_the_next_round_agree_with_loops(drafter):
    """Two rounds: five tokens drafted on the drafter's own states, two accepted."""
    features, tokens = make_text()
    cache, known = PlainCache(), LENGTH - 3
    hidden = run(drafter, cache, drafter.project_features(features[:known]), tokens[:known])[-1:]
    reference, expected = reference_prefill(drafter, features[:known], tokens[:known])
    own = expected[-1]
    for step in range(STEPS):
        laws = drafter.logits(hidden[0]), reference.logits(own)
        torch.testing.assert_close(*laws, **EXACT)
        token = laws[0].argmax()
        hidden = run(drafter, cache, hidden, token[None], known + step)
        own = reference.add(own, int(token))
    # The target read three positions more; their entries replace the guessed ones.
    late = slice(known, LENGTH)
    hidden = run(drafter, cache, drafter.project_features(features[late]), tokens[late], known)
    _, expected = reference_prefill(drafter, features, tokens)
    torch.testing.assert_close(hidden, expected[late], **EXACT)


def test_batch_agrees_with_each_alone(drafter):
    """Sequences of different lengths prefilled and drafted in shared passes."""
    lengths = (3, LENGTH, 1)
    texts = [make_text(seed, length) for seed, length in enumerate(lengths)]
    owners = torch.cat([torch.full((length,), row) for row, length in enumerate(lengths)])
    positions = torch.cat([torch.arange(length) for length in lengths])
    cache = PlainCache()
    projected = drafter.project_features(torch.cat([features for features, _ in texts]))
    tokens = torch.cat([tokens for _, tokens in texts])
    hidden = drafter(projected, tokens, positions, cache.attend(owners, positions))
    hidden = hidden[torch.tensor(lengths).cumsum(0) - 1]
    references = [reference_prefill(drafter, *text) for text in texts]
    states = [expected[-1] for _, expected in references]
    for step in range(STEPS):
        logits = drafter.logits(hidden)
        expected = torch.stack(
            [
                reference.logits(state)
                for (reference, _), state in zip(references, states, strict=True)
            ]
        )
        torch.testing.assert_close(logits, expected, **EXACT)
        chosen, places = logits.argmax(dim=-1), torch.tensor(lengths) + step
        hidden = drafter(hidden, chosen, places, cache.attend(torch.arange(3), places))
        states = [
            reference.add(state, int(token))
            for (reference, _), state, token in zip(references, states, chosen, strict=True)
        ]


def test_context_keys_and_values_are_those_of_a_pass(drafter):
    features, tokens = make_text()
    projected, seen = drafter.project_features(features), []

    def attend(layer, query, key, value):
        seen.append((key, value))
        return query

    drafter(projected, tokens, torch.arange(LENGTH), attend)
    alone = drafter.context_kv(projected, tokens, torch.arange(LENGTH))
    torch.testing.assert_close(alone, seen[0])


def test_reduced_vocabulary_gives_target_ids():
    drafter = make_eagle3(LLAMA)
    hidden = torch.randn(4, WIDTH)
    logits, known = drafter.logits(hidden), drafter.draft_token_ids()
    torch.testing.assert_close(logits[:, known], drafter.draft_logits(hidden))
    unknown = torch.ones(VOCAB, dtype=torch.bool)
    unknown[known] = False
    assert int(unknown.sum()) == VOCAB - 20
    assert torch.isneginf(logits[:, unknown]).all()
    assert torch.equal(drafter.t2d, ~unknown)


def test_draft_vocabulary_must_fit():
    drafter = make_eagle3(LLAMA)
    for wrong in (torch.arange(19), torch.arange(20) + 31, torch.zeros(20, dtype=torch.int64)):
        with pytest.raises(ValueError, match="20 different ids below 50"):
            drafter.set_draft_token_ids(wrong)
    with pytest.raises(ValueError, match="every token"):
        make_eagle3(QWEN3).set_draft_token_ids(torch.arange(50))
