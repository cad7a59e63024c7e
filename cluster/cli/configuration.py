"""Finding a configuration file and checking it, with the checkpoints it names, before any start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cluster
from cluster.config import ClusterConfig
from cluster.engine.curve_files import read_curve
from cluster.engine.layout import check_split
from cluster.engine.pace import draft_pace, target_pace
from cluster.errors import ConfigError
from cluster.models.drafter_check import check_drafter
from cluster.models.json_files import read_json
from cluster.models.tensor_headers import read_headers
from cluster.serve_config import load_serve_config

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
    check_checkpoints(config)
    return path.resolve(), document, config


def _default_path() -> Path:
    beside_package = Path(cluster.__file__).resolve().parents[1] / DEFAULT_CONFIG
    for path in (DEFAULT_CONFIG, beside_package):
        if path.exists():
            return path
    raise ConfigError("CONFIG", f"name a file: there is no {DEFAULT_CONFIG} here")


def check_checkpoints(config: ClusterConfig) -> None:
    """Checks what can be read quickly; models that are still on a hub are checked by the actors.

    Raises:
        ConfigError, CheckpointError: as ``read_configuration``.
    """
    if config.target.verify_curve is not None:
        read_curve(config.target.verify_curve)
    target_pace(config.target.pace, config.target.pipeline_parallel_size)
    draft_pace(config.drafter.pace)
    target = Path(config.target.model)
    if not target.is_dir():
        if target.is_absolute() or config.target.model.startswith("."):
            raise ConfigError("target.model", f"no such folder: {target}")
        return
    target_config = read_json(target / "config.json")
    _check_layout(config, target_config)
    read_headers(target)
    if config.speculative is None or config.speculative.model is None:
        return
    drafter = Path(config.speculative.model)
    if not drafter.is_dir():
        if drafter.is_absolute() or config.speculative.model.startswith("."):
            raise ConfigError("speculative.model", f"no such folder: {drafter}")
        return
    text_config = target_config.get("text_config") or target_config
    # Where the file relies on defaults of its architecture the actors check, who know them.
    if all(key in text_config for key in ("hidden_size", "vocab_size", "num_hidden_layers")):
        check_drafter(config.speculative, drafter, text_config, target)


def _check_layout(config: ClusterConfig, target_config: dict[str, Any]) -> None:
    """Refuses splits of the target that its shape does not allow, before anything starts."""
    check_split(
        target_config,
        tensor_parallel_size=config.target.tensor_parallel_size,
        pipeline_parallel_size=config.target.pipeline_parallel_size,
    )
