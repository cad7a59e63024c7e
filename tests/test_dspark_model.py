"""Block drafters of every published architecture against a plain implementation of the papers."""

from typing import Any

import pytest
import torch

from cluster.models.dspark import DSparkDrafter
from tests.block_drafters import TINY_DEEPSEEK_V4, TINY_GEMMA4, TINY_QWEN3, make_drafter
from tests.reference_dspark import Reference, reference

LENGTH = 9
DFLASH: dict[str, Any] = {"markov_rank": 0, "enable_confidence_head": False}
NO_K_EQ_V: dict[str, Any] = {"attention_k_eq_v": False, "final_logit_softcapping": None}

CASES: dict[str, dict[str, Any]] = {
    "vanilla": TINY_QWEN3,
    "vanilla-alone": {**TINY_QWEN3, "confidence_head_with_markov": False},
    "gated": {**TINY_QWEN3, "markov_head_type": "gated"},
    "gated-alone": {
        **TINY_QWEN3,
        "markov_head_type": "gated",
        "confidence_head_with_markov": False,
    },
    "rnn": {**TINY_QWEN3, "markov_head_type": "rnn"},
    "rnn-without-confidence": {
        **TINY_QWEN3,
        "markov_head_type": "rnn",
        "enable_confidence_head": False,
    },
    "biased": {**TINY_QWEN3, "attention_bias": True},
    "dflash": {**TINY_QWEN3, **DFLASH},
    "dflash-with-confidence": {
        **TINY_QWEN3,
        "markov_rank": 0,
        "confidence_head_with_markov": False,
    },
    "gemma4": TINY_GEMMA4,
    "gemma4-rnn": {**TINY_GEMMA4, "markov_head_type": "rnn"},
    "gemma4-dflash": {**TINY_GEMMA4, **DFLASH, **NO_K_EQ_V},
    "deepseek-v4": TINY_DEEPSEEK_V4,
    "deepseek-v4-own-experts": {
        **TINY_DEEPSEEK_V4,
        "dspark_n_routed_experts": 7,
        "dspark_num_experts_per_tok": 3,
    },
}
ARCHITECTURES = ("vanilla", "gemma4", "gemma4-dflash", "deepseek-v4")


def pair(case: str) -> tuple[DSparkDrafter, Reference]:
    """The same drafter twice: ours and the reference."""
    drafter = make_drafter(CASES[case])
    return drafter, reference(CASES[case], drafter.checkpoint_tensors())


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(LENGTH, 48, generator=torch.Generator().manual_seed(1))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), atol=1e-5, rtol=1e-5)


def feed(
    drafter: DSparkDrafter, features: torch.Tensor, start: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(start, start + len(features))
    return drafter.context_kv(drafter.project_features(features), positions)


def run_block(
    drafter: DSparkDrafter, keys: torch.Tensor, values: torch.Tensor, anchor: int, token: int
) -> torch.Tensor:
    return drafter.block_hidden(
        torch.tensor([token]),
        torch.tensor([anchor]),
        keys[:, None],
        values[:, None],
        torch.tensor([keys.shape[1]]),
    )[0]


# --------------------------------------------------------------------------------- the same maths


@pytest.mark.parametrize("case", CASES)
def test_block_and_heads_equal_the_reference(case, features):
    drafter, plain = pair(case)
    keys, values = feed(drafter, features[:7])
    ours = run_block(drafter, keys, values, anchor=7, token=11)
    theirs = plain.block(features, token=11, position=7)
    close(ours, theirs)

    previous = [11, 3, 49, 20]
    logits, confidence = plain.draft(theirs, previous)
    base, state = drafter.base_logits(ours), None
    for slot, token in enumerate(previous):
        given = torch.tensor([token])
        row = ours[slot][None]
        if confidence is not None:
            close(drafter.confidence_logit(row, given)[0], confidence[slot])
        step, state = drafter.markov_step(base[slot][None], given, row, state)
        close(step[0], logits[slot])
    close(drafter.block_logits(ours[None], torch.tensor([previous]))[0], logits)


@pytest.mark.parametrize("case", ARCHITECTURES)
@pytest.mark.parametrize("anchor", [0, 1, LENGTH])
def test_short_and_long_contexts(case, features, anchor):
    drafter, plain = pair(case)
    keys, values = feed(drafter, features[:anchor])
    ours = run_block(drafter, keys, values, anchor, token=11)
    close(ours, plain.block(features, token=11, position=anchor))


@pytest.mark.parametrize("case", ARCHITECTURES)
@pytest.mark.parametrize("sizes", [[1] * LENGTH, [4, 1, 4], [2, 7]])
def test_context_in_several_feeds(case, features, sizes):
    drafter, plain = pair(case)
    parts, start = [], 0
    for size in sizes:
        parts.append(feed(drafter, features[start : start + size], start))
        start += size
    keys, values = (torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True))
    ours = run_block(drafter, keys, values, anchor=LENGTH, token=3)
    close(ours, plain.block(features, token=3, position=LENGTH))


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_batch_of_different_lengths(case, features):
    drafter, plain = pair(case)
    keys, values = feed(drafter, features)
    anchors, tokens = torch.tensor([7, 0, 9, 3]), torch.tensor([3, 4, 5, 6])
    batch_keys = keys[:, None].repeat(1, 4, 1, 1, 1)
    batch_values = values[:, None].repeat(1, 4, 1, 1, 1)
    for row, length in enumerate(anchors.tolist()):
        # Whatever lies behind a session's length may be rubbish.
        batch_keys[:, row, length:] = 1e4
        batch_values[:, row, length:] = 1e4
    together = drafter.block_hidden(tokens, anchors, batch_keys, batch_values, anchors)
    for row in range(4):
        anchor, token = int(anchors[row]), int(tokens[row])
        close(together[row], plain.block(features, token, anchor))


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_packed_anchors_equal_blocks_in_serving(case):
    drafter, plain = pair(case)
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, LENGTH, 48, generator=generator)
    tokens = torch.randint(50, (2, LENGTH), generator=generator)
    anchors = torch.tensor([[0, 2, 5], [1, 4, 8]])
    packed = drafter.packed_hidden(tokens, drafter.project_features(features), anchors)
    for row in range(2):
        for column, anchor in enumerate(anchors[row].tolist()):
            token = int(tokens[row, anchor])
            keys, values = feed(drafter, features[row, :anchor])
            served = run_block(drafter, keys, values, anchor, token)
            torch.testing.assert_close(packed[row, column], served, atol=1e-5, rtol=1e-5)
            close(packed[row, column], plain.block(features[row], token, anchor))


# -------------------------------------------------------------------------------------- the rest


def test_only_the_window_need_be_kept(features):
    drafter, plain = pair("deepseek-v4")
    window = drafter.config.context_window
    assert window == 5
    keys, values = feed(drafter, features)
    kept = run_block(drafter, keys[:, -window:], values[:, -window:], LENGTH, token=8)
    close(kept, plain.block(features, token=8, position=LENGTH))
    less = run_block(drafter, keys[:, 1 - window :], values[:, 1 - window :], LENGTH, token=8)
    assert not torch.allclose(less, kept, atol=1e-3)


def test_other_drafters_see_everything():
    assert make_drafter(TINY_QWEN3).config.context_window is None
    assert make_drafter(TINY_GEMMA4).config.context_window is None


def test_fewer_slots_are_the_first_slots(features):
    drafter = make_drafter(TINY_QWEN3)
    keys, values = feed(drafter, features)
    length = torch.tensor([LENGTH])
    arguments = torch.tensor([3]), length, keys[:, None], values[:, None], length
    whole = drafter.block_hidden(*arguments)
    torch.testing.assert_close(drafter.block_hidden(*arguments, num_slots=2), whole[:, :2])
    for wrong in (0, 5):
        with pytest.raises(ValueError, match="num_slots"):
            drafter.block_hidden(*arguments, num_slots=wrong)


def test_confidence_needs_a_head():
    drafter = make_drafter({**TINY_QWEN3, **DFLASH})
    with pytest.raises(ValueError, match="confidence"):
        drafter.confidence_logit(torch.randn(2, 16), torch.tensor([1, 2]))


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_every_weight_learns(case, features):
    drafter = make_drafter(CASES[case]).requires_grad_(True)
    tokens = torch.arange(LENGTH)[None]
    anchors = torch.tensor([[3, 5]])
    hidden = drafter.packed_hidden(tokens, drafter.project_features(features[None]), anchors)
    previous = torch.arange(8).view(1, 2, 4)
    loss = drafter.block_logits(hidden, previous).logsumexp(dim=-1).sum()
    if drafter.confidence_head is not None:
        loss = loss + drafter.confidence_logit(hidden, previous).sum()
    loss.backward()
    still = [name for name, value in drafter.named_parameters() if value.grad is None]
    assert still == []
