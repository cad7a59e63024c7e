"""Grammars that an output must follow: compiled once, then one matcher for each request.

The work is llguidance's (guidance-ai, MIT): it walks a grammar and a tokenizer's vocabulary
together and says which tokens may come next.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits

from cluster.engine.vocabulary import Vocabulary
from cluster.errors import InvalidRequestError
from cluster.grammar import Grammar, GrammarKind
from cluster.request import Request

_FIELD = "sampling.grammar"
_MAX_KEPT = 64
_MAX_MESSAGE_CHARS = 300
_WORD_BITS = 32
# What is not enforced must not be accepted. And without a bound on white space, a model that likes
# it could go on with it for ever.
JSON_OPTIONS: Any = {"lenient": False, "whitespace_pattern": r"[ \t\n\r]{0,16}"}
# For schemas that need not hold as a whole: what cannot be enforced is left out of them.
LENIENT_JSON_OPTIONS: Any = {**JSON_OPTIONS, "lenient": True, "coerce_one_of": True}


class GrammarMatcher:
    """Where one output stands in its grammar. Belongs to one thread at a time.

    Guarantees: ``fill_masks`` leaves it as it was; after ``accept`` of an output's tokens it is
    in the same state however those tokens came about. Behind an end-of-sequence token, where an
    output that ignores it goes on, anything may come.

    Args:
        matcher: at the grammar's beginning.
        eos_token_ids: tokens that end an output.
    """

    def __init__(self, matcher: LLMatcher, eos_token_ids: Collection[int]) -> None:
        self._matcher = matcher
        self._eos_token_ids = eos_token_ids
        self._is_over = False

    @property
    def error(self) -> str | None:
        """Why it can say nothing any more: a limit was reached, or a token did not fit."""
        return _one_line(self._matcher.get_error()) if self._matcher.is_error() else None

    def accept(self, token_ids: Sequence[int]) -> bool:
        """Commits output tokens; returns whether they follow the grammar."""
        for token_id in token_ids:
            if self._is_over:
                break
            if not self._matcher.consume_token(token_id):
                return False
            self._is_over = token_id in self._eos_token_ids and self._matcher.is_stopped()
        return True

    def fill_masks(
        self, draft_token_ids: Sequence[int], masks: torch.Tensor, executor: LLExecutor
    ) -> None:
        """Writes which tokens may follow at each position of a drafted block.

        Args:
            draft_token_ids: k of them; position j is behind the first j.
            masks: ``[k+1, ceil(V/32)]`` int32 on the CPU, contiguous: bit i of word w is token
                32w+i. Rows behind a token that cannot be accepted, and behind the end, stay as
                they were.
        """
        if self._is_over:
            return
        row_bytes = masks.shape[1] * masks.element_size()
        if not draft_token_ids:
            self._matcher.unsafe_compute_mask_ptr(masks.data_ptr(), row_bytes)
            return
        executor.unsafe_compute_mask_ptr_with_draft_token(
            [(self._matcher, 0, list(draft_token_ids))], masks.data_ptr(), row_bytes, masks.shape[0]
        )


class GrammarCompiler:
    """Compiles clients' grammars for one tokenizer. Thread-safe, and not for an event loop.

    Guarantees: work and memory of a grammar are bounded by llguidance's limits, when compiled as
    well as at each token. What was compiled lately is kept.

    Args:
        vocabulary: the target's; ``None`` refuses every grammar.
        has_end: whether the target has a token that ends an output.
    """

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int, eos_token_ids: Collection[int]) -> GrammarCompiler:
        """For an engine's tokenizer, which may be ``None``."""
        vocabulary = tokenizer and Vocabulary(tokenizer, vocab_size, eos_token_ids)
        return cls(vocabulary, has_end=bool(eos_token_ids))

    def __init__(self, vocabulary: Vocabulary | None, *, has_end: bool) -> None:
        self._vocabulary = vocabulary
        self._has_end = has_end
        self._kept: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, request: Request) -> GrammarMatcher | None:
        """``compile`` of the request's grammar, if it has one. Raises: InvalidRequestError."""
        grammar = request.sampling.grammar
        return None if grammar is None else self.compile(grammar)

    def compile(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the grammar's beginning.

        Raises:
            InvalidRequestError: the grammar is broken, asks for something that is not enforced, or
                is too large; or the model has no tokenizer, or no token that ends an output.
        """
        if self._vocabulary is None:
            raise InvalidRequestError(_FIELD, "this engine has no tokenizer")
        if not self._has_end:
            raise InvalidRequestError(_FIELD, "the model has no end-of-sequence token")
        with self._lock:
            kept = self._kept.get(grammar) or _compile(self._vocabulary, grammar)
            self._kept[grammar] = kept
            self._kept.move_to_end(grammar)
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
            return GrammarMatcher(kept.deep_copy(), self._vocabulary.eos_token_ids)


class GrammarMasks:
    """Allowed tokens of a batch's constrained rows; one for each engine.

    Args:
        num_threads: for the masks of one pass.
    """

    def __init__(self, num_threads: int) -> None:
        self._executor = LLExecutor(num_threads)

    def of(
        self,
        members: Sequence[tuple[GrammarMatcher, Sequence[int]]],
        *,
        num_positions: int,
        vocab_size: int,
    ) -> torch.Tensor:
        """Which tokens may come at each position of each member's block.

        Args:
            members: matchers with their draft tokens, fewer than ``num_positions``.

        Returns:
            ``[len(members) * num_positions, vocab_size]`` bool on the CPU. Positions that cannot be
            reached, and those of a matcher with an ``error``, allow everything.
        """
        num_words = -(-vocab_size // _WORD_BITS)
        shape = (len(members), num_positions, num_words)
        words = torch.full(shape, -1, dtype=torch.int32)
        for index, (matcher, draft_token_ids) in enumerate(members):
            if matcher.error is None:
                matcher.fill_masks(draft_token_ids, words[index], self._executor)
            if matcher.error is not None:
                words[index] = -1
        bits = words.view(-1, num_words, 1) >> torch.arange(_WORD_BITS, dtype=torch.int32)
        return (bits & 1).bool().flatten(1)[:, :vocab_size]


def _compile(vocabulary: Vocabulary, grammar: Grammar) -> LLMatcher:
    """Lets other threads run. Raises: InvalidRequestError."""
    limits = LLParserLimits(verbose_errors=False)
    try:
        tokens = vocabulary.tokens
    except ValueError as error:
        message = f"the model's tokenizer cannot be used with grammars: {_one_line(str(error))}"
        raise InvalidRequestError(_FIELD, message) from None
    matcher = LLMatcher(tokens, _source(grammar), log_level=0, limits=limits)
    if matcher.is_error():
        raise InvalidRequestError(_FIELD, _one_line(matcher.get_error()))
    return matcher


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form. Raises: InvalidRequestError."""
    if grammar.kind is GrammarKind.REGEX:
        return LLMatcher.grammar_from_regex(grammar.source)
    if grammar.kind is GrammarKind.LARK:
        return LLMatcher.grammar_from_lark(grammar.source)
    try:
        if not isinstance(json.loads(grammar.source), dict):
            raise InvalidRequestError(_FIELD, "the schema must be an object")
        return LLMatcher.grammar_from_json_schema(grammar.source, overrides=JSON_OPTIONS)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(_FIELD, _one_line(f"the schema is not JSON: {error}")) from None


def nested(grammar: Grammar) -> str:
    """The grammar as a part of a rule of another one in Lark. Raises: InvalidRequestError."""
    source = _source(grammar)
    if grammar.kind is GrammarKind.LARK:
        return f"%lark {{\n{source}\n}}"
    (inner,) = json.loads(source)["grammars"]
    if grammar.kind is GrammarKind.REGEX:
        return f"%lark {{\n{inner['lark_grammar']}\n}}"
    return f"%json {json.dumps(inner['json_schema'])}"


def _one_line(message: str) -> str:
    """What went wrong; llguidance underlines it in the grammar, over several lines."""
    return " ".join(message.split())[:_MAX_MESSAGE_CHARS]
