"""Clients' prompts as token ids."""

from __future__ import annotations

import asyncio

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

# Longer texts take milliseconds and are encoded beside the event loop.
_MAX_INLINE_CHARS = 4096


class PromptEncoder:
    """Encodes text as the tokenizer does by default, special tokens included, never truncated.

    Works on a copy, so that nobody else's settings of the tokenizer (padding, truncation) matter,
    and encoding in a thread is safe.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    async def encode(self, text: str) -> tuple[int, ...]:
        """The text's token ids; empty for an empty text unless the tokenizer adds some."""
        if len(text) <= _MAX_INLINE_CHARS:
            return tuple(self._tokenizer.encode(text).ids)
        encoding = await asyncio.to_thread(self._tokenizer.encode, text)
        return tuple(encoding.ids)
