"""Ray Serve configuration files with one dspark application in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.section import parse_yaml

# What Serve has to be told of an application whose parts come and go with the load.
_AUTOSCALING_POLICY = {"policy_function": "cluster.actors.autoscaling:ApplicationPolicy"}


def load_serve_config(path: Path) -> tuple[dict[str, Any], ClusterConfig]:
    """Reads a Ray Serve configuration file with one dspark application in it.

    Returns:
        The Serve configuration as a mapping whose application ``args`` are validated and hold
        absolute model paths, and the parsed ``ClusterConfig``.

    Raises:
        ConfigError: unreadable file, no application, or a bad value in it.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from None
    document = parse_yaml(str(path), text)
    applications = document.get("applications") if isinstance(document, dict) else None
    if not isinstance(applications, list) or len(applications) != 1:
        raise ConfigError("applications", "must be a list with one application")
    application = applications[0]
    if not isinstance(application, dict):
        raise ConfigError("applications.0", "must be a mapping")
    config = ClusterConfig.parse(application.get("args"), base_dir=path.resolve().parent)
    application["args"] = config.model_dump(mode="json", exclude_unset=True)
    if config.is_scaled:
        application.setdefault("autoscaling_policy", dict(_AUTOSCALING_POLICY))
    return document, config
