"""What training reads: configurations, prompts, documents, answers; and what it refuses."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster import cli
from cluster.errors import CheckpointError, ConfigError, DataError
from cluster.training import answers, loop
from cluster.training.answers import Conversation, regenerate
from cluster.training.config import load_train_config
from cluster.training.dataset import FixedSequences, Sequence
from cluster.training.loop import check_inputs
from cluster.training.parallel import Worker
from cluster.training.prompts import read_prompts
from cluster.training.sources import build_datasets
from tests.models import save_tiny_drafter
from tests.training_tools import (
    LENGTH,
    VOCAB_SIZE,
    make_config,
    save_target,
    write_config,
    write_jsonl,
)

CONFIGS = sorted((Path(__file__).parents[1] / "deployments" / "training").glob("*.yaml"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny target in ``target``."""
    save_target(tmp_path / "target")
    return tmp_path


# ------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_committed_configurations_are_valid(path: Path) -> None:
    config = load_train_config(path)
    assert Path(config.target.model).is_dir()


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (
            "drafter",
            {"block_sise": 3},
            "drafter.block_sise: unknown key (did you mean 'block_siz",
        ),
        ("drafter", {"method": "medusa"}, "drafter.method"),
        (
            "drafter",
            {"method": "dflash", "markov_rank": 4},
            "drafter.markov_rank: is for dspark, not",
        ),
        ("drafter", {"target_layer_ids": [1, 4]}, "drafter.target_layer_ids: 4 is out of range"),
        ("drafter", {"target_layer_ids": [2, 1]}, "drafter.target_layer_ids: must increase"),
        ("optimization", {"minutes": 3}, "exactly one of steps, epochs and minutes"),
        ("optimization", {"batch_tokens": 100}, "optimization.batch_tokens"),
        ("optimization", {"steps": None, "epochs": float("inf")}, "optimization.epochs: "),
        ("data", {"sampling": {"temperature": 101}}, "data.sampling.temperature: "),
        ("parallel", {"num_workers": 3}, "parallel.num_workers"),
        ("data", {"sequence_length": 256}, "optimization.batch_tokens"),
        ("data", {"files": ["missing.txt"]}, "missing.txt: cannot be read"),
        ("data", {"files": ["train.yaml", "prompts.jsonl"]}, "use one kind"),
        ("features", {"mode": "cache", "max_gb": -1}, "features.max_gb"),
        ("target", {"model": "/none/such"}, "target.model: no such folder: /none/such"),
        ("output", {"folder": "train.yaml/out"}, "output.folder: "),
        ("loss", {"total_variaton": 1}, "loss.total_variaton: unknown key (did you mean 'total_v"),
    ],
)
def test_bad_configuration_names_its_key(
    folder: Path, section: str, changes: dict[str, Any], message: str
) -> None:
    path = write_config(folder, **{section: changes})
    with pytest.raises((ConfigError, DataError)) as caught:
        check_inputs(load_train_config(path))
    assert message in str(caught.value)


def test_a_loss_without_its_head_is_refused(folder: Path) -> None:
    path = write_config(folder, drafter={"enable_confidence_head": False}, loss={"confidence": 1.0})
    with pytest.raises(ConfigError, match=r"loss\.confidence: drafter\.enable_confidence_head"):
        load_train_config(path)


def test_the_context_bounds_sequences(folder: Path) -> None:
    data = {"sequence_length": 256}
    config = make_config(folder, data=data, optimization={"batch_tokens": 1024})
    with pytest.raises(ConfigError, match=r"data\.sequence_length: 256 exceeds .* context of 128"):
        check_inputs(config)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"head_dim": 7}, "drafter.head_dim"),
        ({"num_key_value_heads": 4}, "drafter.num_key_value_heads"),
        ({"num_anchors": 30}, "drafter.num_anchors"),
        ({"block_size": LENGTH}, "drafter.block_size"),
        ({"method": "eagle3", "block_size": LENGTH}, "drafter.block_size"),
        ({"mask_token_id": VOCAB_SIZE}, "drafter.mask_token_id"),
    ],
)
def test_a_shape_that_does_not_fit_names_its_key(
    folder: Path, changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        loop.DrafterTraining(make_config(folder, drafter=changes), Worker())
    assert caught.value.key == key


def test_what_the_machine_does_not_have_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = write_config(folder, parallel={"use_gpu": True})
    assert cli.main(["train", str(path)]) == 2
    assert "parallel.use_gpu: " in capsys.readouterr().err
    path.write_text("")
    assert cli.main(["train", str(path)]) == 2
    assert "train.yaml: is empty" in capsys.readouterr().err


def test_command_line_overrides_values(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(folder)
    assert load_train_config(path, ("optimization.steps=9",)).optimization.steps == 9
    moved = load_train_config(path, ("output.folder=x", "data.files=[y.txt]", "target.model=a/b"))
    assert moved.output.folder == str(Path.cwd() / "x")
    assert moved.data.files == (str(Path.cwd() / "y.txt"),)
    assert moved.target.model == "a/b"
    assert cli.main(["train", str(path), "--set", "optimization.step=9"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert cli.main(["train", str(path), "--set", "optimization.steps=[9"]) == 2
    assert "optimization.steps: is not YAML" in capsys.readouterr().err
    assert cli.main(["train", str(folder / "none.yaml"), "--json"]) == 2
    assert "none.yaml" in json.loads(capsys.readouterr().out)["error"]


# ------------------------------------------------------------------------------------- prompts


def test_every_form_of_prompt_is_read(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "prompts.jsonl",
        {"turns": ["one", "two"]},
        {"prompt": "ask", "answer": "tell"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    )
    turns, prompt, messages = read_prompts(path)
    assert turns.messages == ({"role": "user", "content": "one"},)
    assert turns.later_turns == ("two",)
    assert (prompt.answer, messages.answer) == ("tell", "b")
    assert [p.line for p in (turns, prompt, messages)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"turns": ["cut', "is not JSON"),
        ({"question": "x"}, "none of the keys turns, prompt and messages"),
        ({"turns": []}, "turns: must be a list that is not empty"),
        ({"turns": [3]}, "turns: must be a text"),
        ({"prompt": ""}, "prompt: must be a text"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages: each needs a role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages: must end"),
        ("[1]", "must be a JSON object"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: object, message: str) -> None:
    path = write_jsonl(tmp_path / "prompts.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


def test_empty_and_long_and_unanswered_prompts_are_refused(folder: Path) -> None:
    path = folder / "prompts.jsonl"
    data = {"files": ["prompts.jsonl"], "heldout_files": [], "regenerate": True}
    path.write_text("\n\n")
    with pytest.raises(DataError, match=r"prompts\.jsonl: is empty"):
        check_inputs(make_config(folder, data=data))
    write_jsonl(path, {"prompt": "x"}, {"prompt": "y"}, {"prompt": "a b " * LENGTH})
    with pytest.raises(DataError, match=r"prompts\.jsonl:3: the prompt has \d+ tokens"):
        check_inputs(make_config(folder, data=data))
    write_jsonl(path, {"prompt": "x", "answer": "z"}, {"prompt": "y"})
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: has no answer"):
        check_inputs(make_config(folder, data={**data, "regenerate": False}))
    path.write_bytes(b"\xff\n")
    with pytest.raises(DataError, match=r"prompts\.jsonl: is not UTF-8 at byte 0"):
        check_inputs(make_config(folder, data=data))


def test_a_broken_line_ends_the_command_before_the_model_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(folder / "prompts.jsonl", {"prompt": "x"}, "{")
    monkeypatch.setattr(loop, "_load_target", None)
    path = write_config(folder, data={"files": ["prompts.jsonl"], "heldout_files": []})
    assert cli.main(["train", str(path)]) == 2
    assert "prompts.jsonl:2: is not JSON" in capsys.readouterr().err


def test_a_truncated_target_is_refused(folder: Path) -> None:
    weights = folder / "target" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"target/model\.safetensors"):
        check_inputs(make_config(folder))


def test_a_drafter_to_go_on_from_is_checked_first(folder: Path) -> None:
    start = Path(save_tiny_drafter(folder / "start", str(folder / "target"), mask_token_id=2))
    good = {"init_from": "start", "num_anchors": 4}
    check_inputs(make_config(folder, drafter=good))
    with pytest.raises(ConfigError, match=r"drafter\.init_from: is dflash, but .* DSpark"):
        check_inputs(make_config(folder, drafter={"init_from": "start", "method": "dflash"}))
    config, weights = start / "config.json", start / "model.safetensors"
    values = json.loads(config.read_text())
    for key, value in (("hidden_size", 24), ("vocab_size", 299), ("num_target_layers", 9)):
        config.write_text(json.dumps({**values, key: value}))
        with pytest.raises(CheckpointError, match=rf"start/config\.json: {key}"):
            check_inputs(make_config(folder, drafter=good))
    config.write_text(json.dumps(values))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"start/model\.safetensors"):
        check_inputs(make_config(folder, drafter=good))


# ------------------------------------------------------------------------------------ data sets


def test_only_answers_are_learned(folder: Path) -> None:
    rows = [{"prompt": "def add(a, b):", "answer": f"return {i}"} for i in range(4)]
    write_jsonl(folder / "prompts.jsonl", *rows)
    data = {"files": ["prompts.jsonl"], "heldout_files": []}
    config = make_config(folder, data=data)
    tokenizer, source = check_inputs(config)
    training, heldout = build_datasets(config, source, tokenizer, Worker())
    assert (training.num_sequences, heldout.num_sequences) == (3, 1)
    batch = training.batch(0, 3)
    for tokens, learned in zip(batch.token_ids, batch.answers, strict=True):
        text = tokenizer.decode(tokens[learned])
        assert text.startswith("return ")
        assert text.endswith("<|endoftext|>")
        prompt = tokenizer("def add(a, b):")["input_ids"]
        assert tokens[: len(prompt)].tolist() == prompt
        assert not learned[: len(prompt)].any()


def test_an_epoch_sees_every_sequence_once_and_repeats_itself() -> None:
    sequences = [Sequence(array("i", [i, i + 1]), 1) for i in range(5)]
    dataset = FixedSequences(sequences, seed=3)
    ids = [dataset.batch(step, 5).sequence_ids for step in range(3)]
    assert ids[0] == (0, 1, 2, 3, 4)
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in ids)
    assert ids[1] != ids[2]
    assert FixedSequences(sequences, seed=3).batch(2, 5).sequence_ids == ids[2]


# -------------------------------------------------------------------------------------- answers


def test_answers_are_the_targets_own(folder: Path) -> None:
    write_jsonl(folder / "prompts.jsonl", *({"prompt": f"def f{i}(" * 2} for i in range(5)))
    sampling = {"max_tokens": 6, "max_num_seqs": 2}
    data = {"files": ["prompts.jsonl"], "heldout_files": [], "regenerate": True}
    config = make_config(folder, data={**data, "sampling": sampling})
    tokenizer, source = check_inputs(config)
    training, heldout = build_datasets(config, source, tokenizer, Worker())
    assert training.num_sequences + heldout.num_sequences == 5
    model = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    for index in range(training.num_sequences):
        batch = training.sequence(index)
        picks = model(batch.token_ids).logits.argmax(-1)
        learned = batch.answers[0, 1:]
        assert learned.sum() == 6
        assert (picks[0, :-1] == batch.token_ids[0, 1:])[learned].all()


def test_later_turns_follow_the_answers_before(folder: Path) -> None:
    config = make_config(
        folder,
        data={"sampling": {"max_tokens": 3, "temperature": 1.0}, "sequence_length": 64},
        optimization={"batch_tokens": 256},
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    prompt = tuple(tokenizer("def a(")["input_ids"])
    message = {"role": "user", "content": "def a("}
    conversations = [Conversation(prompt, (message,), ("class B", "pass"))]
    [turns] = regenerate(config, conversations, tokenizer, Worker())
    assert len(turns) == 3
    first = tokenizer.decode(turns[0].token_ids[turns[0].answer_start :], skip_special_tokens=True)
    second = tokenizer.decode(turns[1].token_ids[: turns[1].answer_start])
    assert second == f"def a(\n{first}\nclass B"


def test_interrupted_answers_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(folder, data={"sampling": {"max_tokens": 4, "temperature": 1.0}})
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    conversations = [Conversation((5 + i, 7, 9)) for i in range(6)]
    whole = regenerate(config, conversations, tokenizer, Worker())
    [path] = (folder / "out" / "run" / "answers").glob("*.0.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:20])
    made: list[str] = []
    request = answers._Answering._request
    monkeypatch.setattr(
        answers._Answering,
        "_request",
        lambda self, turn: made.append(turn.key) or request(self, turn),
    )
    assert regenerate(config, conversations, tokenizer, Worker()) == whole
    assert len(made) == 4
    other = make_config(folder, data={"sampling": {"max_tokens": 4, "seed": 1, "temperature": 1.0}})
    assert regenerate(other, conversations, tokenizer, Worker()) != whole
    path.write_text("{}\n" + "".join(lines))
    with pytest.raises(DataError, match=r"\.0\.jsonl:1: is no answer"):
        regenerate(config, conversations, tokenizer, Worker())
