"""Methods, checkpoints and targets that do not belong together, refused before any long work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cluster.cli.configuration import read_configuration
from cluster.config import ClusterConfig
from cluster.engine import draft_factory, worker
from cluster.engine.draft_factory import build_draft_method
from cluster.engine.worker import ShardWorker
from cluster.errors import CheckpointError, ConfigError, DsparkError
from cluster.models.checkpoint import save_drafter
from tests.block_drafters import TINY_DEEPSEEK_V4, make_drafter
from tests.models import save_tiny_drafter, save_tiny_eagle3, save_tiny_target
from tests.test_text import small_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target and a checkpoint for each method that has one."""
    folder = tmp_path_factory.mktemp("made")
    target = save_tiny_target(folder / "target")
    plain = {"enable_confidence_head": False, "confidence_head_with_markov": False}
    save_tiny_drafter(folder / "dspark", target)
    save_tiny_drafter(folder / "dflash", target, markov_rank=0, **plain)
    save_tiny_eagle3(folder / "eagle3", target)
    save_tiny_target(folder / "draft_model", hidden_size=16, num_hidden_layers=1)
    return folder


@pytest.fixture
def folders(made: Path, tmp_path: Path) -> dict[str, str]:
    """The same, to be spoilt, by name."""
    shutil.copytree(made, tmp_path / "made")
    return {path.name: str(path) for path in (tmp_path / "made").iterdir()}


def speculative(method: str, folders: dict[str, str], **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"method": method}
    if method != "ngram":
        values["model"] = folders[method]
    if method not in ("dspark", "dflash"):
        values["num_speculative_tokens"] = 3
    return values | changes


def read(folder: Path, folders: dict[str, str], values: dict[str, Any]) -> ClusterConfig:
    """What ``dspark up`` does before anything starts."""
    args = {
        "target": {"model": folders["target"], "dtype": "float32"},
        "speculative": values,
        "drafter": {"dtype": "float32"},
    }
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump({"applications": [{"name": "dspark", "args": args}]}))
    _, _, config = read_configuration(str(path))
    return config


def change(folder: str, **values: Any) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("method", ["dspark", "dflash", "eagle3", "draft_model", "ngram"])
def test_every_method_is_taken_and_built(
    method: str, folders: dict[str, str], tmp_path: Path
) -> None:
    config = read(tmp_path, folders, speculative(method, folders))
    built = build_draft_method(config)
    assert built.vocab_size == 96
    assert built.feature_size == (32 if method in ("dspark", "dflash", "eagle3") else 0)
    assert built.block_size == (4 if method in ("dspark", "dflash") else 3)


METHODS = ("dspark", "dflash", "eagle3", "draft_model")


@pytest.mark.parametrize(
    ("method", "made_for"),
    [(method, other) for method in METHODS for other in METHODS if method != other],
)
def test_a_checkpoint_of_another_method_is_refused(
    method: str, made_for: str, folders: dict[str, str], tmp_path: Path
) -> None:
    values = speculative(method, folders, model=folders[made_for])
    with pytest.raises(DsparkError) as caught:
        read(tmp_path, folders, values)
    if method == "draft_model":
        assert isinstance(caught.value, CheckpointError)
        assert caught.value.key == "architectures"
    else:
        assert isinstance(caught.value, ConfigError)
        assert caught.value.key == "speculative.method"
        assert made_for in str(caught.value)
    assert str(Path(folders[made_for], "config.json")) in str(caught.value)


@pytest.mark.parametrize(
    ("method", "key"),
    [(method, "vocab_size") for method in METHODS]
    + [
        (method, key)
        for method in ("dspark", "dflash", "eagle3")
        for key in ("hidden_size", "num_target_layers")
    ],
)
def test_a_drafter_of_another_target_is_refused_by_every_part(
    method: str,
    key: str,
    folders: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = read(tmp_path, folders, speculative(method, folders))
    changes: dict[str, dict[str, Any]] = {
        "vocab_size": {"vocab_size": 128},
        "hidden_size": {"hidden_size": 64},
        "num_target_layers": {"num_hidden_layers": 6, "layer_types": ["full_attention"] * 6},
    }
    change(folders["target"], **changes[key])

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("long work began")

    for module, names in (
        (draft_factory, ("load_drafter", "load_eagle3", "load_causal_lm")),
        (worker, ("TargetShard", "load_projection")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, load)
    for attempt in (
        lambda: read(tmp_path, folders, speculative(method, folders)),
        lambda: build_draft_method(config),
        lambda: ShardWorker(config, 0).start("", 0, 0),
    ):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert caught.value.key == key
        assert str(caught.value.file).startswith(folders[method])


@pytest.mark.parametrize(
    ("method", "changes", "key"),
    [
        ("dspark", {"num_speculative_tokens": 5}, "speculative.num_speculative_tokens"),
        ("eagle3", {"model": "/nowhere"}, "speculative.model"),
        ("draft_model", {"model": "./nowhere"}, "speculative.model"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    method: str, changes: dict[str, Any], key: str, folders: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, folders, speculative(method, folders, **changes))
    assert caught.value.key == key


@pytest.mark.parametrize("spoilt", ["target", *METHODS])
def test_files_that_are_cut_off_are_refused(
    spoilt: str, folders: dict[str, str], tmp_path: Path
) -> None:
    method = "dspark" if spoilt == "target" else spoilt
    path = Path(folders[spoilt]) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cut off") as caught:
        read(tmp_path, folders, speculative(method, folders))
    assert caught.value.file == str(path)
    assert caught.value.key is not None


def test_a_block_of_deepseek_v4_is_taken_whole_or_not_at_all(
    folders: dict[str, str], tmp_path: Path
) -> None:
    drafter = make_drafter(TINY_DEEPSEEK_V4)
    save_drafter(drafter, tmp_path / "v4", torch.float32)
    folders |= {"target": str(tmp_path / "v4"), "dspark": str(tmp_path / "v4")}
    block = drafter.config.block_size
    for whole in (None, block):
        read(tmp_path, folders, speculative("dspark", folders, num_speculative_tokens=whole))
    for part in (1, block - 1):
        with pytest.raises(ConfigError, match="trained as a whole") as caught:
            read(tmp_path, folders, speculative("dspark", folders, num_speculative_tokens=part))
        assert caught.value.key == "speculative.num_speculative_tokens"


def test_a_drafter_of_the_speculators_library_is_refused(
    folders: dict[str, str], tmp_path: Path
) -> None:
    for method in ("dspark", "dflash", "eagle3"):
        change(folders[method], speculators_model_type=method)
        with pytest.raises(CheckpointError, match="another slot convention") as caught:
            read(tmp_path, folders, speculative(method, folders))
        assert caught.value.key == "speculators_model_type"


def test_a_language_model_with_another_tokenizer_is_refused(
    folders: dict[str, str], tmp_path: Path
) -> None:
    small_tokenizer().save_pretrained(folders["target"])
    values = speculative("draft_model", folders)
    read(tmp_path, folders, values)  # without one it uses the target's
    small_tokenizer().save_pretrained(folders["draft_model"])
    ours = Path(folders["draft_model"]) / "tokenizer.json"
    tokenizer = json.loads(ours.read_text())
    ours.write_text(json.dumps(tokenizer | {"padding": None, "truncation": None}, indent=1))
    read(tmp_path, folders, values)  # what ids mean is the same
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    ours.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, folders, values)
    assert (caught.value.file, caught.value.key) == (str(ours), "model")
