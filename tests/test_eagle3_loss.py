"""Training-time test of EAGLE-3: what is learned is what serving computes."""

import pytest
import torch

from cluster.models.eagle3 import Eagle3Drafter
from cluster.models.eagle3_config import GEMMA4, LLAMA, QWEN3
from cluster.training.eagle3_loss import eagle3_loss, unrolled_hidden
from tests.eagle3_tools import ARCHITECTURES, VOCAB, WIDTH, PlainCache, make_eagle3

LENGTH = 12
STEPS = 4
ANCHORS = torch.tensor([[1, 4, 7], [2, 3, 7]])


def make_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=generator)
    features = torch.randn(2, LENGTH, 3 * WIDTH, generator=generator)
    return tokens, features, 2 * torch.randn(2, LENGTH, VOCAB, generator=generator)


def served_hidden(
    drafter: Eagle3Drafter, tokens: torch.Tensor, features: torch.Tensor, anchor: int
) -> torch.Tensor:
    """One session's states, entry after entry, as the draft engine runs them."""
    cache, zero = PlainCache(), torch.zeros(1, dtype=torch.int64)
    projected, states = drafter.project_features(features), []
    for position in range(anchor - 1 + STEPS):
        known = position < anchor
        hidden = projected[position : position + 1] if known else states[-1]
        place = torch.tensor([position])
        token = tokens[position + 1 : position + 2]
        states.append(drafter(hidden, token, place, cache.attend(zero, place)))
    return torch.cat(states[anchor - 1 :])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_step_is_what_serving_computes(architecture):
    drafter = make_eagle3(architecture, ttt_length=STEPS)
    tokens, features, _ = make_batch()
    unrolled = unrolled_hidden(drafter, tokens, drafter.project_features(features), ANCHORS)
    assert unrolled.shape == (2, 3, STEPS, WIDTH)
    for row in range(2):
        for column, anchor in enumerate(ANCHORS[row].tolist()):
            served = served_hidden(drafter, tokens[row], features[row], anchor)
            ours = unrolled[row, column]
            torch.testing.assert_close(ours, served, atol=1e-5, rtol=1e-5)
            logits = drafter.logits(ours), drafter.logits(served)
            torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_loss_is_cross_entropy_to_the_law_with_decay():
    drafter = make_eagle3(QWEN3, ttt_length=STEPS, step_loss_decay=0.5)
    tokens, features, target = make_batch()
    loss = eagle3_loss(drafter, tokens, features, target, ANCHORS)
    total, weight = 0.0, 0.0
    for row in range(2):
        for column, anchor in enumerate(ANCHORS[row].tolist()):
            q = drafter.logits(served_hidden(drafter, tokens[row], features[row], anchor))
            p = target[row, anchor : anchor + STEPS].softmax(-1)
            entropy = -(p * q.log_softmax(-1)).sum(-1)
            acceptance = torch.minimum(p, q.softmax(-1)).sum(-1)
            torch.testing.assert_close(loss.acceptance[row, column], acceptance)
            for step in range(STEPS):
                total += float(entropy[step]) * 0.5**step
                weight += 0.5**step
    assert float(loss.total) == pytest.approx(total / weight, rel=1e-5)
    assert float(loss.weight) == pytest.approx(weight)


def test_reduced_vocabulary_learns_what_it_can():
    drafter = make_eagle3(LLAMA, ttt_length=STEPS, step_loss_decay=1.0)
    tokens, features, target = make_batch()
    known = drafter.draft_token_ids()
    loss = eagle3_loss(drafter, tokens, features, target, ANCHORS)
    projected = drafter.project_features(features)
    q = drafter.logits(unrolled_hidden(drafter, tokens, projected, ANCHORS))
    entropies = []
    for row in range(2):
        for column, anchor in enumerate(ANCHORS[row].tolist()):
            for step in range(STEPS):
                logits, guess = target[row, anchor + step], q[row, column, step]
                acceptance = torch.minimum(logits.softmax(-1), guess.softmax(-1)).sum()
                torch.testing.assert_close(loss.acceptance[row, column, step], acceptance)
                if int(logits.argmax()) in known.tolist():
                    soft = logits[known].softmax(-1)
                    entropies.append(-(soft * guess[known].log_softmax(-1)).sum())
    assert 0 < len(entropies) < ANCHORS.numel() * STEPS
    torch.testing.assert_close(loss.total, torch.stack(entropies).mean())


def test_uncounted_guesses_change_nothing():
    """Chains may reach beyond the text where ``counted`` leaves the excess out."""
    drafter = make_eagle3(QWEN3, ttt_length=STEPS)
    tokens, features, target = make_batch()
    anchors = torch.full((2, 1), LENGTH - 3)
    counted = torch.tensor([True, True, False, False]).expand(2, 1, -1)
    loss = eagle3_loss(drafter, tokens, features, target, anchors, counted)
    short = make_eagle3(QWEN3, ttt_length=2)
    expected = eagle3_loss(short, tokens, features, target, anchors)
    torch.testing.assert_close(loss.total, expected.total)
    torch.testing.assert_close(loss.expected_length(), expected.expected_length())


@pytest.mark.parametrize("architecture", [QWEN3, GEMMA4])
def test_learning_reaches_every_weight_and_the_text(architecture):
    drafter = make_eagle3(architecture, ttt_length=STEPS).train().requires_grad_(True)
    tokens, features, target = make_batch()
    optimizer = torch.optim.Adam(drafter.parameters(), lr=0.02)
    first = eagle3_loss(drafter, tokens, features, target, ANCHORS)
    first.total.backward()
    for name, parameter in drafter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    for _ in range(60):
        optimizer.step()
        optimizer.zero_grad()
        loss = eagle3_loss(drafter, tokens, features, target, ANCHORS)
        loss.total.backward()
    assert float(loss.acceptance.mean()) > float(first.acceptance.mean()) + 0.3
