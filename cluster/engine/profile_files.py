"""Device profiles in files. Free of torch, for the CLI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError
from cluster.speculation.device_profile import DeviceProfile


def read_profile(path: str | Path) -> DeviceProfile:
    """Reads a device profile from JSON (``*.json``) or YAML.

    Raises:
        ConfigError: the file cannot be read, or a value in it is wrong; names both.
    """
    try:
        return DeviceProfile.from_dict(_load(Path(path)))
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(str(path), f"cannot be parsed: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.key}", error.message) from None


def write_profile(path: str | Path, profile: DeviceProfile) -> None:
    """Writes a device profile as JSON.

    Raises:
        ConfigError: the file cannot be written; names it.
    """
    try:
        text = json.dumps(profile.to_dict(), indent=1) + "\n"
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(path), f"cannot be written: {error.strerror}") from None


def _load(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    # Not all JSON numbers are numbers in YAML 1.1.
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
