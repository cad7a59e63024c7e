"""Training runs of every drafter method on a tiny target: learning, resuming, many workers."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.errors import CheckpointError, ConfigError, TrainingDivergedError
from cluster.models.calibration_file import load_calibration, save_calibration
from cluster.models.checkpoint import load_drafter, load_drafter_config
from cluster.training import feature_cache, report
from cluster.training.config import TrainConfig
from cluster.training.loop import DrafterTraining, train
from cluster.training.parallel import Worker, join_group
from cluster.training.progress import Progress
from cluster.training.resume import read_summary
from tests.training_tools import make_config, save_target, write_jsonl

METHODS: dict[str, dict[str, Any]] = {
    "dspark": {"method": "dspark", "markov_rank": 4},
    "gated": {"method": "dspark", "markov_rank": 4, "markov_head_type": "gated"},
    "rnn": {"method": "dspark", "markov_rank": 4, "markov_head_type": "rnn"},
    "without confidence": {"method": "dspark", "enable_confidence_head": False},
    "dflash": {"method": "dflash"},
    "eagle3": {"method": "eagle3"},
    "eagle3, reduced": {"method": "eagle3", "draft_vocab_size": 100},
    "draft_model": {"method": "draft_model", "hidden_size": 8},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny target in ``target``."""
    save_target(tmp_path / "target")
    return tmp_path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "out" / "run" / "state" / "training_state.pt", weights_only=True)
    return state["model"]


def history(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "out" / "run" / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in history(folder) if "loss" in row]


# ------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(folder: Path, method: str) -> None:
    optimization = {"steps": 30, "muon_learning_rate": 0.02, "adamw_learning_rate": 0.02}
    loss = {} if "eagle3" in method else {"cross_entropy": 0.0, "total_variation": 1.0}
    config = make_config(folder, drafter=METHODS[method], optimization=optimization, loss=loss)
    training = DrafterTraining(config, Worker())
    before, _ = training.heldout_acceptance(8)
    summary = training.run()
    assert summary["heldout_acceptance_length"] > before + 0.05
    found = losses(folder)
    assert sum(found[-5:]) < 0.95 * sum(found[:5])
    assert summary == read_summary(folder / "out")
    assert summary["steps"] == 30


def test_a_trained_drafter_is_what_serving_loads(folder: Path) -> None:
    train(make_config(folder, drafter={"markov_rank": 4, "markov_head_type": "rnn"}), Worker())
    trained = load_drafter(folder / "out")
    model = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    torch.testing.assert_close(trained.embed_tokens.weight, model.get_input_embeddings().weight)
    torch.testing.assert_close(trained.lm_head.weight, model.get_output_embeddings().weight)
    assert trained.config.target_layer_ids == (0, 1, 2, 3)
    assert (trained.config.markov_head_type, trained.config.mask_token_id) == ("rnn", 2)


def test_a_trained_draft_model_is_a_checkpoint_of_its_own(folder: Path) -> None:
    train(make_config(folder, drafter=METHODS["draft_model"]), Worker())
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (8, 1)
    assert AutoTokenizer.from_pretrained(folder / "out")("def")["input_ids"]


def test_training_goes_on_from_another_drafter(folder: Path) -> None:
    train(make_config(folder), Worker())
    start = load_file(folder / "out" / "model.safetensors")
    drafter = {"init_from": "out"}
    output = {"folder": "next"}
    training = DrafterTraining(make_config(folder, drafter=drafter, output=output), Worker())
    for name, value in training.method.network.state_dict().items():
        torch.testing.assert_close(value.bfloat16(), start[name])
    with pytest.raises(ConfigError, match="block_size is 3, not 4"):
        DrafterTraining(
            make_config(folder, drafter={"init_from": "out", "block_size": 4}, output=output),
            Worker(),
        )


def test_short_answers_are_padded_without_effect(folder: Path) -> None:
    rows = [{"prompt": "def add", "answer": "(a, b):" + " return a" * i} for i in range(6)]
    write_jsonl(folder / "prompts.jsonl", *rows)
    data = {"files": ["prompts.jsonl"], "heldout_files": []}
    optimization = {"steps": 20, "adamw_learning_rate": 0.02, "muon_learning_rate": 0.02}
    train(make_config(folder, data=data, optimization=optimization), Worker())
    found = losses(folder)
    assert all(value == value for value in found)
    assert found[-1] < found[0]


@pytest.mark.parametrize("method", ["dspark", "eagle3", "draft_model"])
def test_positions_behind_all_answers_add_nothing(folder: Path, method: str) -> None:
    rows = [{"prompt": "def add", "answer": "("} for _ in range(6)]  # and the token that ends it
    write_jsonl(folder / "prompts.jsonl", *rows)
    data = {"files": ["prompts.jsonl"], "heldout_files": []}
    config = make_config(folder, data=data, drafter={**METHODS[method], "block_size": 4})
    summary = train(config, Worker())
    first, second, *others = summary["heldout_acceptance"]
    assert others == [0.0, 0.0]
    assert 1 + first < summary["heldout_acceptance_length"] < 1 + first + second


@pytest.mark.parametrize("method", ["dspark", "eagle3", "draft_model"])
def test_a_run_that_diverges_ends_and_keeps_its_checkpoint(folder: Path, method: str) -> None:
    optimization = {
        "steps": 9,
        "muon_learning_rate": 1e30,
        "adamw_learning_rate": 1e30,
        "warmup": 0,
    }
    config = make_config(
        folder,
        drafter=METHODS[method],
        optimization=optimization,
        output={"save_seconds": 1e-6, "eval_steps": 9},
    )
    with pytest.raises(TrainingDivergedError, match=r"step \d: the loss is .* gradient norm is"):
        train(config, Worker())
    assert all(value.isfinite().all() for value in weights(folder).values())
    assert read_summary(folder / "out") == {}


# -------------------------------------------------------------------------------------- resuming


def test_a_killed_run_ends_with_the_unbroken_runs_weights(tmp_path: Path) -> None:
    """SIGKILL at random moments, also while checkpoints are written (after every step)."""
    steps = {"optimization": {"steps": 40}, "output": {"save_seconds": 1e-6, "eval_sequences": 1}}
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    for folder in (unbroken, killed):
        folder.mkdir()
        save_target(folder / "target")
    summary = train(make_config(unbroken, **steps), Worker())
    config = make_config(killed, **steps)
    state = killed / "out" / "run" / "state" / "training_state.pt"
    chance = random.Random(0)
    reached = []
    context = _forkserver()
    for _ in range(4):
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = context.Process(target=train, args=(config, Worker()))
        process.start()
        _wait(lambda process=process, before=before: _has_ended(process) or _changed(state, before))
        assert not _has_ended(process)
        time.sleep(chance.uniform(0.0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        reached.append(torch.load(state, weights_only=True)["step"])
    assert 0 < reached[0] < reached[-1] < 40
    resumed = train(config, Worker())
    assert resumed["heldout_acceptance"] == summary["heldout_acceptance"]
    expected, found = weights(unbroken), weights(killed)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert losses(killed) == losses(unbroken)


def _forkserver() -> BaseContext:
    """Makes children of a process that has imported everything and computed nothing: OpenMP's
    threads do not survive a fork of this one."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["cluster.training.loop"])
    return context


def _has_ended(process: BaseProcess) -> bool:
    return process.exitcode is not None


def _changed(path: Path, since_ns: int) -> bool:
    return path.exists() and path.stat().st_mtime_ns > since_ns


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = DrafterTraining(make_config(folder, output={"folder": "unbroken"}), Worker()).run()
    output = {"save_seconds": 1e-6}
    save, replace = torch.save, os.replace

    def cut(state: dict[str, Any], file: Any) -> None:
        save(state, file)
        if state["step"] == 3:
            file.truncate(file.tell() // 2)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut)
        with pytest.raises(KeyboardInterrupt):
            train(make_config(folder, output=output), Worker())

    def stop(source: Any, target: Any) -> None:
        if str(target).endswith("model.safetensors"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            train(make_config(folder, output=output), Worker())
    resumed = train(make_config(folder, output=output), Worker())
    assert resumed["heldout_acceptance"] == unbroken["heldout_acceptance"]


@pytest.mark.parametrize(
    ("section", "changes", "key"),
    [
        ("drafter", {"num_anchors": 4}, "drafter.num_anchors"),
        ("optimization", {"muon_learning_rate": 0.1}, "optimization.muon_learning_rate"),
        ("data", {"files": ["0.txt", "1.txt"]}, "data.files"),
        ("loss", {"confidence": 0.5}, "loss.confidence"),
    ],
)
def test_a_changed_configuration_is_not_resumed(
    folder: Path, section: str, changes: dict[str, Any], key: str
) -> None:
    train(make_config(folder), Worker())
    with pytest.raises(ConfigError) as caught:
        train(make_config(folder, **{section: changes}), Worker())
    assert caught.value.key == key
    train(make_config(folder, output={"log_steps": 2}), Worker())


def test_a_changed_target_is_not_resumed(folder: Path) -> None:
    train(make_config(folder), Worker())
    config = folder / "target" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ConfigError, match=r"target\.model"):
        train(make_config(folder), Worker())


def test_a_broken_state_names_its_file(folder: Path) -> None:
    train(make_config(folder), Worker())
    state = folder / "out" / "run" / "state" / "training_state.pt"
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"training_state\.pt: broken training state"):
        train(make_config(folder), Worker())


def test_a_calibration_lasts_as_long_as_the_weights_it_was_fitted_to(folder: Path) -> None:
    minutes = {"optimization": {"steps": None, "minutes": 0.05}}
    train(make_config(folder, **minutes), Worker())
    out, target = folder / "out", folder / "target"
    file = save_calibration(out, target, [])
    train(make_config(folder, **minutes), Worker())  # there is nothing left to do
    assert file.exists()
    load_calibration(out, target)
    state = out / "run" / "state" / "training_state.pt"
    saved = torch.load(state, weights_only=True)
    torch.save({**saved, "spent_seconds": 0.0}, state)
    train(make_config(folder, **minutes), Worker())
    assert not file.exists()


def test_time_spent_before_an_interruption_counts(folder: Path) -> None:
    minutes = {"optimization": {"steps": None, "minutes": 0.05}}
    summary = train(make_config(folder, **minutes), Worker())
    assert 0.05 <= summary["minutes"] < 1.0
    again = train(make_config(folder, **minutes), Worker())
    assert again["steps"] == summary["steps"]
    assert again["minutes"] >= summary["minutes"]


# -------------------------------------------------------------------------------- feature cache


def test_cached_features_give_the_losses_of_computed_ones(folder: Path) -> None:
    optimization = {"steps": None, "epochs": 1.0}
    computed, cached = {"folder": "computed"}, {"folder": "out"}
    train(make_config(folder, optimization=optimization, output=computed), Worker())
    expected = [row["loss"] for row in _history_of(folder / "computed") if "loss" in row]
    features = {"mode": "cache", "shard_sequences": 3}
    train(
        make_config(folder, optimization=optimization, output=cached, features=features), Worker()
    )
    assert losses(folder) == pytest.approx(expected, rel=0.01)
    assert losses(folder) != expected  # bf16, so the cache was read
    index = json.loads((folder / "out/run/features/training/index.json").read_text())
    assert index["layer_ids"] == [0, 1, 2, 3]
    shards = list((folder / "out/run/features/training").glob("*.safetensors"))
    assert len(shards) == -(-index["num_sequences"] // 3)


def _history_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "run" / "history.jsonl").read_text().splitlines()]


def test_a_cache_that_is_too_large_is_refused_unmade(folder: Path) -> None:
    features = {"mode": "cache", "max_gb": 1e-6}
    with pytest.raises(ConfigError, match=r"features\.max_gb"):
        train(make_config(folder, features=features), Worker())
    assert not (folder / "out/run/features").exists()


def test_an_interrupted_cache_goes_on_and_another_runs_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = {"mode": "cache", "shard_sequences": 2, "folder": "features"}
    saved: list[Path] = []
    save = feature_cache.save_file

    def count(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save(tensors, path)
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(feature_cache, "save_file", count)
    with pytest.raises(KeyboardInterrupt):
        train(make_config(folder, features=features), Worker())
    train(make_config(folder, features=features), Worker())
    finished = list((folder / "features").rglob("*.safetensors"))
    assert len(saved) == len(finished) + 1  # the one that was cut off was made again
    layers = {"target_layer_ids": [1, 3]}
    other = make_config(folder, features=features, drafter=layers, output={"folder": "other"})
    with pytest.raises(CheckpointError, match=r"index\.json: layer_ids"):
        train(other, Worker())
    shard = next((folder / "features" / "training").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="broken feature shard"):
        train(make_config(folder, features=features, output={"folder": "again"}), Worker())


# --------------------------------------------------------------------------------- many workers


def _train_as(rank: int, config: TrainConfig, rendezvous: str) -> None:
    with join_group(rank, 2, rendezvous):
        train(config, Worker(rank, 2))


def test_two_workers_do_what_one_does(tmp_path: Path) -> None:
    rows = [{"prompt": "def add", "answer": "(a, b):" + " return a" * i} for i in range(9)]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_target(tmp_path / name / "target")
        write_jsonl(tmp_path / name / "prompts.jsonl", *rows)
    data = {"files": ["prompts.jsonl"], "heldout_files": []}
    features = {"mode": "cache", "shard_sequences": 2}
    train(make_config(tmp_path / "one", data=data, features=features), Worker())
    config = make_config(
        tmp_path / "two", data=data, features=features, parallel={"num_workers": 2}
    )
    rendezvous = (tmp_path / "rendezvous").as_uri()
    mp.start_processes(_train_as, (config, rendezvous), 2, start_method="forkserver")
    expected, found = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3)
    assert load_drafter_config(tmp_path / "two" / "out").num_anchors == 8


# ------------------------------------------------------------------------------------ reporting


def test_figures_are_plotted_and_shown_in_tensorboard(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = {"tensorboard": True, "plots": True, "eval_steps": 2}
    train(make_config(folder, output=output), Worker())
    run = folder / "out" / "run"
    for name in ("loss.png", "acceptance.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    for tag in ("cross_entropy", "total_variation", "confidence", "grad_norm", "acceptance/3"):
        assert len(events.Scalars(f"train/{tag}")) == 4
    for tag in ("muon_learning_rate", "adamw_learning_rate", "tokens_per_second"):
        assert all(event.value > 0 for event in events.Scalars(f"train/{tag}")[1:])
    assert [event.step for event in events.Scalars("heldout/acceptance_length")] == [2, 4, 4]
    assert len([row for row in history(folder) if "heldout_acceptance" in row]) == 3


def test_a_missing_extra_says_how_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"output\.plots: needs pip install 'dspark-cluster\[tr"):
        train(make_config(folder, output={"plots": True}), Worker())


def test_progress_is_a_bar_on_a_terminal_and_a_log_elsewhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    for stream in (terminal, io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with caplog.at_level("INFO"), Progress("steps", 4, start=1) as progress:
            progress.advance()
            progress.note("loss 2")
    assert "steps" in terminal.getvalue()
    assert "2/4" in terminal.getvalue()
    assert "loss 2" in terminal.getvalue()
    assert caplog.messages == ["loss 2"]


@pytest.mark.slow
def test_serving_imports_nothing_of_the_extra() -> None:
    code = (
        "import sys, cluster.cli, cluster.actors.app, cluster.rpc.router, cluster.engine.engine;"
        "print([m for m in ('matplotlib', 'tensorboard', 'ray.train') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_history_forgets_what_lies_behind_the_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(source: Any, target: Any) -> None:
        raise KeyboardInterrupt

    config = make_config(folder)
    train(config, Worker())
    path = folder / "out" / "run" / "history.jsonl"
    with path.open("a") as file:
        file.write('{"step": 9, "loss": 1.0}\n{"step": 2, "lo')
    before = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            report.Reporter(config, step=2, num_steps=4)
    assert path.read_text() == before
    report.Reporter(config, step=2, num_steps=4)
    assert [row["step"] for row in history(folder)] == [1, 2]
