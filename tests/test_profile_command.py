"""``dspark profile``: the table that it prints and saves, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster import cli
from cluster.cli.configuration import check_checkpoints
from cluster.engine.curve_files import read_curve
from cluster.engine.profile_files import read_profile
from cluster.errors import ConfigError
from cluster.models.checkpoint import target_digest
from tests.engine_tools import make_config, make_engine
from tests.models import save_tiny_drafter, save_tiny_target

# Compiling the passes takes longer than measuring them (tests/test_cpu_kernels.py compiles some).
OPTIONS = ["--dtype", "float32", "--num-threads", "1", "--max-num-seqs", "4", "--enforce-eager"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_target(tmp_path_factory.mktemp("target"))


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["profile", "--help"])
    assert caught.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_the_table_is_printed_saved_plotted_and_served_with(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, plot = tmp_path / "curve.json", tmp_path / "curve.png"
    command = [
        "profile",
        target,
        *OPTIONS,
        "--tokens",
        "8,1",
        "--contexts",
        "600",
        "--repeats",
        "1",
    ]
    assert cli.main([*command, "--out", str(saved), "--plot", str(plot)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tensor 1 x pipeline 1" in lines[0]
    assert lines[1].split() == ["batch", "tokens", "context", "0", "context", "600"]
    one, eight = lines[2].split(), lines[3].split()
    assert (one[0], eight[0]) == ("1", "8")
    assert one[2].startswith("~"), "one sequence cannot have 600 tokens of context here"
    assert not eight[2].startswith("~")
    curve = read_curve(saved)
    assert f"{1e3 * float(curve.seconds(8, 600)):.2f}" == eight[2]
    assert curve.origin is not None
    assert curve.origin.target_digest == target_digest(target)
    assert plot.read_bytes().startswith(b"\x89PNG")
    engine = make_engine(make_config(target, verify_curve=str(saved)))
    assert float(engine.cost_model.verify_seconds(8, 600)) == float(curve.seconds(8, 600))


def test_json_is_one_object_with_the_curve(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", target, *OPTIONS, "--tokens", "2", "--repeats", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["target"] == target
    assert result["curve"]["tokens"] == [2]
    assert result["curve"]["origin"]["num_threads"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}],
    ids=["tensor", "pipeline"],
)
def test_layouts_of_several_shards_are_measured(
    target: str, layout: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in layout.items()]
    command = ["profile", target, *OPTIONS, *options, "--tokens", "1,8", "--repeats", "1", "--json"]
    assert cli.main(command) == 0
    origin = json.loads(capsys.readouterr().out)["curve"]["origin"]
    assert origin.items() >= layout.items()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--dtype", "float33"], "target.dtype"),
        (["--device", "toaster"], "target.device"),
        (["--num-threads", "0"], "target.num_threads"),
        (["--tensor-parallel-size", "3"], "target.tensor_parallel_size"),
        (["--pipeline-parallel-size", "9"], "target.pipeline_parallel_size"),
        (["--max-num-seqs", "1000"], "max_num_seqs"),
        (["--tokens", "1,x"], "--tokens"),
        (["--tokens", "0"], "--tokens"),
        (["--tokens", "5000"], "--tokens"),
        (["--contexts", "-1"], "--contexts"),
        (["--contexts", "5000"], "--contexts"),
        (["--repeats", "0"], "--repeats"),
        (["--out", "/nowhere/curve.json"], "--out"),
        (["--plot", "/nowhere/curve.png"], "--plot"),
        (["--plot", "curve.txt"], "--plot"),
    ],
)
def test_bad_options_end_with_2_and_name_the_field(
    target: str, options: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    option, value = options
    assert cli.main(["profile", target, *OPTIONS, f"{option}={value}"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[-1].startswith("dspark: ")
    assert field in output.err.splitlines()[-1]


def test_no_target_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", str(tmp_path / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_missing_gpu_ends_with_2(
    target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["profile", target, "--device", "cuda"]) == 2
    assert "target.device: this machine" in capsys.readouterr().err


def test_several_shards_on_gpus_are_left_to_the_cluster(
    target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert cli.main(["profile", target, "--device", "cuda", "--tensor-parallel-size", "2"]) == 2
    assert "target.device" in capsys.readouterr().err


def test_a_broken_curve_is_found_before_anything_starts(target: str, tmp_path: Path) -> None:
    (tmp_path / "curve.json").write_text("{}")
    config = make_config(target, verify_curve=str(tmp_path / "curve.json"))
    with pytest.raises(ConfigError, match=r"curve\.json: format"):
        check_checkpoints(config)


def test_a_device_profile_has_the_drafter_too(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drafter = save_tiny_drafter(tmp_path / "drafter", target)
    path = tmp_path / "this-machine.json"
    command = ["profile", target, *OPTIONS, "--tokens", "1,8", "--contexts", "0"]
    command += ["--repeats", "1", "--device-profile", str(path)]
    assert cli.main([*command, "--drafter", f"dspark={drafter}", "--json"]) == 0
    profile = read_profile(path)
    assert profile.name == "this-machine"
    assert f"target {Path(target).name}, drafter drafter" in profile.source
    assert profile.target is not None
    printed = json.loads(capsys.readouterr().out)["curve"]["seconds"]
    assert profile.target.table.tolist() == printed
    assert profile.drafter is not None
    assert float(profile.drafter.seconds(1)) > 0


def test_a_drafter_without_a_device_profile_is_refused(target: str) -> None:
    assert cli.main(["profile", target, "--drafter", "ngram"]) == 2
