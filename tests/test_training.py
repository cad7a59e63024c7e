"""The parts of training, and training of the small target, on models of few parameters."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.models.checkpoint import load_drafter
from cluster.models.dspark import DSparkDrafter
from cluster.training import corpus, target
from cluster.training.drafter_loss import (
    LossWeights,
    block_loss,
    sample_anchors,
    sample_answer_anchors,
)
from cluster.training.features import FeatureTarget
from cluster.training.optimization import Budget, learning_rate_factor
from cluster.training.parallel import Worker, run_workers
from cluster.training.tokenizer import train_tokenizer
from tests.models import save_tiny_drafter
from tests.training_tools import DOCUMENTS, LENGTH, VOCAB_SIZE, build_tiny_target, save_target


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "build_target", build_tiny_target)
    monkeypatch.setattr(target, "SEQUENCE_LENGTH", LENGTH)
    monkeypatch.setattr(target, "load_documents", lambda: (DOCUMENTS, DOCUMENTS[:2]))


@pytest.fixture
def target_folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer and an untrained tiny target."""
    return save_target(tmp_path / "target")


def run_target(folder: Path, state: Path, steps: int, *extra: str) -> dict:
    options = ["--out", str(folder), "--state", str(state), "--steps", str(steps), "--batch", "2"]
    run_workers(target.train, target.parse_arguments([*options, "--processes", "1", *extra]))
    return json.loads((folder / "training.json").read_text())


def tiny_drafter(target_folder: Path, **overrides) -> DSparkDrafter:
    folder = target_folder.parent / "drafter"
    return load_drafter(save_tiny_drafter(folder, str(target_folder), mask_token_id=2, **overrides))


# -------------------------------------------------------------------------------------- corpus


def test_heldout_modules_are_never_trained_on():
    training, heldout = corpus.load_documents()
    assert {document.path for document in heldout} == corpus.heldout_paths()
    assert not {d.path for d in training} & {d.path for d in heldout}
    assert not {d.text for d in training} & {d.text for d in heldout}
    parts = {part for document in training for part in Path(document.path).parts[:-1]}
    assert not parts & {"test", "tests", "site-packages"}
    share = sum(len(d.text) for d in heldout) / sum(len(d.text) for d in training + heldout)
    assert 0.04 < share < 0.08


def test_stream_repeats_itself_and_covers_every_token(target_folder):
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    stream = corpus.TokenStream(DOCUMENTS, tokenizer, LENGTH)
    count = stream.windows_per_epoch
    late = stream.window(count + 1)
    again = corpus.TokenStream(DOCUMENTS, tokenizer, LENGTH)
    torch.testing.assert_close(again.window(count + 1), late)
    seen = torch.cat(list(again.epoch()))
    assert len(seen) == count * LENGTH > again.num_tokens - LENGTH
    assert not torch.equal(stream.window(0), stream.window(count))
    with pytest.raises(ValueError, match="fill"):
        corpus.TokenStream(DOCUMENTS, tokenizer, 10**6)


def test_tokenizer_is_exact_and_reversible(target_folder):
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    assert len(tokenizer) == VOCAB_SIZE
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 1, 2)
    text = "def f():\n\treturn 'Straße', 12345  # ☃\n\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(ValueError, match="tokens"):
        train_tokenizer(["too little"], 4096)


# ---------------------------------------------------------------------------------- the target


def test_target_learns(target_folder, tmp_path):
    first = run_target(target_folder, tmp_path / "short", 1)
    last = run_target(target_folder, tmp_path / "long", 30)
    assert last["heldout_loss"] < first["heldout_loss"] - 0.5
    model = AutoModelForCausalLM.from_pretrained(target_folder)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 0


def test_resumed_target_run_equals_unbroken_run(target_folder, tmp_path, monkeypatch):
    unbroken = run_target(target_folder, tmp_path / "unbroken", 6)
    save = target.save_training_state

    def save_and_stop(folder, step, *rest):
        save(folder, step, *rest)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target, "save_training_state", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run_target(target_folder, tmp_path / "broken", 6, "--save-seconds", "0")
    resumed = run_target(target_folder, tmp_path / "broken", 6)
    assert resumed["heldout_loss"] == unbroken["heldout_loss"]


def test_halving_keeps_every_prediction():
    tokens = torch.arange(18).view(2, 9)
    halves = target.halve(tokens)
    pairs = {(int(a), int(b)) for row in halves for a, b in pairwise(row)}
    assert pairs == {(int(a), int(b)) for row in tokens for a, b in pairwise(row)}


# ---------------------------------------------------------------------------------- the losses


def test_loss_is_made_of_exact_acceptance(target_folder):
    model = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    network = tiny_drafter(target_folder, block_size=3, markov_rank=4)
    source = FeatureTarget(model, network.config.target_layer_ids)
    tokens = torch.randint(VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))
    features, logits = source.run(tokens)
    anchors = torch.tensor([[1, 4], [0, 8]])
    result = block_loss(network, tokens, features, logits, anchors)
    hidden = network.packed_hidden(tokens, network.project_features(features), anchors)
    q = network.block_logits(hidden[1, 1], tokens[1, 8:11]).softmax(-1)
    p = logits[1, 8:11].softmax(-1)
    torch.testing.assert_close(result.acceptance[1, 1], torch.minimum(p, q).sum(-1))
    confidence = network.confidence_logit(hidden[1, 1], tokens[1, 8:11]).sigmoid()
    torch.testing.assert_close(result.confidence[1, 1], confidence)


def test_guesses_that_are_not_counted_change_nothing(target_folder):
    model = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    network = tiny_drafter(target_folder, block_size=3)
    tokens = torch.randint(VOCAB_SIZE, (1, 10), generator=torch.Generator().manual_seed(0))
    outputs = FeatureTarget(model, network.config.target_layer_ids).run(tokens)
    weights = LossWeights(confidence=0.3, position_decay=2.0)
    alone = block_loss(network, tokens, *outputs, torch.tensor([[2]]), None, weights)
    counted = torch.tensor([[[True] * 3, [False] * 3]])
    both = block_loss(network, tokens, *outputs, torch.tensor([[2, 8]]), counted, weights)
    torch.testing.assert_close(both.total, alone.total)
    torch.testing.assert_close(both.expected_length(), alone.expected_length())
    parts = 0.1 * alone.terms["cross_entropy"] + 0.9 * alone.terms["total_variation"]
    torch.testing.assert_close(alone.total, parts + 0.3 * alone.terms["confidence"])


def test_anchors_of_answers_lie_before_what_is_learned():
    answers = torch.zeros(2, 12, dtype=torch.bool)
    answers[0, 4:9] = answers[1, 10:12] = True
    anchors, counted = sample_answer_anchors(answers, 3, 6, torch.Generator().manual_seed(0))
    learned = {(row, int(a)) for row in range(2) for a in anchors[row][counted[row].any(-1)]}
    assert learned == {(0, 3), (0, 4), (0, 5), (0, 6), (0, 7), (1, 9), (1, 10)}
    for row, anchor in learned:
        place = int((anchors[row] == anchor).nonzero()[0])
        inside = [a < 12 and bool(answers[row, a]) for a in range(anchor + 1, anchor + 4)]
        assert counted[row, place].tolist() == inside


def test_anchors_leave_room_for_their_block():
    anchors = sample_anchors(50, 20, 7, 13, torch.Generator().manual_seed(0))
    assert (anchors == torch.arange(13)).all()
    with pytest.raises(ValueError, match="13 anchors"):
        sample_anchors(1, 20, 7, 14, torch.Generator())


def test_features_are_taken_before_the_final_norm(target_folder):
    model = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    features, logits = FeatureTarget(model, (-1, 1, 3)).run(torch.tensor([[5, 6, 7]]))
    embedding, _, last = features.chunk(3, dim=-1)
    torch.testing.assert_close(embedding, model.model.embed_tokens(torch.tensor([[5, 6, 7]])))
    torch.testing.assert_close(model.lm_head(model.model.norm(last)), logits)


# ------------------------------------------------------------------------------------ schedule


def test_learning_rate_warms_up_and_decays_to_zero():
    rates = [learning_rate_factor(i / 100) for i in range(101)]
    assert rates[0] < 0.01
    assert max(rates) == 1.0
    assert rates[-1] == 0.0
    assert all(a >= b for a, b in pairwise(rates[5:]))


def test_budget_in_minutes_counts_earlier_time():
    budget = Budget(minutes=1.0, spent_seconds=30.0)
    assert 0.5 <= budget.progress(step=0) < 0.6
    assert Budget(minutes=1.0, steps=4).progress(step=1) == 0.25


def test_workers_share_rows_and_mean_gradients():
    rows = torch.arange(4)
    assert torch.cat([Worker(r, 2).share(rows) for r in range(2)]).sort().values.equal(rows)
    alone = Worker()
    assert alone.leads
    assert alone.agree(0.3) == 0.3


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_workers_trains_on_its_rows(target_folder, tmp_path, monkeypatch, rank):
    monkeypatch.setattr(Worker, "agree", lambda self, value: value)
    monkeypatch.setattr(Worker, "average_gradients", lambda self, parameters: None)
    worker = Worker(rank, 2)
    options = ["--out", str(target_folder), "--steps", "4", "--batch", "4"]
    target.train(target.parse_arguments(options), worker)
    assert (target_folder / "training.json").exists() == worker.leads
