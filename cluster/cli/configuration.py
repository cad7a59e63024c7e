"""Finding a configuration file and checking it, with the checkpoints it names, before any start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cluster
from cluster.config import ClusterConfig, load_serve_config
from cluster.engine.layout import check_split
from cluster.errors import CheckpointError, ConfigError
from cluster.models.dspark_config import DSparkConfig, check_drafter_matches_target

DEFAULT_CONFIG = Path("deployments") / "local.yaml"


def read_configuration(given: str | None) -> tuple[Path, dict[str, Any], ClusterConfig]:
    """Reads and checks the configuration that the user named, or the default one.

    Returns:
        The file's path, the Serve configuration for Ray and the same parsed.

    Raises:
        ConfigError: the file or a value in it is wrong.
        CheckpointError: a model that it names is not there, broken, or does not fit the other.
    """
    path = Path(given) if given is not None else _default_path()
    document, config = load_serve_config(path)
    _check_checkpoints(config)
    return path.resolve(), document, config


def _default_path() -> Path:
    beside_package = Path(cluster.__file__).resolve().parents[1] / DEFAULT_CONFIG
    for path in (DEFAULT_CONFIG, beside_package):
        if path.exists():
            return path
    raise ConfigError("CONFIG", f"name a file: there is no {DEFAULT_CONFIG} here")


def _check_checkpoints(config: ClusterConfig) -> None:
    """Checks what can be read quickly; models that are still on a hub are checked by the actors."""
    target = Path(config.target.model)
    if not target.is_dir():
        if target.is_absolute() or config.target.model.startswith("."):
            raise ConfigError("target.model", f"no such folder: {target}")
        return
    target_config = _read_json(target / "config.json")
    _check_layout(config, target_config)
    if config.speculative is None:
        return
    drafter = Path(config.speculative.checkpoint)
    if not drafter.is_dir():
        if drafter.is_absolute() or config.speculative.checkpoint.startswith("."):
            raise ConfigError("speculative.model", f"no such folder: {drafter}")
        return
    file = drafter / "config.json"
    drafter_config = DSparkConfig.from_dict(_read_json(file), str(file))
    check_drafter_matches_target(drafter_config, target_config, str(file))
    guesses = config.speculative.num_speculative_tokens
    if guesses is not None and guesses > drafter_config.block_size:
        raise ConfigError(
            "speculative.num_speculative_tokens",
            f"is {guesses}, the drafter's block_size is {drafter_config.block_size}",
        )


def _check_layout(config: ClusterConfig, target_config: dict[str, Any]) -> None:
    """Refuses splits of the target that its shape does not allow, before anything starts."""
    check_split(
        target_config,
        tensor_parallel_size=config.target.tensor_parallel_size,
        pipeline_parallel_size=config.target.pipeline_parallel_size,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(str(path), None, f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(str(path), None, f"is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(str(path), None, "must hold one JSON object")
    return values
