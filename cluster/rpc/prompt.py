"""Clients' prompts as token ids, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from cluster.chat.text import check_text
from cluster.errors import ContextLengthError, InvalidRequestError

# Longer texts take milliseconds and are encoded beside the event loop.
_MAX_INLINE_CHARS = 4096


def kept_tokens(asked: int | None, *, max_tokens: int, max_model_len: int) -> int | None:
    """How many of a prompt's last tokens are kept; ``None``: all.

    Args:
        asked: so many, at most the context; -1: as many as leave room for ``max_tokens`` of
            output, or for one where those fill the context.

    Raises:
        InvalidRequestError: it is neither.
    """
    if asked is None or 0 < asked <= max_model_len:
        return asked
    if asked != -1:
        raise InvalidRequestError(
            "truncate_prompt_tokens",
            f"must be -1, or 1 to the model's context of {max_model_len} tokens",
        )
    room = max_model_len - max_tokens
    return room if room > 0 else max_model_len - 1


class PromptEncoder:
    """Encodes text as the tokenizer does by default, special tokens included.

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
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        field: str = "prompt",
    ) -> tuple[int, ...]:
        """The text's token ids; empty for an empty text unless the tokenizer adds some.

        Args:
            add_special_tokens: those that the tokenizer puts around a text; a chat template has
                written them itself.
            max_tokens: the last ones that are kept, special ones around them included; of a text
                that exceeds the context in the longest tokens too, only the end is read then.
            field: where the text is from, for errors.

        Raises:
            InvalidRequestError: naming ``field``: even in the longest tokens there are, the text
                exceeds the context; or it is none, since it holds a lone surrogate.
        """
        max_chars = max(self._max_chars, _MAX_INLINE_CHARS)
        if max_tokens is not None:
            text = text[-max_chars:]
        if len(text) > max_chars:
            raise ContextLengthError(
                field,
                f"this model's maximum context length is {self._max_model_len} tokens, which "
                f"{len(text)} characters exceed",
            )
        check_text(text, field)
        if len(text) <= _MAX_INLINE_CHARS:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        else:
            # Unlike ``encode``, ``encode_batch`` lets other threads of Python run meanwhile.
            encodings = await asyncio.to_thread(
                self._tokenizer.encode_batch, [text], add_special_tokens=False
            )
            encoding = encodings[0]
        if max_tokens is not None:
            num_added = (
                self._tokenizer.num_special_tokens_to_add(False) if add_special_tokens else 0
            )
            encoding.truncate(max(max_tokens - num_added, 0), direction="left")
        if add_special_tokens:
            encoding = self._tokenizer.post_process(encoding)
        return tuple(encoding.ids)

    async def tokens(
        self,
        prompt: str | Sequence[int],
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
    ) -> tuple[int, ...]:
        """Of a text, by ``encode``, or of tokens: all, or the last ``max_tokens``."""
        if isinstance(prompt, str):
            return await self.encode(
                prompt, add_special_tokens=add_special_tokens, max_tokens=max_tokens
            )
        return tuple(prompt if max_tokens is None else prompt[-max_tokens:])

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
