"""What a target's step costs, as measured: seconds by batch tokens and by context tokens.

*Batch tokens* are all tokens that a pass computes: guesses and prompt chunks included. *Context
tokens* are the cached tokens that they look back on, summed over the pass's sequences: a sequence
with 500 tokens in the cache counts 500, whether it brings one token or a block of eight.

Why that sum: a step's time beyond its batch tokens is the reading of cached keys and values, which
is done once a sequence. The sum over *tokens* (tokens x context, the attention's multiplications)
would say that a guess costs another reading of the context. It does not; that is why guesses pay
at long contexts. Measured on the CPU, the sum of contexts also predicts mixed batches better
(docs/verify-curve.md).
"""

from __future__ import annotations

import dataclasses
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
    lifted,
    place,
    pulled_down,
    read_numbers,
)

Floats = npt.NDArray[np.float64]

FORMAT = "dspark-verify-curve"
VERSION = 1


@dataclass(frozen=True)
class CurveOrigin:
    """What a curve was measured on. All but the last four fields are its ``identity``.

    Attributes:
        target_digest: hex SHA-256 of the target's configuration and weights.
        processor: model name of the CPU; ``cores``: of the machine.
        accelerator: model name of the GPU, empty without one.
        num_threads: CPU threads of each shard.
        deterministic: whether the target ran in deterministic mode.
        execution: how its shards ran their layers, as ``TargetShard.execution`` says it.
        measured_at: UTC, ISO 8601.
    """

    target_digest: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    dtype: str
    device: str
    num_threads: int
    deterministic: bool
    execution: str
    processor: str
    cores: int
    accelerator: str
    torch: str = ""
    transformers: str = ""
    dspark: str = ""
    measured_at: str = ""

    @property
    def identity(self) -> dict[str, str | int | bool]:
        """What must be equal for a curve to be used again."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in list(values)[:-4]}

    @classmethod
    def from_dict(cls, values: Any) -> CurveOrigin:
        """The inverse of ``dataclasses.asdict``. Raises: ConfigError: naming the key."""
        if not isinstance(values, Mapping):
            raise ConfigError("origin", "must be an object")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise ConfigError(f"origin.{name}", "unknown key", fields)
        kinds = {"str": str, "int": int, "bool": bool}
        for name, field in fields.items():
            if name not in values:
                raise ConfigError(f"origin.{name}", "is missing")
            if type(values[name]) is not kinds[str(field.type)]:
                raise ConfigError(f"origin.{name}", f"must be {field.type}, got {values[name]!r}")
        return cls(**values)


@dataclass(frozen=True, eq=False)
class VerifyCurve:
    """Seconds of a step on a grid of sizes, and between and beyond its points.

    Guarantees: positive, and never falling in either direction: more tokens or more context never
    cost less. Between points it is bilinear; below the first ones flat; beyond the last ones it
    goes on with the last segments' slope (the mean over the other axis, so that it stays monotone).
    Immutable. To be made by ``fit``, ``of_tokens`` or ``from_dict``, which check all of this.

    Attributes:
        tokens: ``[T]`` batch tokens, rising, positive.
        context_tokens: ``[C]``, rising, not negative.
        table: ``[T, C]`` seconds.
        origin: what it was measured on, where that is known.
    """

    tokens: Floats
    context_tokens: Floats
    table: Floats
    origin: CurveOrigin | None = None

    def _checked(self) -> VerifyCurve:
        """Itself. Raises: ConfigError: an array breaks the guarantees; names it."""
        check_axis("tokens", self.tokens, 1)
        check_axis("context_tokens", self.context_tokens, 0)
        check_table(self.table, self.tokens, self.context_tokens, "tokens or more context")
        return self

    @classmethod
    def of_tokens(cls, seconds_by_tokens: Mapping[int, float]) -> VerifyCurve:
        """A curve on which context costs nothing."""
        tokens = sorted(seconds_by_tokens)
        return cls.fit(tokens, [0], [[seconds_by_tokens[size]] for size in tokens])

    @classmethod
    def fit(
        cls,
        tokens: Sequence[int],
        context_tokens: Sequence[int],
        measured: npt.ArrayLike,
        origin: CurveOrigin | None = None,
    ) -> VerifyCurve:
        """The curve of noisy and incomplete measurements.

        Noise only ever adds time, so what a larger step took bounds what a smaller one takes: each
        point becomes the least of what it and all larger ones measured. (A running maximum would
        let one disturbed measurement lift every point behind it.)

        Args:
            measured: ``[T, C]`` seconds, NaN where nothing was measured. The first column is
                complete and every other has a measurement: a missing one is taken to add to its
                row what the nearest measured row of the column adds (reading the cache and
                computing tokens happen one after the other).

        Raises:
            ConfigError: an axis or the measurements are unusable; names them.
        """
        table = np.array(measured, dtype=np.float64)
        if table.ndim != 2 or table.size == 0 or np.any(np.isnan(table[:, 0])):
            raise ConfigError("seconds", "need a measurement of every size without context")
        is_missing = np.isnan(table)
        if np.any(is_missing.all(axis=0)):
            raise ConfigError("seconds", "need a measurement of every context")
        table = pulled_down(np.where(is_missing, np.inf, table))
        rows = np.arange(len(table))
        for column in range(1, table.shape[1]):
            missing = is_missing[:, column]
            known = np.flatnonzero(~missing)
            nearest = known[np.abs(rows[:, None] - known).argmin(axis=1)]
            added = table[nearest, column] - table[nearest, 0]
            table[missing, column] = (table[:, 0] + added)[missing]
        curve = cls(_floats(tokens), _floats(context_tokens), pulled_down(table), origin)
        return curve._checked()

    @overload
    def seconds(self, num_tokens: float, context_tokens: float = 0) -> float: ...
    @overload
    def seconds(self, num_tokens: Sizes, context_tokens: float = 0) -> Floats: ...
    def seconds(self, num_tokens: float | Sizes, context_tokens: float = 0) -> float | Floats:
        """Seconds of steps with ``num_tokens`` batch tokens (any shape) and the same context."""
        if isinstance(num_tokens, (int, float)):
            return self._lookup.at(num_tokens, context_tokens)
        return interpolate(self.table, self.tokens, self.context_tokens, num_tokens, context_tokens)

    @functools.cached_property
    def _lookup(self) -> Lookup:
        return Lookup(self.table, self.tokens, self.context_tokens)

    def corrected(self, num_tokens: float, context_tokens: float, factor: float) -> VerifyCurve:
        """The curve with the points around a place multiplied by ``factor``.

        Each moves by its share in the interpolation there. What rises lifts larger sizes with it,
        what falls pulls smaller ones down.
        """
        row, next_row, row_share = place(self.tokens, num_tokens)
        column, next_column, column_share = place(self.context_tokens, context_tokens)
        table = self.table.copy()
        for i, row_weight in ((row, 1.0 - row_share), (next_row, row_share)):
            for j, column_weight in ((column, 1.0 - column_share), (next_column, column_share)):
                table[i, j] *= factor ** (row_weight * column_weight)
        table = lifted(table) if factor >= 1 else pulled_down(table)
        return VerifyCurve(self.tokens, self.context_tokens, table, self.origin)

    def scaled(self, factor: float) -> VerifyCurve:
        """The curve of steps that take ``factor`` (above 0) times as long."""
        return VerifyCurve(self.tokens, self.context_tokens, self.table * factor, self.origin)

    def to_dict(self) -> dict[str, Any]:
        """The curve as JSON objects hold it."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "tokens": [int(size) for size in self.tokens],
            "context_tokens": [int(size) for size in self.context_tokens],
            "seconds": self.table.tolist(),
            "origin": None if self.origin is None else dataclasses.asdict(self.origin),
        }

    @classmethod
    def from_dict(cls, values: Any) -> VerifyCurve:
        """The inverse of ``to_dict``.

        Raises:
            ConfigError: a value is missing, of the wrong kind or impossible; names its key.
        """
        if not isinstance(values, Mapping):
            raise ConfigError("verify curve", "must be a JSON object")
        if values.get("format") != FORMAT:
            raise ConfigError("format", f"must be '{FORMAT}', got {values.get('format')!r}")
        if values.get("version") != VERSION:
            raise ConfigError("version", f"must be {VERSION}, got {values.get('version')!r}")
        arrays = {}
        for key in ("tokens", "context_tokens", "seconds"):
            if key not in values:
                raise ConfigError(key, "is missing")
            arrays[key] = read_numbers(key, values[key])
        origin = values.get("origin")
        curve = cls(
            arrays["tokens"],
            arrays["context_tokens"],
            arrays["seconds"],
            None if origin is None else CurveOrigin.from_dict(origin),
        )
        return curve._checked()


def _floats(values: Sequence[int]) -> Floats:
    return np.asarray(values, dtype=np.float64)
