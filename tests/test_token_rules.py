"""Which tokens ``allowed_token_ids`` and ``bad_words`` leave at each position of a block."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.engine.token_rules import TokenRules
from cluster.errors import InvalidRequestError
from cluster.request import SamplingParams

VOCAB_SIZE = 5
TOKENS = st.integers(0, VOCAB_SIZE - 1)


@given(
    allowed=st.lists(TOKENS, max_size=3),
    banned=st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=4),
    output=st.lists(TOKENS, max_size=5),
    guesses=st.lists(TOKENS, max_size=4),
)
def test_a_block_s_positions_are_as_if_the_guesses_before_them_stood(
    allowed: list[int], banned: list[tuple[int, ...]], output: list[int], guesses: list[int]
) -> None:
    rules = TokenRules(allowed, banned)
    mask = torch.ones((len(guesses) + 1, VOCAB_SIZE), dtype=torch.bool)
    rules.narrow(mask, output, guesses)
    for position in range(len(guesses) + 1):
        text = [*output, *guesses[:position]]
        plain = [t for t in range(VOCAB_SIZE) if not allowed or t in allowed]
        wanted = [
            token
            for token in plain
            if not any(tuple([*text, token][-len(words) :]) == words for words in banned)
        ]
        assert mask[position].nonzero().flatten().tolist() == (wanted or plain)


def test_what_a_grammar_wants_is_let_through() -> None:
    mask = torch.tensor([[True, False, False], [False, True, True]])
    TokenRules([2], [(2,)]).narrow(mask, [], [0])
    # Row 0 wants what is not allowed; row 1 what is allowed and banned.
    assert mask.tolist() == [[True, False, False], [False, False, True]]


def test_a_word_is_banned_at_the_beginning_and_behind_a_space() -> None:
    def encode(text: str, add_special_tokens: bool) -> SimpleNamespace:
        assert not add_special_tokens
        return SimpleNamespace(ids=[{"a": 0, " a": 1, "\na": 2}[text]])

    tokenizer = SimpleNamespace(backend_tokenizer=SimpleNamespace(encode=encode))
    rules = TokenRules.of(SamplingParams(bad_words=("a", "\na")), tokenizer)
    assert rules is not None
    mask = torch.ones((1, 4), dtype=torch.bool)
    rules.narrow(mask, [], [])
    assert mask.tolist() == [[False, False, False, True]]
    with pytest.raises(InvalidRequestError):
        TokenRules.of(SamplingParams(bad_words=("a",)), None)
    assert TokenRules.of(SamplingParams(), None) is None
