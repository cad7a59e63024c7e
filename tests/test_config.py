"""The configuration: what it accepts, and how it names what it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli.configuration import read_configuration
from cluster.config import ClusterConfig
from cluster.errors import CheckpointError, ConfigError
from cluster.serve_config import load_serve_config
from tests.models import DRAFTER, TARGET, save_tiny_drafter, save_tiny_target

DEPLOYMENTS = Path(__file__).parents[1] / "deployments"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    target = save_tiny_target(tmp_path / "target")
    return target, save_tiny_drafter(tmp_path / "drafter", target)


def _write(folder: Path, args: Any, **application: Any) -> str:
    path = folder / "cluster.yaml"
    document = {
        "applications": [
            {"name": "dspark", "import_path": "cluster.actors.app:build", "args": args}
            | application
        ]
    }
    path.write_text(yaml.safe_dump(document))
    return str(path)


def _change(folder: str, **values: Any) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("path", sorted(DEPLOYMENTS.glob("*.yaml")), ids=lambda path: path.name)
def test_what_is_shipped_is_valid(path: Path) -> None:
    _, config = load_serve_config(path)
    assert config.target.num_shards >= 1


def test_the_chart_knows_every_key() -> None:
    """`make chart` writes helm/dspark/values.schema.json anew."""
    chart = json.loads((DEPLOYMENTS.parent / "helm/dspark/values.schema.json").read_text())
    schema = ClusterConfig.model_json_schema()
    for name, section in {**schema["$defs"], "ClusterConfig": schema}.items():
        known = chart["$defs"].get(f"config.{name}", {}).get("properties", {})
        assert known.keys() == section["properties"].keys(), "run `make chart`"


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({}, (1, 1, 1)),
        ({"num_replicas": 3}, (3, 3, 3)),
        ({"max_replicas": 4}, (0, 1, 4)),
        ({"min_replicas": 2, "max_replicas": 4}, (2, 2, 4)),
        ({"num_replicas": 9, "max_replicas": 4}, (0, 4, 4)),
        ({"num_replicas": 0, "max_replicas": 4}, (0, 0, 4)),
    ],
)
def test_numbers_of_replicas(part: dict[str, int], expected: tuple[int, int, int]) -> None:
    config = ClusterConfig.parse({"target": {"model": "m"}, "drafter": part})
    drafter = config.drafter
    assert (drafter.lowest, drafter.initial, drafter.highest) == expected
    assert ClusterConfig.parse({"target": {"model": "m", "max_replicas": 2}}).target.lowest == 1


@pytest.mark.parametrize("part", [{"min_replicas": 1}, {"min_replicas": 3, "max_replicas": 2}])
def test_a_range_of_replicas_has_its_ends_in_order(part: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as error:
        ClusterConfig.parse({"target": {"model": "m"}, "drafter": part})
    assert error.value.key == "drafter.max_replicas"


def test_the_local_deployment_has_two_shards_and_a_drafter() -> None:
    _, document, config = read_configuration(str(DEPLOYMENTS / "local.yaml"))
    assert config.target.num_shards == 2
    assert config.drafter.num_replicas == 1
    assert config.target.model == TARGET
    assert config.speculative is not None
    assert config.speculative.model == DRAFTER
    assert document["applications"][0]["args"]["target"]["model"] == TARGET


def test_args_that_travel_through_serve_give_the_same_configuration() -> None:
    document, config = load_serve_config(DEPLOYMENTS / "local.yaml")
    assert ClusterConfig.parse(document["applications"][0]["args"]) == config


@pytest.mark.parametrize(
    ("args", "key", "text"),
    [
        ({}, "target", "is required"),
        ({"target": {}}, "target.model", "is required"),
        ("text", "args", "must be a mapping"),
        ({"target": {"model": "m"}, "routers": {}}, "routers", "did you mean 'router'?"),
        (
            {"target": {"model": "m"}, "drafter": {"port": 65530}},
            "drafter.num_ports",
            "the range 65530 to 65593 ends above 65535",
        ),
        (
            {"target": {"model": "m"}, "router": {"port": 9400, "metrics_port": 9400}},
            "router.metrics_port",
            "is router.port already",
        ),
        (
            {"target": {"model": "m", "tensor_paralel_size": 2}},
            "target.tensor_paralel_size",
            "did you mean 'tensor_parallel_size'?",
        ),
        (
            {"target": {"model": "m"}, "speculative": {"model": "d", "num_tokens": 2}},
            "speculative.num_tokens",
            "did you mean 'num_speculative_tokens'?",
        ),
        ({"target": {"model": "m", "num_replicas": 0}}, "target.num_replicas", "got 0"),
        ({"target": {"model": "m", "dtype": "int8"}}, "target.dtype", "got 'int8'"),
        (
            {"target": {"model": "m", "collective_timeout_s": 14}},
            "target.collective_timeout_s",
            "greater than or equal to 15, got 14",
        ),
        ({"target": {"model": "m"}, "drain_timeout_s": -1}, "drain_timeout_s", "got -1"),
        (
            {"target": {"model": "m", "resources": {"GPU": 1}}},
            "target.resources",
            "GPU is not a custom resource",
        ),
        (
            {"target": {"model": "m"}, "router": {"resources": {"edge": 0}}},
            "router.resources",
            "edge must be 0.0001 or more",
        ),
        *(
            ({"target": {"model": "m"}, "speculative": speculative}, f"speculative.{key}", text)
            for speculative, key, text in [
                ({"method": "medusa", "model": "d"}, "method", "'dspark'"),
                ({}, "model", "method dspark needs a checkpoint"),
                ({"method": "draft_model", "num_speculative_tokens": 3}, "model", "draft_model"),
                ({"method": "ngram", "model": "d"}, "model", "method ngram has no model"),
                ({"method": "ngram"}, "num_speculative_tokens", "method ngram needs it"),
                ({"method": "eagle3", "model": "d"}, "num_speculative_tokens", "eagle3 needs it"),
                ({"model": "d", "prompt_lookup_max": 3}, "prompt_lookup_max", "ngram only"),
                (
                    {
                        "method": "ngram",
                        "num_speculative_tokens": 3,
                        "prompt_lookup_min": 4,
                        "prompt_lookup_max": 3,
                    },
                    "prompt_lookup_max",
                    "at least prompt_lookup_min 4",
                ),
            ]
        ),
        (
            {"target": {"model": "m", "max_num_seqs": 64, "max_num_batched_tokens": 8}},
            "args",
            "target.max_num_batched_tokens",
        ),
    ],
)
def test_a_bad_value_is_named(args: Any, key: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.parse(args)
    assert caught.value.key == key
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("given", "bounds"),
    [({}, (5, 5)), ({"min": 2}, (2, 2)), ({"max": 4}, (4, 4)), ({"min": 1, "max": 3}, (1, 3))],
)
def test_bounds_of_prompt_lookup_complete_each_other(
    given: dict[str, int], bounds: tuple[int, int]
) -> None:
    keys = {f"prompt_lookup_{name}": value for name, value in given.items()}
    speculative = {"method": "ngram", "num_speculative_tokens": 3, **keys}
    config = ClusterConfig.parse({"target": {"model": "m"}, "speculative": speculative})
    assert config.speculative is not None
    assert config.speculative.prompt_lookup == bounds


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("applications: []", "applications"),
        ("[1, 2]", "applications"),
        ("applications: [text]", "applications.0"),
        ("applications: [{name: dspark}]", "args"),
    ],
)
def test_a_file_without_one_application_is_refused(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_serve_config(path)
    assert caught.value.key == key


def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_serve_config(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_serve_config(tmp_path / "none.yaml")


def test_relative_models_are_looked_up_beside_the_file(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    path = _write(tmp_path, {"target": {"model": "target"}, "speculative": {"model": "drafter"}})
    _, document, config = read_configuration(path)
    assert (config.target.model, config.speculative and config.speculative.model) == pair
    assert document["applications"][0]["args"]["target"]["model"] == pair[0]


def test_a_missing_model_folder_is_named(tmp_path: Path, pair: tuple[str, str]) -> None:
    path = _write(tmp_path, {"target": {"model": str(tmp_path / "none")}})
    with pytest.raises(ConfigError, match=r"target\.model: no such folder"):
        read_configuration(path)
    path = _write(tmp_path, {"target": {"model": pair[0]}, "speculative": {"model": "./none"}})
    with pytest.raises(ConfigError, match=r"speculative\.model: no such folder"):
        read_configuration(path)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_target_layers"])
def test_a_drafter_of_another_target_is_refused(
    tmp_path: Path, pair: tuple[str, str], key: str
) -> None:
    target, drafter = pair
    value = json.loads((Path(drafter) / "config.json").read_text())[key]
    _change(drafter, **{key: value * 2})
    path = _write(tmp_path, {"target": {"model": target}, "speculative": {"model": drafter}})
    with pytest.raises(CheckpointError) as caught:
        read_configuration(path)
    assert caught.value.key == key
    assert caught.value.file == str(Path(drafter) / "config.json")


def test_a_broken_checkpoint_is_named(tmp_path: Path, pair: tuple[str, str]) -> None:
    target, drafter = pair
    path = _write(tmp_path, {"target": {"model": target}, "speculative": {"model": drafter}})
    (Path(drafter) / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_configuration(path)
    shutil.rmtree(drafter)
    Path(drafter).mkdir()
    with pytest.raises(CheckpointError, match="no such file"):
        read_configuration(path)
