"""API keys: how they are made, and the file that knows them by their hashes.

::

    keys:
      - name: team-a
        sha256: 2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
        requests_per_second: 10
        max_concurrent_requests: 32
        max_queued_tokens: 200000

Keys are 256 random bits, so one plain hash is as good as a slow one: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from cluster.errors import ConfigError
from cluster.section import Section, parse_section, parse_yaml

KEY_PREFIX = "dspark_"
_NUM_RANDOM_BYTES = 32
# Every one is compared with, so that the time says nothing about which is near.
MAX_KEYS = 1000


class ApiKey(Section):
    """One entry of the file; limits hold over all routers together, unset: there is none."""

    name: str = Field(
        min_length=1, max_length=64, pattern=r"^[\w.@-]+$", description="for logs and counters"
    )
    sha256: str = Field(description="hex SHA-256 of the key", repr=False)
    requests_per_second: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_concurrent_requests: int | None = Field(default=None, ge=1)
    max_queued_tokens: int | None = Field(
        default=None, ge=1, description="prompts and longest outputs of its requests at a time"
    )

    @field_validator("sha256")
    @classmethod
    def _check_sha256(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ValueError("must be 64 hexadecimal digits in lower case")
        return value


class _KeyFile(Section):
    keys: list[ApiKey] = Field(max_length=MAX_KEYS)


def make_key() -> str:
    """A new key; nobody but its owner may keep it."""
    return KEY_PREFIX + secrets.token_urlsafe(_NUM_RANDOM_BYTES)


def hash_key(key: str) -> str:
    """What the file holds instead of the key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: str) -> tuple[ApiKey, ...]:
    """The keys of a file.

    Raises:
        ConfigError: naming file and entry; never quotes a hash.
    """
    name = f"security.api_keys_file {path}"
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(name, f"cannot be read: {error.strerror}") from None
    return parse_keys(parse_yaml(name, text), name)


def parse_keys(document: Any, name: str = "keys") -> tuple[ApiKey, ...]:
    """The keys of a file's document. Raises: ConfigError, as ``read_keys``."""
    try:
        keys = parse_section(_KeyFile, document).keys
    except ConfigError as error:
        # Without the value, which may be a key that somebody has put there unhashed.
        message = error.message.partition(", got ")[0]
        raise ConfigError(f"{name}: {error.key}", message) from None
    for attribute in ("name", "sha256"):
        values = [getattr(key, attribute) for key in keys]
        if len(set(values)) != len(values):
            raise ConfigError(name, f"has the same {attribute} twice")
    return tuple(keys)
