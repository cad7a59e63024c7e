"""The command line: exit codes, errors and output; the commands on a real cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import cli
from cluster.cli import state
from cluster.cli.processes import (
    Process,
    end_processes,
    find_descendants,
    find_process,
    signal_process,
    wait_gone,
)
from cluster.cli.rendering import TokenText, legend
from cluster.errors import ClusterStateError
from cluster.request import TokenSource
from cluster.rpc.client import Client
from tests.models import DRAFTER, TARGET

COMMANDS = ("up", "down", "generate", "status", "demo", "swap")
LOCAL = Path(__file__).parents[1] / "deployments" / "local.yaml"


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "state"
    monkeypatch.setenv("DSPARK_STATE_DIR", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return folder


# ------------------------------------------------------------------------------ usage and errors


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["fly"], ["generate"], ["up", "--detached"]])
def test_bad_usage_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("command", ["up", "demo"])
def test_bad_configuration_ends_with_2_and_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("applications: [{args: {target: {model: m, max_seqs: 2}}}]")
    assert cli.main([command, str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "dspark: target.max_seqs: unknown key (did you mean 'max_num_seqs'?)\n"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("target", "tensor_parallel_size", 3),
        ("target", "pipeline_parallel_size", 9),
        ("speculative", "num_speculative_tokens", 8),
    ],
)
def test_what_the_models_cannot_do_is_refused_before_anything_starts(
    section: str, key: str, value: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = {
        "target": {"model": TARGET},
        "speculative": {"method": "dspark", "model": DRAFTER},
    }
    args[section] = {**args[section], key: value}
    path = tmp_path / "cluster.yaml"
    path.write_text(json.dumps({"applications": [{"args": args}]}))
    assert cli.main(["up", str(path)]) == 2
    assert f"{section}.{key}" in capsys.readouterr().err


def test_without_a_cluster_commands_end_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["status", "--address", "127.0.0.1:1"],
        ["generate", "text", "--address", "127.0.0.1:1"],
        ["down"],
    ):
        assert cli.main(arguments) == 1
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("dspark: ")


def test_json_says_errors_as_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["down", "--json"]) == 1
    assert "no cluster to stop" in json.loads(capsys.readouterr().out)["error"]


def test_a_detached_start_that_fails_is_said_as_one_object(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "false")  # what holds the cluster ends at once, with 1
    assert cli.main(["up", str(LOCAL), "--detach", "--json"]) == 1
    assert "did not start" in json.loads(capsys.readouterr().out)["error"]


# ------------------------------------------------------------------------------------- state


def test_the_state_survives_the_file() -> None:
    held = state.ClusterState(
        process=Process(1, "a"),
        config="c.yaml",
        address="127.0.0.1:5",
        temp_dir="/tmp/x",
        children=(Process(2, "b"), Process(3, "c")),
    )
    state.write_state(held)
    assert state.read_state() == held
    assert state.default_address() == "127.0.0.1:5"
    state.remove_state()
    assert state.read_state() is None
    assert state.default_address() == state.DEFAULT_ADDRESS


def test_a_state_file_of_something_else_is_refused(state_dir: Path) -> None:
    state_dir.mkdir()
    (state_dir / "cluster.json").write_text('{"process": 5}')
    with pytest.raises(ClusterStateError, match="cannot be read"):
        state.read_state()


def test_down_clears_up_behind_an_up_that_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen(["sleep", "60"]) as orphan:
        process = find_process(orphan.pid)
        assert process is not None
        temp_dir = tmp_path / "ray"
        temp_dir.mkdir()
        state.write_state(
            state.ClusterState(
                process=Process(orphan.pid, "another start"),
                config="c.yaml",
                temp_dir=str(temp_dir),
                children=(process, Process(os.getpid(), "another start")),
            )
        )
        assert cli.main(["down"]) == 0
        assert orphan.wait() == -signal.SIGTERM
    assert not temp_dir.exists()
    assert state.read_state() is None
    assert "stopped after" in capsys.readouterr().out


def test_processes_are_told_apart_by_their_start() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = find_process(child.pid)
        assert process is not None
        assert process in find_descendants(os.getpid())
        signal_process(Process(child.pid, "another start"), signal.SIGKILL)
        assert wait_gone([process], 0.2) == [process]
        assert end_processes([process]) == []
        assert find_process(child.pid) is None


# --------------------------------------------------------------------------------- rendering

SOURCES = [TokenSource.ACCEPTED, TokenSource.ACCEPTED, TokenSource.RECOVERED, TokenSource.BONUS]


def test_marks_tell_sources_apart() -> None:
    text = TokenText(colour=False)
    shown = text.render("abcdef", SOURCES, [1, 1, 2, 2]) + text.finish()
    assert shown == "«ab»⟦cd⟧‹ef›"


def test_text_held_back_belongs_to_the_last_token() -> None:
    text = TokenText(colour=False)
    shown = text.render("ab", SOURCES[:2], [2, 0]) + text.render("cdef", SOURCES[2:3], [2])
    assert shown + text.finish() == "«ab»⟦cdef⟧"


def test_marks_never_enclose_a_line_break() -> None:
    text = TokenText(colour=False)
    shown = text.render("a\n\n b\nc", SOURCES[:2], [3, 4]) + text.finish()
    assert shown == "«a»\n\n« b»\n«c»"


def test_colours_leave_the_text_as_it_is() -> None:
    text = TokenText(colour=True)
    shown = text.render("a\n\nbc", SOURCES[:3], [2, 1, 2]) + text.finish()
    assert "\x1b[3" in shown
    assert re.sub(r"\x1b\[\d*m", "", shown) == "a\n\nbc"
    assert shown.endswith("\x1b[0m")


@pytest.mark.parametrize("colour", [False, True])
def test_the_legend_names_every_source(colour: bool) -> None:
    assert all(source.name.lower() in legend(colour=colour) for source in TokenSource)


# --------------------------------------------------------------------------- on a real cluster


def _dspark(*arguments: str, timeout_s: float = 500.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def _json(*arguments: str) -> dict[str, Any]:
    done = _dspark(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, "not exactly one line"
    values: dict[str, Any] = json.loads(done.stdout)
    return values


@pytest.fixture
def running(tmp_path: Path, state_dir: Path) -> Iterator[dict[str, Any]]:
    """A cluster by ``up --detach``, on a free port."""
    document = yaml.safe_load(LOCAL.read_text())
    arguments = document["applications"][0]["args"]
    for section in ("target", "speculative"):
        arguments[section]["model"] = str(LOCAL.parent / arguments[section]["model"])
    arguments["router"]["port"] = 0
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(document))
    yield {"config": str(path), **_json("up", str(path), "--detach")}
    held = state.read_state()
    if held is not None:  # the test has not come to `down`
        _dspark("down")


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_the_life_of_a_cluster(running: dict[str, Any]) -> None:
    assert (running["shards"], running["drafters"]) == (2, 1)
    second = _dspark("up", running["config"])
    assert second.returncode == 1
    assert "runs already" in second.stderr

    status = _json("status")
    assert status["address"] == running["address"]
    assert len(status["replicas"][0]["shards"]) == 2
    assert "shard 1" in _dspark("status").stdout

    prompt = "def main(arguments):\n"
    greedy = ("generate", prompt, "--temperature", "0", "--max-tokens", "24")
    speculative, plain = _json(*greedy), _json(*greedy, "--no-speculation")
    assert speculative["token_ids"] == plain["token_ids"]
    assert speculative["usage"]["num_drafts"] > 0
    assert set(plain["token_sources"]) == {"target"}
    assert _dspark(*greedy).stdout == plain["text"] + "\n"
    refused = _dspark("generate", prompt, "--temperature", "-1")
    assert refused.returncode == 2
    assert "sampling.temperature" in refused.stderr

    held = state.read_state()
    assert held is not None
    with Client(running["address"]) as client:
        # What runs when the cluster is told to stop is finished.
        chunks = client.generate(prompt, temperature=0.0, max_tokens=100, ignore_eos=True)
        tokens = list(next(chunks).token_ids)
        stopping = threading.Thread(target=_dspark, args=("down",))
        stopping.start()
        for chunk in chunks:
            tokens += chunk.token_ids
        assert len(tokens) == 100
        stopping.join()
    assert wait_gone([held.process, *held.children], 0.0) == []
    assert not Path(held.temp_dir).exists()
    assert state.read_state() is None


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_the_demo_shows_that_nothing_changes(state_dir: Path) -> None:
    summary = _json("demo", "--max-tokens", "24")
    assert summary["identical"] is True
    assert summary["mismatches"] == []
    assert summary["acceptance_length"] >= 1.0
    assert summary["tokens_per_second"].keys() == {"speculative", "plain"}
    assert min(summary["tokens_per_second"].values()) > 0
    assert (summary["shards"], summary["drafters"]) == (2, 1)
    assert summary["requests"] == 4 * summary["prompts"]
    assert not state_dir.exists(), "the demo leaves the state of `up` alone"
