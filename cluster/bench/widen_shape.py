"""How a small Qwen3 is embedded in a larger one that computes the same function.

**Residual stream.** A norm divides by the root of the *mean* of squares, so a residual padded with
zeros would want other norm weights, and another epsilon than q and k norms do, of which a
configuration has one. Instead the residual x of width d is written k = ⌊D / d⌋ times side by side,
and what is left of the width D is zero: x' = a·(x, …, x, 0) with a = √(D / (k·d)). Then
mean(x'²) = k·d·a²·mean(x²) / D = mean(x²): every norm divides by what it divided by, with the
epsilon it had. Norm weights are w / a for the first copy and 0 elsewhere, so whatever reads a norm
(q, k, v, gate, up, head) gets the narrow values in its first d columns and zeros behind them;
whatever writes the residual (embedding, o, down) has its rows times a, once for each copy. Where d
divides D, a is 1 and every weight keeps its bits. A head tied to the embedding has its factor a
taken out again by the last norm.

**Heads.** Head dimension H = t·h. Queries and keys have each of their h rows t times in a row: the
mean of squares stays, and row t·i of the wide head is turned by base^(-2·t·i / H) =
base^(-2·i / h), as row i of the narrow one is. The norms' weights are 0 for all but the first of t,
so products of queries and keys stay too; √t on the query norm makes up for 1/√H. With t = 4 that is
exact in any dtype, with t = 2 it rounds. Values and the output projection are padded. Query heads
stay with the key head they read: with fewer query heads to a key head than before, key heads are
repeated. Added heads are zero.

**Layers.** Narrow layer i becomes wide layer ⌊(i + 1)·L / l⌋ - 1, its residual the same; added
layers have zero output projections, that is, they are identities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from cluster.errors import ConfigError

_CONFIG_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Qwen3 that widening changes; each has an option of its name."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """That of a complete ``config.json``."""
        return cls(**{name: int(config[key]) for name, key in _CONFIG_KEYS.items()})

    def config_values(self) -> dict[str, Any]:
        """These sizes as keys of a ``config.json``."""
        values: dict[str, Any] = {_CONFIG_KEYS[k]: v for k, v in asdict(self).items()}
        return {**values, "layer_types": ["full_attention"] * self.num_layers}

    def with_layers(self, num_layers: int) -> Shape:
        """The same with another number of layers."""
        return replace(self, num_layers=num_layers)


class Widening:
    """The embedding of a narrow shape in a wide one: which narrow row every wide row is.

    Guarantees: with the weights it describes a wide network gives the narrow one's logits, but for
    rounding; where ``is_exact`` its weights are the narrow ones' times powers of two.

    An *axis* is an int64 tensor as long as a wide dimension, of indices into the narrow one; -1 is
    a zero.

    Attributes:
        layers: where each narrow layer is among the wide ones, ascending.
        residual: axis of what is written to the residual stream, ``[D]``.
        normed: axis of what is read behind a norm, ``[D]``.
        inner: axis of the MLP's inside.
        queries, keys, values: axes of the projections' rows, heads × dimensions.
        attended: axis of the output projection's columns.
        head_norm: axis of the q and k norms' weights.
        residual_scale: a above.
        query_gain: √t above.

    Args:
        narrow: what is there.
        wide: what it is to become.

    Raises:
        ConfigError: names the option of a size that is too small or does not fit.
    """

    def __init__(self, narrow: Shape, wide: Shape) -> None:
        self.narrow, self.wide = narrow, wide
        for name in ("hidden_size", "intermediate_size", "num_layers", "head_dim"):
            least, size = getattr(narrow, name), getattr(wide, name)
            if size < least:
                raise _error(name, f"is {size}, which has no room for the narrow model's {least}")
        if wide.head_dim % narrow.head_dim:
            raise _error(
                "head_dim",
                f"is {wide.head_dim}, not a multiple of the narrow model's {narrow.head_dim}: "
                "rotary frequencies would not be among the wide ones",
            )
        if wide.num_heads % wide.num_kv_heads:
            raise _error(
                "num_heads", f"is {wide.num_heads}, not a multiple of {wide.num_kv_heads} key heads"
            )
        self.layers = tuple(
            (index + 1) * wide.num_layers // narrow.num_layers - 1
            for index in range(narrow.num_layers)
        )
        width = narrow.hidden_size
        copies = wide.hidden_size // width
        self.residual_scale = math.sqrt(wide.hidden_size / (copies * width))
        self.residual = _padded(torch.arange(width).repeat(copies), wide.hidden_size)
        self.normed = _padded(torch.arange(width), wide.hidden_size)
        self.inner = _padded(torch.arange(narrow.intermediate_size), wide.intermediate_size)

        times = wide.head_dim // narrow.head_dim
        self.query_gain = math.sqrt(times)
        dims = torch.arange(narrow.head_dim)
        repeated = dims.repeat_interleave(times)
        self.head_norm = repeated.where(torch.arange(wide.head_dim) % times == 0, -1)
        padded = _padded(dims, wide.head_dim)
        key_heads, query_heads = _heads(narrow, wide)
        self.queries = _joined(query_heads, repeated, narrow.head_dim)
        self.keys = _joined(key_heads, repeated, narrow.head_dim)
        self.values = _joined(key_heads, padded, narrow.head_dim)
        self.attended = _joined(query_heads, padded, narrow.head_dim)

    @property
    def is_exact(self) -> bool:
        """Whether every factor is a power of two, so that no weight is rounded in any dtype."""
        return all(
            math.frexp(factor)[0] == 0.5 for factor in (self.residual_scale, self.query_gain)
        )


def widen_tensor(
    weight: torch.Tensor,
    rows: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """``weight`` laid out along axes, times ``scale``.

    Args:
        weight: ``[rows, …]`` or, with ``columns``, ``[rows, columns]``.
        rows: axis of the first dimension; unset: it stays.
        columns: axis of the second one.

    Returns:
        fp32 where it was scaled, else the dtype that it had.
    """
    wide = weight if scale == 1.0 else weight.float() * scale
    for dim, axis in ((0, rows), (1, columns)):
        if axis is not None:
            wide = wide.index_select(dim, axis.clamp(min=0))
            wide.index_fill_(dim, (axis < 0).nonzero().flatten(), 0.0)
    return wide


def _heads(narrow: Shape, wide: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Axes of key heads and of query heads, every query head beside the key head it reads."""
    group, wide_group = (s.num_heads // s.num_kv_heads for s in (narrow, wide))
    copies = math.ceil(group / wide_group)
    needed = narrow.num_kv_heads * copies
    if wide.num_kv_heads < needed:
        raise _error(
            "num_kv_heads",
            f"is {wide.num_kv_heads}; with {wide_group} query heads to a key head, the narrow "
            f"model's {narrow.num_heads} and {narrow.num_kv_heads} need {needed}",
        )
    key_heads = torch.arange(narrow.num_kv_heads).repeat_interleave(copies)
    query_heads = torch.full((wide.num_heads,), -1)
    for head in range(narrow.num_heads):
        key_head, member = divmod(head, group)
        copy, slot = divmod(member, wide_group)
        query_heads[(key_head * copies + copy) * wide_group + slot] = head
    return _padded(key_heads, wide.num_kv_heads), query_heads


def _padded(axis: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat([axis, axis.new_full((size - len(axis),), -1)])


def _joined(heads: torch.Tensor, dims: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The axis of heads × dimensions."""
    joined = heads[:, None] * head_dim + dims
    return joined.where((heads[:, None] >= 0) & (dims >= 0), -1).flatten()


def _error(name: str, message: str) -> ConfigError:
    return ConfigError("--" + name.replace("_", "-"), message)
