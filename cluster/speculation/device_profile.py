"""What a kind of device takes for a target's steps and a drafter's rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import ConfigError
from cluster.speculation.draft_curve import DraftCurve
from cluster.speculation.verify_curve import VerifyCurve

FORMAT = "dspark-device-profile"
VERSION = 1
_KEYS = ("format", "version", "name", "source", "target", "drafter")


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """Curves of one kind of device with one target and one drafter.

    Attributes:
        name: short, as status and reports show it.
        source: where the numbers are from: how they were measured, or derived.
        target: seconds of a replica's whole steps, all its shards together.
        drafter: seconds of a drafting pass.
    """

    name: str
    source: str
    target: VerifyCurve | None = None
    drafter: DraftCurve | None = None

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON objects hold it."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "source": self.source,
            "target": None if self.target is None else self.target.to_dict(),
            "drafter": None if self.drafter is None else self.drafter.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Any) -> DeviceProfile:
        """The inverse of ``to_dict``; ``target`` and ``drafter`` may be left out.

        Raises:
            ConfigError: a key is unknown or missing, or its value is wrong; names it.
        """
        if not isinstance(values, Mapping):
            raise ConfigError("device profile", "must be a mapping")
        for key in values:
            if key not in _KEYS:
                raise ConfigError(str(key), "unknown key", list(_KEYS))
        for key, expected in (("format", FORMAT), ("version", VERSION)):
            if values.get(key) != expected:
                raise ConfigError(key, f"must be {expected!r}, got {values.get(key)!r}")
        for key in ("name", "source"):
            if not isinstance(values.get(key), str) or not values[key]:
                raise ConfigError(key, "must be a text")
        target, drafter = values.get("target"), values.get("drafter")
        return cls(
            name=values["name"],
            source=values["source"],
            target=None if target is None else _part("target", VerifyCurve, target),
            drafter=None if drafter is None else _part("drafter", DraftCurve, drafter),
        )


def _part(name: str, curve: Any, values: Any) -> Any:
    try:
        return curve.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{name}.{error.key}", error.message) from None
