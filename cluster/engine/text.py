"""Turning output tokens into text one by one, and finding stop strings in it.

The engine and the router run the same class over the same tokens, so the token that ends an output
for the engine is the token at which the router's text ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from cluster.request import SamplingParams

_REPLACEMENT = "\ufffd"
# More tokens without one place between two characters are stray bytes.
_MAX_WINDOW = 64


class TextDelta(NamedTuple):
    """What one token added: text that is final, and whether a stop string was completed."""

    text: str
    stopped: bool


class TextStream:
    """The text of one output, token by token.

    Guarantees: the texts of all ``push`` calls and of ``finish``, joined, are the tokenizer's
    decoding of the pushed tokens, cut at the first stop string. No call returns a part of
    a character, or text that might still turn out to be the beginning of a stop string. The result
    depends on nothing but the tokens and their order, so a stream that is fed the tokens of a
    broken one goes on exactly where that one stood. A call costs the same however long the output.

    Bytes of no character come out as replacement characters, with the next character or in runs of
    at most 64 tokens.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        stop: strings that end the text.
        skip_special_tokens: leave special tokens, as end-of-sequence, out of the text.
        include_stop: end the text behind the stop string instead of in front of it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._max_held = max(map(len, self._stop), default=1) - 1
        # Decoders look at neighbours (a first token loses its space, bytes join to characters), so
        # tokens are decoded behind some that are out already: `_context` of the window's tokens.
        # `_num_chars` of the window's text have been taken.
        self._window: list[int] = []
        self._context = 0
        self._num_chars = 0
        self._held = ""
        self._stopped = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, sampling: SamplingParams) -> TextStream:
        """As a request asks for it."""
        return cls(
            tokenizer,
            sampling.stop,
            sampling.skip_special_tokens,
            sampling.include_stop_str_in_output,
        )

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._stopped

    def push(self, token_id: int) -> TextDelta:
        """Adds a token.

        Returns:
            The text that became final with it, and whether it completed a stop string; behind
            that, tokens add no text.
        """
        if self._stopped:
            return TextDelta("", True)
        text = self._held + self._decode(token_id)
        if not self._stop:
            return TextDelta(text, False)
        return self._cut(text)

    def finish(self) -> str:
        """Returns what was held back. Nothing may be pushed behind it."""
        if self._stopped:
            return ""
        text = self._held + self._window_text()[self._num_chars :]
        self._held = ""
        self._window = []
        self._num_chars = 0
        return text

    def _decode(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._window_text()
        if text.endswith(_REPLACEMENT) and len(self._window) <= _MAX_WINDOW:
            return ""  # The bytes so far may be the beginning of a character.
        new = text[self._num_chars :]
        if new:
            # Between two characters: the tokens since the last such place become the context.
            del self._window[: self._context]
            self._context = len(self._window)
            self._num_chars = len(self._window_text())
        elif len(self._window) > _MAX_WINDOW:
            self._window.clear()
            self._context = 0
            self._num_chars = 0
        return new

    def _window_text(self) -> str:
        return self._backend.decode(self._window, skip_special_tokens=self._skip_special_tokens)

    def _cut(self, text: str) -> TextDelta:
        found = [(at, at + len(stop)) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self._stopped = True
            self._held = ""
            start, end = min(found)
            return TextDelta(text[: end if self._include_stop else start], True)
        for start in range(max(len(text) - self._max_held, 0), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stop):
                self._held = text[start:]
                return TextDelta(text[:start], False)
        self._held = ""
        return TextDelta(text, False)
