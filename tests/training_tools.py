"""A tiny target with a tokenizer, documents and configurations for tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from cluster.training import target
from cluster.training.config import TrainConfig, load_train_config
from cluster.training.corpus import Document
from cluster.training.tokenizer import save_tokenizer, train_tokenizer

TEXT = (
    "def add(a, b):\n    return a + b\n\n\nclass Stack:\n    def push(self, item):\n        pass\n"
)
DOCUMENTS = [Document(f"{i}.py", f"# file {i}\n" + TEXT * (3 + i % 3)) for i in range(8)]
VOCAB_SIZE = 300
LENGTH = 32


def build_tiny_target(vocab_size: int = VOCAB_SIZE, eos: int = 0, pad: int = 1) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=pad,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config)


def save_target(folder: Path) -> Path:
    """Writes a tokenizer and an untrained tiny target; returns ``folder``."""
    folder.mkdir()
    save_tokenizer(train_tokenizer([d.text for d in DOCUMENTS] * 2, VOCAB_SIZE), folder)
    torch.manual_seed(0)
    target.export_target(build_tiny_target(), AutoTokenizer.from_pretrained(folder), folder)
    return folder


def write_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """A small run over text files in ``folder``; ``sections`` replace single keys of it.

    ``folder`` has the target in ``target``; the run's output is ``folder / "out"``.
    """
    documents = []
    for document in DOCUMENTS:
        path = folder / document.path.replace(".py", ".txt")
        path.write_text(document.text)
        documents.append(path.name)
    values: dict[str, dict[str, Any]] = {
        "target": {"model": "target"},
        "data": {
            "files": documents[:6],
            "heldout_files": documents[6:],
            "sequence_length": LENGTH,
        },
        "drafter": {"num_hidden_layers": 1, "block_size": 3},
        "optimization": {"steps": 4, "batch_tokens": 4 * LENGTH, "precision": "float32"},
        "output": {"folder": "out", "log_steps": 1, "tensorboard": False, "plots": False},
    }
    method = sections.get("drafter", {}).get("method", "dspark")
    if method != "draft_model":
        values["drafter"]["num_anchors"] = 8
    if method == "eagle3":
        del values["drafter"]["num_hidden_layers"]
    for section, changes in sections.items():
        values.setdefault(section, {}).update(changes)
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def make_config(folder: Path, **sections: dict[str, Any]) -> TrainConfig:
    """What ``write_config`` writes, read back."""
    return load_train_config(write_config(folder, **sections))


def write_jsonl(path: Path, *rows: object) -> Path:
    """Writes one JSON value a line; strings go in as they are, to be broken on purpose."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path
