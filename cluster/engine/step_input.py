"""One pass through the target, as plain integers, so that every shard can rebuild it.

All requests' tokens lie flattened one behind the other; sequence ``b`` owns ``query_lens[b]`` of
them, which continue its cached tokens up to ``context_lens[b]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_HEADER = 4


@dataclass(frozen=True)
class StepInput:
    """Integers of one pass.

    Attributes:
        token_ids: ``[N]`` int64.
        positions: ``[N]`` int64, place of each token in its sequence.
        slots: ``[N]`` int64, page * page_size + offset where its keys and values go.
        query_lens: ``[B]`` int64, tokens of each sequence in this pass; they sum to N.
        context_lens: ``[B]`` int64, cached tokens after this pass, these included.
        block_tables: ``[B, P]`` int64 page numbers, padded with page 0.
        logit_rows: ``[R]`` int64, tokens whose logits are wanted, ascending.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    query_lens: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray
    logit_rows: np.ndarray

    @classmethod
    def idle(cls, num_tokens: int) -> StepInput:
        """A pass of tokens that are nobody's: one sequence, everything on page 0."""
        zeros = np.zeros(num_tokens, dtype=np.int64)
        return cls(
            token_ids=zeros,
            positions=zeros,
            slots=zeros,
            query_lens=zeros[:1] + num_tokens,
            context_lens=zeros[:1] + 1,
            block_tables=zeros[:1].reshape(1, 1),
            logit_rows=zeros[:0],
        )

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.token_ids)

    @property
    def num_context_tokens(self) -> int:
        """Cached tokens before this pass, summed over its sequences."""
        return int((self.context_lens - self.query_lens).sum())

    def pack(self) -> np.ndarray:
        """All fields in one int64 array, for the wire between shards."""
        num_sequences, num_pages = self.block_tables.shape
        header = [self.num_tokens, num_sequences, num_pages, len(self.logit_rows)]
        parts = (
            np.asarray(header, dtype=np.int64),
            self.token_ids,
            self.positions,
            self.slots,
            self.query_lens,
            self.context_lens,
            self.block_tables.reshape(-1),
            self.logit_rows,
        )
        return np.concatenate(parts)

    @classmethod
    def unpack(cls, packed: np.ndarray) -> StepInput:
        """The inverse of ``pack`` (views, nothing copied)."""
        tokens, sequences, pages, rows = (int(value) for value in packed[:_HEADER])
        sizes = [tokens, tokens, tokens, sequences, sequences, sequences * pages, rows]
        bounds = _HEADER + np.cumsum([0, *sizes])
        token_ids, positions, slots, query_lens, context_lens, tables, logit_rows = (
            packed[start:end] for start, end in pairwise(bounds)
        )
        return cls(
            token_ids,
            positions,
            slots,
            query_lens,
            context_lens,
            tables.reshape(sequences, pages),
            logit_rows,
        )

    def split_tokens(self) -> list[StepInput]:
        """The same pass as one pass per token, in order (deterministic mode).

        Each part has one sequence with one token; its context is what is cached at that moment.
        """
        owner = np.repeat(np.arange(len(self.query_lens)), self.query_lens)
        wanted = set(self.logit_rows.tolist())
        parts = []
        for index in range(self.num_tokens):
            one = slice(index, index + 1)
            rows = [0] if index in wanted else []
            parts.append(
                StepInput(
                    token_ids=self.token_ids[one],
                    positions=self.positions[one],
                    slots=self.slots[one],
                    query_lens=np.ones(1, dtype=np.int64),
                    context_lens=self.positions[one] + 1,
                    block_tables=self.block_tables[owner[one]],
                    logit_rows=np.asarray(rows, dtype=np.int64),
                )
            )
        return parts
