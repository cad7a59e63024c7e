"""Strict access to a checkpoint's ``config.json``, shared by every drafter format."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from cluster.errors import CheckpointError

DEFAULT_ROPE_THETA = 10000.0

_MISSING = object()

# Kinds of rotary positions that transformers knows, with the numbers that each cannot do without.
_ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "proportional": (),
    "longrope": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


class ConfigReader:
    """Typed access to a ``config.json``: every error is a ``CheckpointError`` that names the file
    and the key."""

    def __init__(self, data: Mapping[str, Any], file: str) -> None:
        self._data = data
        self._file = file

    def error(self, key: str, message: str) -> CheckpointError:
        """An error about ``key`` of this file, to be raised."""
        return CheckpointError(self._file, key, message)

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """The value as it stands; without a default, a missing key is an error."""
        value = self._data.get(key, default)
        if value is _MISSING:
            raise self.error(key, "is missing")
        return value

    def refuse_speculators(self) -> None:
        """Refuses the format of the speculators library, which shifts slots and layers."""
        if "speculators_model_type" in self._data:
            raise self.error(
                "speculators_model_type",
                "checkpoints of the speculators library use another slot convention; "
                "only DeepSpec's format is loaded",
            )

    def integer(self, key: str, minimum: int, default: int | None = None) -> int:
        """An integer of at least ``minimum``."""
        value = self.get(key, _MISSING if default is None else default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(key, f"must be an integer of at least {minimum}, not {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        """A number above zero."""
        value = self.get(key, default)
        if not _is_positive(value):
            raise self.error(key, f"must be a number above 0, not {value!r}")
        return float(value)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """A JSON true or false."""
        value = self.get(key, _MISSING if default is None else default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {value!r}")
        return value

    def layer_ids(self, key: str, minimum: int) -> tuple[int, ...]:
        """A list of strictly increasing layer numbers, the first at least ``minimum``."""
        value = self.get(key)
        valid = isinstance(value, list) and len(value) > 0
        if not valid or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
            raise self.error(key, f"must be a list of integers, not {value!r}")
        if value[0] < minimum or any(low >= high for low, high in pairwise(value)):
            raise self.error(key, f"must increase from {minimum} or more, not {value!r}")
        return tuple(value)

    def refuse_partial_attention(self) -> None:
        """Refuses layers that do not attend to everything."""
        kinds = self.get("layer_types", None) or []
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise self.error("layer_types", "only 'full_attention' layers are supported")

    def hidden_act(self) -> str:
        """The activation of the MLP; only ``silu`` is known."""
        value = self.get("hidden_act", "silu")
        if value != "silu":
            raise self.error("hidden_act", f"must be 'silu', not {value!r}")
        return str(value)

    def rope_parameters(self) -> dict[str, Any]:
        """Rotary settings as transformers 5 names them; 4's two keys are read as well."""
        value = self._data.get("rope_parameters")
        if value is None:
            value = dict(self._data.get("rope_scaling") or {})
            value.setdefault("rope_type", value.pop("type", "default"))
            value["rope_theta"] = self.number("rope_theta", default=DEFAULT_ROPE_THETA)
        kind = value.get("rope_type", "default") if isinstance(value, dict) else None
        numbers = _ROPE_NUMBERS.get(kind) if isinstance(kind, str) else None
        if numbers is None:
            known = ", ".join(_ROPE_NUMBERS)
            raise self.error("rope_parameters", f"rope_type must be one of {known}, not {kind!r}")
        for name in ("rope_theta", *numbers):
            if not _is_positive(value.get(name)):
                message = f"{name} must be a number above 0, not {value.get(name)!r}"
                raise self.error("rope_parameters", message)
        return {"rope_type": kind, **value}

    def gemma4_activation(self) -> str:
        """Gemma 4's name for the activation of the MLP."""
        value = self.get("hidden_activation", "gelu_pytorch_tanh")
        if value != "gelu_pytorch_tanh":
            raise self.error("hidden_activation", f"must be 'gelu_pytorch_tanh', not {value!r}")
        return str(value)

    def final_logit_softcapping(self) -> float | None:
        """Gemma 4's bound on logits, ``None`` where there is none."""
        key = "final_logit_softcapping"
        return None if self.get(key, None) is None else self.number(key, default=1.0)

    def gemma4_rope_parameters(self) -> dict[str, Any]:
        """Rotary settings of Gemma 4's full-attention layers; it keeps them by kind of layer."""
        value = self.get("rope_parameters")
        if not isinstance(value, Mapping) or "full_attention" not in value:
            raise self.error("rope_parameters", "must have settings for 'full_attention'")
        nested = ConfigReader({"rope_parameters": value["full_attention"]}, self._file)
        return nested.rope_parameters()


def _is_positive(value: Any) -> bool:
    """Whether it is a number above 0, which what is no number (NaN) is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
