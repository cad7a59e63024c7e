"""A tokenizer's tokens as bytes."""

from __future__ import annotations

import threading
from collections.abc import Collection

from llguidance import LLTokenizer
from transformers import PreTrainedTokenizerFast


class Vocabulary:
    """llguidance's view of a tokenizer, made at its first use. Thread-safe.

    Args:
        tokenizer: the target's.
        vocab_size: V, of the logits; ids that the tokenizer does not know stand for themselves.
        eos_token_ids: tokens that end an output.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        vocab_size: int,
        eos_token_ids: Collection[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.eos_token_ids = sorted(eos_token_ids)
        self._made: LLTokenizer | None = None
        self._lock = threading.Lock()

    @property
    def tokens(self) -> LLTokenizer:
        """Takes about a second the first time, for a large vocabulary.

        Raises:
            ValueError: llguidance does not understand how the tokenizer decodes.
        """
        with self._lock:
            if self._made is None:
                backend = self._tokenizer.backend_tokenizer
                copy = type(backend).from_str(backend.to_str())
                copy.no_padding()
                copy.no_truncation()
                self._made = LLTokenizer(
                    copy.to_str(),
                    n_vocab=self._vocab_size,
                    eos_token=self.eos_token_ids or None,
                )
            return self._made

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for, which may be a part of a character."""
        try:
            return self.tokens.decode_bytes([token_id])
        except ValueError:
            return str(self._tokenizer.decode([token_id])).encode()
