"""Fleet files of ``dspark simulate``."""

from __future__ import annotations

from pathlib import Path

import yaml

from cluster.engine.profile_files import read_profile
from cluster.errors import ConfigError
from cluster.simulation.fleet import Fleet, FleetConfig, profile_path


def read_fleet(path: Path) -> Fleet:
    """Reads a fleet file (YAML) and the profiles that it names.

    Raises:
        ConfigError: a file cannot be read, or has a bad value; names the key.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(str(path), f"is not YAML: {error}") from None
    return make_fleet(FleetConfig.parse(values), path.resolve().parent)


def make_fleet(config: FleetConfig, base_dir: Path) -> Fleet:
    """A fleet with its profiles, which are looked for from ``base_dir``. Raises: ConfigError."""
    names = {config.target.profile}
    if config.drafter is not None and config.drafter.profile is not None:
        names.add(config.drafter.profile)
    return Fleet.of(config, {name: read_profile(profile_path(name, base_dir)) for name in names})
