"""Device profiles in files. Free of torch, for the CLI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.section import parse_yaml
from cluster.speculation.device_profile import DeviceProfile


def read_profile(path: str | Path) -> DeviceProfile:
    """Reads a device profile from JSON (``*.json``) or YAML.

    Raises:
        ConfigError: the file cannot be read, or a value in it is wrong; names both.
    """
    values = _load(Path(path))
    try:
        return DeviceProfile.from_dict(values)
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
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from None
    if path.suffix != ".json":
        return parse_yaml(str(path), text)
    try:
        return json.loads(text)  # not all JSON numbers are numbers in YAML 1.1
    except (ValueError, RecursionError) as error:
        raise ConfigError(str(path), f"is not JSON: {error}") from None
