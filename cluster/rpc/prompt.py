"""Clients' prompts as token ids, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from cluster.chat.text import check_text
from cluster.errors import InvalidRequestError

# Longer texts take milliseconds and are encoded beside the event loop.
_MAX_INLINE_CHARS = 4096


class PromptEncoder:
    """Encodes text as the tokenizer does by default, special tokens included, never truncated.

    Works on a copy, so that nobody else's settings of the tokenizer (padding, truncation) matter,
    and encoding in a thread is safe. A text that cannot fit the context is refused unread, and no
    other one holds up the event loop.

    Args:
        tokenizer: the target's.
        max_model_len: the context, in tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_model_len: int) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._max_model_len = max_model_len
        self._max_chars = max_model_len * max(map(len, self._tokenizer.get_vocab()))

    async def encode(
        self, text: str, *, add_special_tokens: bool = True, field: str = "prompt"
    ) -> tuple[int, ...]:
        """The text's token ids; empty for an empty text unless the tokenizer adds some.

        Args:
            add_special_tokens: those that the tokenizer puts around a text; a chat template has
                written them itself.
            field: where the text is from, for errors.

        Raises:
            InvalidRequestError: naming ``field``: even in the longest tokens there are, the text
                exceeds the context; or it is none, since it holds a lone surrogate.
        """
        if len(text) > max(self._max_chars, _MAX_INLINE_CHARS):
            raise InvalidRequestError(
                field,
                f"has {len(text)} characters, more than the model's context of "
                f"{self._max_model_len} tokens can hold",
            )
        check_text(text, field)
        if len(text) <= _MAX_INLINE_CHARS:
            return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        # Unlike ``encode``, ``encode_batch`` lets other threads of Python run meanwhile.
        encodings = await asyncio.to_thread(
            self._tokenizer.encode_batch, [text], add_special_tokens=add_special_tokens
        )
        return tuple(encodings[0].ids)

    def strings(self, token_ids: Sequence[int]) -> list[str]:
        """How the tokenizer writes each of its own tokens."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    def decode(self, token_ids: Sequence[int], *, field: str) -> str:
        """The tokens' text, special ones included.

        Raises:
            InvalidRequestError: naming ``field``, for an id that is none of a token.
        """
        size = self._tokenizer.get_vocab_size()
        for token_id in token_ids:
            if not 0 <= token_id < size:
                raise InvalidRequestError(
                    field, f"token id {token_id} is outside the vocabulary of {size}"
                )
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
