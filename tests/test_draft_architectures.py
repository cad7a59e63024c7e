"""The draft engine serves drafters of every architecture: what it proposes over growing contexts is
what the plain implementation says."""

import pytest
import torch

from cluster.engine.draft_client import DraftSampling, SessionKey
from tests.block_drafters import TINY_DEEPSEEK_V4, TINY_GEMMA4, TINY_QWEN3, make_drafter
from tests.draft_helpers import append, make_engine, round_of, sequence
from tests.reference_dspark import Reference, reference

CONFIGS = {"qwen3": TINY_QWEN3, "gemma4": TINY_GEMMA4, "deepseek-v4": TINY_DEEPSEEK_V4}


def greedy_block(plain: Reference, features: torch.Tensor, token: int, position: int) -> list[int]:
    """The likeliest token of each slot, given those before it."""
    hidden = plain.block(features, token, position)
    tokens = [token]
    for _ in range(len(hidden)):
        previous = tokens + [0] * (len(hidden) - len(tokens))
        logits, _ = plain.draft(hidden, previous)
        tokens.append(int(logits[len(tokens) - 1].argmax()))
    return tokens[1:]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_rounds_over_a_growing_context(architecture):
    data = CONFIGS[architecture]
    drafter = make_drafter(data)
    plain = reference(data, drafter.checkpoint_tensors())
    features = torch.randn(14, 48, generator=torch.Generator().manual_seed(4))
    rows = drafter.project_features(features)
    # Pages of two positions: a window that ends inside of one, and moves over several.
    engine = make_engine(drafter, page_size=2)
    keys = [SessionKey("short", 0), SessionKey("long", 0)]
    for key in keys:
        engine.open("a", key, DraftSampling(temperature=0.0))
    append(engine, "a", keys[1], 0, rows[:9])
    lengths = [0, 9]
    for accepted in (1, 3, 1):
        lengths = [length + accepted for length in lengths]
        parts = [
            sequence(
                key,
                length + 1,
                features=rows[length - accepted : length],
                anchor=length % 50,
                count=drafter.config.block_size,
            )
            for key, length in zip(keys, lengths, strict=True)
        ]
        (results,) = engine.draft([("a", round_of(*parts))])
        for result, length in zip(results, lengths, strict=True):
            assert result.proposal is not None
            expected = greedy_block(plain, features, token=length % 50, position=length)
            assert list(result.proposal.draft_token_ids) == expected
