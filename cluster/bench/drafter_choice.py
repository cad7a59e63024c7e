"""Which drafters a command is to measure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from cluster.config import DraftMethodName
from cluster.errors import ConfigError

METHODS: tuple[str, ...] = get_args(DraftMethodName)
_UNBOUNDED_METHODS = ("eagle3", "draft_model", "ngram")


@dataclass(frozen=True)
class DrafterChoice:
    """A drafter to measure; ``name`` is what figures call it, ``model`` is unset for n-gram."""

    name: str
    method: str
    model: str | None

    @classmethod
    def parse(cls, text: str) -> DrafterChoice:
        """Reads ``METHOD=DIR``, ``NAME=METHOD:DIR``, or ``ngram`` (also ``NAME=ngram``).

        Raises:
            ConfigError: it is none of these, or the method is not known.
        """
        left, separator, right = text.partition("=")
        first, colon, rest = right.partition(":")
        if separator and (left not in METHODS or (colon and first in METHODS)):
            name, method, model = left, first, rest
        else:
            name, method, model = "", left, right
        if method not in METHODS:
            raise ConfigError(
                "--drafter",
                f"{text!r} is not METHOD=DIR or NAME=METHOD:DIR with one of {', '.join(METHODS)}",
            )
        if bool(model) == (method == "ngram"):
            need = "has no folder" if method == "ngram" else "needs a folder"
            raise ConfigError("--drafter", f"{text!r}: method {method} {need}")
        return cls(name or (Path(model).name if model else method), method, model or None)

    def speculative(self, num_speculative_tokens: int, draft_top_k: int) -> dict[str, Any]:
        """The ``speculative`` section that serves whole blocks of it.

        Args:
            num_speculative_tokens: for methods without a block of their own.
            draft_top_k: entries of a draft distribution.
        """
        section: dict[str, Any] = {
            "method": self.method,
            "scheduler": "full",
            "online_calibration": False,
            "draft_top_k": draft_top_k,
        }
        if self.model is not None:
            section["model"] = self.model
        if self.method in _UNBOUNDED_METHODS:
            section["num_speculative_tokens"] = num_speculative_tokens
        return section
