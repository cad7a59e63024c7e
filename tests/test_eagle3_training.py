"""``dspark train`` with method eagle3, on models of a few thousand parameters."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3ForCausalLM

from cluster.errors import ConfigError
from cluster.models.eagle3_checkpoint import load_eagle3
from cluster.models.eagle3_config import LLAMA, QWEN3
from cluster.section import parse_section
from cluster.training.config import TrainConfig
from cluster.training.dataset import Batch
from cluster.training.eagle3_method import Eagle3Method
from cluster.training.loop import train
from cluster.training.parallel import Worker
from cluster.training.tokenizer import save_tokenizer, train_tokenizer
from tests.models import save_tiny_target

TEXT = (
    "def add(a, b):\n    return a + b\n\n\nclass Stack:\n    def push(self, item):\n        pass\n"
)
VOCAB = 300


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Documents and a random target with a tokenizer, the target's law sharp enough to learn."""
    for index in range(4):
        (tmp_path / f"{index}.py").write_text(f"# file {index}\n" + TEXT * 8)
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 4}
    target = tmp_path / "target"
    save_tiny_target(target, scale=2.0, eos_token_id=0, pad_token_id=1, **shape)
    save_tokenizer(train_tokenizer([TEXT * 40], VOCAB), target)
    return tmp_path


def make_config(folder: Path, out: str, steps: int, **drafter: Any) -> TrainConfig:
    config = parse_section(
        TrainConfig,
        {
            "target": {"model": str(folder / "target")},
            "data": {
                "files": [str(folder / f"{index}.py") for index in range(3)],
                "heldout_files": [str(folder / "3.py")],
                "sequence_length": 32,
            },
            "drafter": {"method": "eagle3", "block_size": 3, "num_anchors": 12, **drafter},
            "optimization": {"steps": steps, "batch_tokens": 128, "precision": "float32"},
            "output": {"folder": str(folder / out), "tensorboard": False, "plots": False},
        },
    )
    config.check_together()
    return config


def run(folder: Path, out: str, steps: int, **drafter: Any) -> dict[str, Any]:
    return train(make_config(folder, out, steps, **drafter), Worker())


def test_learns_and_keeps_embedding_and_head(folder):
    first = run(folder, "first", 1)
    last = run(folder, "last", 60)
    assert last["heldout_acceptance_length"] > first["heldout_acceptance_length"] + 0.1
    assert len(last["heldout_acceptance"]) == 3
    drafter = load_eagle3(folder / "last")
    assert drafter.config.architecture == QWEN3
    assert drafter.config.target_layer_ids == (0, 1, 2, 3)
    assert (drafter.config.ttt_length, drafter.config.step_loss_decay) == (3, 0.8)
    target = Qwen3ForCausalLM.from_pretrained(folder / "target").to(torch.bfloat16).float()
    assert torch.equal(drafter.embed_tokens.weight, target.model.embed_tokens.weight)
    assert torch.equal(drafter.lm_head.weight, target.lm_head.weight)


def test_reduced_vocabulary_is_the_frequent_tokens(folder):
    run(folder, "small", 2, draft_vocab_size=40)
    drafter = load_eagle3(folder / "small")
    assert drafter.config.architecture == LLAMA
    assert "d2t" in load_file(folder / "small" / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    texts = [(folder / f"{index}.py").read_text() for index in range(3)]
    counts = Counter(token for text in texts for token in tokenizer(text)["input_ids"])
    known = set(drafter.draft_token_ids().tolist())
    assert {token for token, _ in counts.most_common(20)} <= known
    target = Qwen3ForCausalLM.from_pretrained(folder / "target").to(torch.bfloat16).float()
    rows = target.lm_head.weight[drafter.draft_token_ids()]
    assert torch.equal(drafter.lm_head.weight, rows)


def test_goes_on_from_a_drafter_of_the_same_shape(folder):
    first = run(folder, "first", 30, draft_vocab_size=40)
    start = str(folder / "first")
    further = run(folder, "further", 1, draft_vocab_size=40, init_from=start)
    known = [load_eagle3(folder / name).draft_token_ids() for name in ("first", "further")]
    assert torch.equal(*known)
    lengths = [summary["heldout_acceptance_length"] for summary in (first, further)]
    assert lengths[1] == pytest.approx(lengths[0], abs=0.1)
    with pytest.raises(ConfigError, match=r"draft_vocab_size is 40, not 41"):
        run(folder, "other", 1, draft_vocab_size=41, init_from=start)


def test_anchors_have_features_before_them_and_room_behind(folder):
    target = Qwen3ForCausalLM.from_pretrained(folder / "target")
    method = Eagle3Method(make_config(folder, "out", 1, num_anchors=28), target)
    tokens, generator = torch.zeros(2, 32, dtype=torch.int64), torch.Generator().manual_seed(0)
    batch = method.sample(Batch(tokens, None, (0, 1)), generator)
    assert torch.equal(batch.anchors, torch.arange(1, 29).expand(2, -1))
    answers = torch.zeros(2, 32, dtype=torch.bool)
    answers[0, 1:6], answers[1, 30:] = True, True
    batch = method.sample(Batch(tokens, answers, (0, 1)), generator)
    learned = {
        (row, int(anchor) + 1 + step)
        for row in range(2)
        for anchor, counted in zip(batch.anchors[row], batch.counted[row], strict=True)
        for step in range(3)
        if counted[step]
    }
    # The token at 1 cannot be drafted: nothing before its anchor has features.
    assert learned == {(0, position) for position in range(2, 6)} | {(1, 30), (1, 31)}
    assert int(batch.anchors.min()) >= 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_layer_ids", [-1, 2]),
        ("target_layer_ids", [1, 4]),
        ("draft_vocab_size", VOCAB + 1),
        ("num_anchors", 29),
        ("num_hidden_layers", 2),
        ("markov_rank", 8),
    ],
)
def test_wrong_settings_name_the_key(folder, key, value):
    with pytest.raises(ConfigError, match=key):
        run(folder, "wrong", 1, **{key: value})
