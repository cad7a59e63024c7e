"""What passes of a simulated replica bring."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(slots=True)
class Outcome:
    """Of a pass, or of several that do not differ.

    Attributes:
        gained: tokens of each row.
        num_guesses: that are verified in each pass.
        expected: how many of these should be accepted.
        tokens: ``[rounds, rows]`` of ``gained``; unset: one each.
    """

    num_rounds: int
    gained: list[int]
    num_guesses: int = 0
    expected: float = 0.0
    tokens: Integers | None = None

    @classmethod
    def plain(cls, num_rounds: int, num_rows: int) -> Outcome:
        """Of passes without guesses."""
        return cls(num_rounds, [num_rounds] * num_rows)

    @classmethod
    def guessed(cls, tokens: Integers, num_guesses: int, expected: float) -> Outcome:
        """Of passes with guesses."""
        return cls(len(tokens), tokens.sum(axis=0).tolist(), num_guesses, expected, tokens)

    def first(self, num_rounds: int) -> Outcome:
        """Of the first passes alone."""
        if self.tokens is None:
            return Outcome.plain(num_rounds, len(self.gained))
        return Outcome.guessed(self.tokens[:num_rounds], self.num_guesses, self.expected)

    def among(self, rows: list[int], num_rows: int) -> Outcome:
        """With its rows in these places of so many, of which the others gain a token a pass."""
        tokens = np.ones((self.num_rounds, num_rows), dtype=np.int64)
        if self.tokens is not None:
            tokens[:, rows] = self.tokens
        return Outcome.guessed(tokens, self.num_guesses, self.expected)
