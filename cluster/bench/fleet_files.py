"""Fleet files of ``dspark simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.engine.profile_files import read_profile
from cluster.errors import ConfigError
from cluster.section import parse_yaml
from cluster.simulation.fleet import Fleet, FleetConfig, profile_path


def read_fleet(path: Path) -> Fleet:
    """Reads a fleet file (YAML) and the profiles, and statistics of acceptance, that it names.

    Raises:
        ConfigError: a file cannot be read, or has a bad value; names the key.
    """
    values, base_dir = _read(path), path.resolve().parent
    if isinstance(values, dict) and isinstance(values.get("acceptance"), str):
        values = values | {"acceptance": _read(base_dir / values["acceptance"])}
    return make_fleet(FleetConfig.parse(values), base_dir)


def make_fleet(config: FleetConfig, base_dir: Path) -> Fleet:
    """A fleet with its profiles, which are looked for from ``base_dir``. Raises: ConfigError."""
    names = {config.target.profile}
    if config.drafter is not None and config.drafter.profile is not None:
        names.add(config.drafter.profile)
    return Fleet.of(config, {name: read_profile(profile_path(name, base_dir)) for name in names})


def _read(path: Path) -> Any:
    try:
        return parse_yaml(str(path), path.read_bytes())
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from None
