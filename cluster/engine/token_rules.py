"""Tokens that a request's output may be made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cluster.errors import InvalidRequestError
from cluster.request import SamplingParams


class TokenRules:
    """What ``allowed_token_ids`` and ``bad_words`` leave. Has no state.

    Where they leave nothing at a position (a grammar may want just what they take away), words are
    let through, and if that is not enough, all tokens.

    Args:
        allowed_token_ids: the only tokens there are; empty: all.
        banned: sequences of tokens, none of them empty, that the output must not hold.
    """

    def __init__(self, allowed_token_ids: Sequence[int], banned: Sequence[tuple[int, ...]]) -> None:
        self._allowed = torch.tensor(sorted(set(allowed_token_ids)), dtype=torch.int64)
        self._banned = tuple(banned)
        self._num_before = max(map(len, banned), default=1) - 1  # tokens that a last one depends on

    @classmethod
    def of(cls, sampling: SamplingParams, tokenizer: Any) -> TokenRules | None:
        """Of a request, if it has any.

        A word is banned as the tokenizer writes it, at the beginning of a text and behind a space.

        Raises:
            InvalidRequestError: there are words and no tokenizer.
        """
        if not sampling.allowed_token_ids and not sampling.bad_words:
            return None
        if sampling.bad_words and tokenizer is None:
            raise InvalidRequestError("sampling.bad_words", "this engine has no tokenizer")
        banned = set()
        for word in sampling.bad_words:
            for text in {word, word if word[0].isspace() else f" {word}"}:
                encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
                banned.add(tuple(encoding.ids))
        return cls(sampling.allowed_token_ids, sorted(banned - {()}))

    def narrow(
        self, allowed: torch.Tensor, output_token_ids: Sequence[int], draft_token_ids: Sequence[int]
    ) -> None:
        """Takes tokens away at each position of a drafted block, as if the guesses before it stood.

        Args:
            allowed: ``[P, V]`` bool, changed; row k is behind the first k guesses. Rows beyond the
                guesses are as the last.
            output_token_ids: committed.
            draft_token_ids: fewer than P.
        """
        if len(self._allowed):
            kept = torch.zeros_like(allowed)
            kept[:, self._allowed] = True
            _narrow(allowed, kept)
        if self._banned:
            kept = torch.ones_like(allowed)
            for row in range(len(allowed)):
                kept[row, self._last_tokens(output_token_ids, draft_token_ids[:row])] = False
            _narrow(allowed, kept)

    def _last_tokens(self, output: Sequence[int], guesses: Sequence[int]) -> list[int]:
        """Tokens that would complete something banned behind ``output`` and ``guesses``."""
        context = (*output[max(len(output) - self._num_before, 0) :], *guesses)
        return [
            banned[-1]
            for banned in self._banned
            if len(banned) - 1 <= len(context)
            and context[len(context) - len(banned) + 1 :] == banned[:-1]
        ]


def _narrow(allowed: torch.Tensor, kept: torch.Tensor) -> None:
    kept &= allowed
    kept[~kept.any(dim=1)] = True
    allowed &= kept
