"""Log-probabilities in the two shapes that OpenAI gives them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from cluster.engine.vocabulary import Vocabulary
from cluster.request import PositionLogprobs, TokenLogprob

_LOWEST = -9999.0  # of a token without any chance: JSON has no infinity


class TokenTexts:
    """How single tokens are written: as text where they are text, else by their bytes.

    Args:
        as_ids: they are written as ``token_id:ID`` instead.
    """

    def __init__(self, vocabulary: Vocabulary, *, as_ids: bool = False) -> None:
        self._vocabulary = vocabulary
        self._as_ids = as_ids

    def text_and_bytes(self, token_id: int) -> tuple[str, list[int]]:
        """How the token is written, and its bytes."""
        data = self._vocabulary.token_bytes(token_id)
        return f"token_id:{token_id}" if self._as_ids else _decoded(data), list(data)

    def text(self, token_id: int) -> str:
        """How the token is written."""
        return self.text_and_bytes(token_id)[0]

    def decoded(self, token_id: int) -> str:
        """The token's text, also where tokens are written as ids."""
        return _decoded(self._vocabulary.token_bytes(token_id))


def completion_logprobs(
    positions: Sequence[PositionLogprobs],
    text_lengths: Sequence[int],
    first_offset: int,
    texts: TokenTexts,
) -> dict[str, list[Any]]:
    """The shape of ``/v1/completions``.

    Args:
        positions: one per token.
        text_lengths: characters of the text that each token made final.
        first_offset: where the first token's text begins in the choice's text.
    """
    offsets = list(accumulate(text_lengths, initial=first_offset))[: len(positions)]
    return {
        "tokens": [texts.text(position.chosen.token_id) for position in positions],
        "token_logprobs": [_finite(position.chosen.logprob) for position in positions],
        "top_logprobs": [
            {
                texts.text(entry.token_id): _finite(entry.logprob)
                for entry in (*position.top, position.chosen)
            }
            for position in positions
        ],
        "text_offset": offsets,
    }


def echoed_logprobs(
    prompt: Sequence[int],
    positions: Sequence[PositionLogprobs],
    text_lengths: Sequence[int],
    num_top: int,
    texts: TokenTexts,
) -> dict[str, list[Any]]:
    """The same shape for a prompt, of whose first token nothing is known.

    Args:
        positions: of the prompt's other tokens.
        text_lengths: characters that each of the prompt's tokens made final.
        num_top: of the best ones that were asked for; there may be more.
    """
    kept = [PositionLogprobs(position.chosen, position.top[:num_top]) for position in positions]
    shaped = completion_logprobs(kept, text_lengths[1:], text_lengths[0], texts)
    first = {"tokens": texts.text(prompt[0]), "text_offset": 0}
    return {name: [first.get(name), *values] for name, values in shaped.items()}


def prompt_logprobs(
    positions: Sequence[PositionLogprobs], num_top: int, texts: TokenTexts
) -> list[dict[str, Any] | None]:
    """vLLM's shape for a prompt: by token id; of the first token nothing is known.

    A rank is known of the best ``num_top`` alone.
    """

    def entry(token: TokenLogprob, rank: int | None) -> dict[str, Any]:
        text = texts.decoded(token.token_id)
        return {"logprob": _finite(token.logprob), "rank": rank, "decoded_token": text}

    shaped: list[dict[str, Any] | None] = [None]
    for position in positions:
        entries = {str(position.chosen.token_id): entry(position.chosen, None)}
        for rank, token in enumerate(position.top[:num_top], 1):
            entries[str(token.token_id)] = entry(token, rank)
        shaped.append(entries)
    return shaped


def chat_logprobs(positions: Sequence[PositionLogprobs], texts: TokenTexts) -> dict[str, Any]:
    """The shape of ``/v1/chat/completions``."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text, data = texts.text_and_bytes(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": data}

    content = [
        {
            **entry(position.chosen.token_id, position.chosen.logprob),
            "top_logprobs": [entry(top.token_id, top.logprob) for top in position.top],
        }
        for position in positions
    ]
    return {"content": content, "refusal": None}


def _decoded(data: bytes) -> str:
    """A token's text; a part of a character is ``bytes:\\xe4\\xbd``."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
