"""Training by workers on Ray Train, one of which is lost."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from cluster import cli
from cluster.training.loop import train
from cluster.training.parallel import Worker
from cluster.training.resume import read_summary
from tests.training_tools import make_config, save_target, write_config


def gradient_norms(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "out/run/history.jsonl").read_text().splitlines())
    return [row["grad_norm"] for row in rows if "grad_norm" in row]


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_workers_on_ray_survive_the_loss_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two workers end with what one alone ends with, also when one is killed on the way."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    alone, many = tmp_path / "alone", tmp_path / "many"
    steps = {"optimization": {"steps": 60}, "output": {"save_seconds": 1e-6, "eval_sequences": 1}}
    for folder in (alone, many):
        folder.mkdir()
        save_target(folder / "target")
    train(make_config(alone, **steps), Worker())
    path = write_config(many, **steps, parallel={"num_workers": 2, "cpus_per_worker": 0.5})
    state = many / "out" / "run" / "state" / "training_state.pt"
    killed = threading.Event()
    monkeypatch.setenv("DSPARK_TEST_RUN", str(os.getpid()))  # inherited by what Ray starts
    mark = f"DSPARK_TEST_RUN={os.getpid()}".encode()

    def kill_a_worker() -> None:
        while not state.exists():
            time.sleep(0.01)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                is_worker = b"RayTrainWorker" in (process / "cmdline").read_bytes()
                is_ours = mark in (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if is_worker and is_ours:
                os.kill(int(process.name), signal.SIGKILL)
                killed.set()
                return

    threading.Thread(target=kill_a_worker, daemon=True).start()
    assert cli.main(["train", str(path), "--json"]) == 0
    assert killed.is_set()
    summary = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert summary["steps"] == 60
    # Rounding differs, and grows with the steps.
    expected = read_summary(alone / "out")
    assert summary["heldout_acceptance"] == pytest.approx(expected["heldout_acceptance"], rel=0.01)
    assert gradient_norms(many)[:10] == pytest.approx(gradient_norms(alone)[:10], rel=0.01)
