"""What a drafter's pass costs: seconds by sessions in it and by tokens drafted for each."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from cluster.errors import ConfigError
from cluster.speculation.monotone_table import (
    Lookup,
    Sizes,
    check_axis,
    check_table,
    interpolate,
    pulled_down,
    read_numbers,
)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DraftCurve:
    """Seconds of a drafter's pass on a grid of sizes, and between and beyond its points.

    Guarantees: positive, and never falling with more sessions or more tokens. Immutable. To be made
    by ``fit``, ``of_sessions`` or ``from_dict``, which check that.

    Attributes:
        sessions: ``[S]``, rising, positive.
        tokens: ``[K]`` tokens drafted for each session, rising, positive.
        table: ``[S, K]`` seconds.
    """

    sessions: Floats
    tokens: Floats
    table: Floats

    def _checked(self) -> DraftCurve:
        check_axis("sessions", self.sessions, 1)
        check_axis("tokens", self.tokens, 1)
        check_table(self.table, self.sessions, self.tokens, "sessions or more tokens")
        return self

    @classmethod
    def of_sessions(cls, seconds_by_sessions: Mapping[int, float]) -> DraftCurve:
        """A curve on which the number of tokens costs nothing."""
        sessions = sorted(seconds_by_sessions)
        return cls.fit(sessions, [1], [[seconds_by_sessions[size]] for size in sessions])

    @classmethod
    def fit(
        cls, sessions: Sequence[int], tokens: Sequence[int], measured: npt.ArrayLike
    ) -> DraftCurve:
        """The curve of noisy measurements ``[S, K]``: what a larger pass took bounds smaller ones.

        Raises:
            ConfigError: an axis or the measurements are unusable; names them.
        """
        table = np.array(measured, dtype=np.float64)
        if table.ndim != 2 or table.size == 0:
            raise ConfigError("seconds", "must be a table of sessions and tokens")
        curve = cls(
            np.asarray(sessions, dtype=np.float64),
            np.asarray(tokens, dtype=np.float64),
            pulled_down(table),
        )
        return curve._checked()

    @overload
    def seconds(self, num_sessions: float, num_tokens: float | None = None) -> float: ...
    @overload
    def seconds(self, num_sessions: Sizes, num_tokens: float | None = None) -> Floats: ...
    def seconds(
        self, num_sessions: float | Sizes, num_tokens: float | None = None
    ) -> float | Floats:
        """Seconds of passes for ``num_sessions`` sessions (any shape).

        Args:
            num_tokens: drafted for each; unset: the most that were measured.
        """
        tokens = float(self.tokens[-1]) if num_tokens is None else num_tokens
        if isinstance(num_sessions, (int, float)):
            return self._lookup.at(num_sessions, tokens)
        return interpolate(self.table, self.sessions, self.tokens, num_sessions, tokens)

    @functools.cached_property
    def _lookup(self) -> Lookup:
        return Lookup(self.table, self.sessions, self.tokens)

    def scaled(self, factor: float) -> DraftCurve:
        """The curve of a device that is ``factor`` times slower (positive)."""
        return DraftCurve(self.sessions, self.tokens, self.table * factor)._checked()

    def to_dict(self) -> dict[str, Any]:
        """The curve as JSON objects hold it."""
        return {
            "sessions": [int(size) for size in self.sessions],
            "tokens": [int(size) for size in self.tokens],
            "seconds": self.table.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Any) -> DraftCurve:
        """The inverse of ``to_dict``; without ``tokens``, ``seconds`` is one number a size.

        Raises:
            ConfigError: a value is missing, of the wrong kind or impossible; names its key.
        """
        if not isinstance(values, Mapping):
            raise ConfigError("draft curve", "must be a mapping")
        for key in ("sessions", "seconds"):
            if key not in values:
                raise ConfigError(key, "is missing")
        sessions = read_numbers("sessions", values["sessions"])
        table = read_numbers("seconds", values["seconds"])
        if "tokens" not in values:
            return cls(sessions, np.ones(1), table.reshape(-1, 1))._checked()
        return cls(sessions, read_numbers("tokens", values["tokens"]), table)._checked()
