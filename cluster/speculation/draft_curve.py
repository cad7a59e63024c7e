"""What a drafter's round costs: seconds of a pass by the number of sequences it drafts for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import ConfigError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DraftCurve:
    """Seconds of one drafting pass: linear between its points, the first below, the last slope on.

    A *session* is one sequence that the pass drafts a whole block for, whichever replica it is of.
    The time is the drafter's own (its pass and sampling), without queue and network.

    Guarantees: seconds are positive, and never fall with more sessions.

    Attributes:
        sessions: ``[N]`` rising, from at least 1.
        table: ``[N]`` seconds.
    """

    sessions: Floats
    table: Floats

    @classmethod
    def of_sessions(cls, seconds_by_sessions: Mapping[int, float]) -> DraftCurve:
        """The curve through the points.

        Raises:
            ConfigError: there is none, or one breaks the guarantees; names the axis.
        """
        sizes = sorted(seconds_by_sessions)
        curve = cls(
            np.asarray(sizes, dtype=np.float64),
            np.asarray([seconds_by_sessions[size] for size in sizes], dtype=np.float64),
        )
        return curve._checked()

    def seconds(self, num_sessions: npt.ArrayLike) -> Floats:
        """Seconds of passes that draft for ``num_sessions`` sequences (any shape)."""
        sizes = np.asarray(num_sessions, dtype=np.float64)
        seconds = np.interp(sizes, self.sessions, self.table)
        if len(self.sessions) > 1:
            (before, last), (earlier, final) = self.sessions[-2:], self.table[-2:]
            slope = (final - earlier) / (last - before)
            seconds = seconds + slope * np.maximum(sizes - last, 0.0)
        return np.asarray(seconds)

    def scaled(self, factor: float) -> DraftCurve:
        """The curve of a drafter that takes ``factor`` (above 0) times as long."""
        return DraftCurve(self.sessions, self.table * factor)

    def to_dict(self) -> dict[str, Any]:
        """The curve as JSON objects hold it."""
        return {
            "sessions": [int(size) for size in self.sessions],
            "seconds": self.table.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Any) -> DraftCurve:
        """The inverse of ``to_dict``.

        Raises:
            ConfigError: a value is missing, of the wrong kind or impossible; names its key.
        """
        if not isinstance(values, Mapping):
            raise ConfigError("draft curve", "must be a mapping")
        arrays = {}
        for key in ("sessions", "seconds"):
            if key not in values:
                raise ConfigError(key, "is missing")
            arrays[key] = _numbers(key, values[key])
        return cls(arrays["sessions"], arrays["seconds"])._checked()

    def _checked(self) -> DraftCurve:
        sessions, table = self.sessions, self.table
        if len(sessions) == 0 or not np.all(np.isfinite(sessions)) or sessions[0] < 1:
            raise ConfigError("sessions", "must be a list of finite numbers from at least 1")
        if np.any(np.diff(sessions) <= 0):
            raise ConfigError("sessions", "must rise")
        if len(table) != len(sessions):
            raise ConfigError("seconds", f"must have {len(sessions)} numbers")
        if not np.all(np.isfinite(table)) or table[0] <= 0:
            raise ConfigError("seconds", "must be positive and finite")
        if np.any(np.diff(table) < 0):
            raise ConfigError("seconds", "must not fall with more sessions")
        return self


def _numbers(key: str, values: Any) -> Floats:
    is_list = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    if not is_list:
        raise ConfigError(key, "must be a list of numbers")
    return np.asarray(values, dtype=np.float64)
