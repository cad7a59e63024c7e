"""Token sequences to learn from, in an order that depends on nothing but a seed and the step."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from cluster.training.corpus import TokenStream
from cluster.training.parallel import Worker


@dataclass(frozen=True)
class Batch:
    """Sequences of one step.

    Attributes:
        token_ids: int64 ``[B, L]``, padded at the end with 0.
        answers: bool ``[B, L]``, the tokens that are learned; ``None``: all of them.
        sequence_ids: of each row, as in the data set's ``sequence``.
        num_parts: into how many pieces each sequence was cut.
        anchors: int64 ``[B, A]``, positions whose blocks are drafted, for methods with blocks.
        counted: bool ``[B, A, block_size]``, the guesses that are learned; ``None``: all.
    """

    token_ids: torch.Tensor
    answers: torch.Tensor | None
    sequence_ids: tuple[int, ...]
    num_parts: int = 1
    anchors: torch.Tensor | None = None
    counted: torch.Tensor | None = None

    def halve(self) -> Batch:
        """Each sequence as two of half the length; for documents."""
        return replace(
            self,
            token_ids=self.token_ids.reshape(2 * len(self.token_ids), -1),
            num_parts=2 * self.num_parts,
        )

    def share(self, worker: Worker) -> Batch:
        """The worker's own rows, on its device."""

        def cut(rows: torch.Tensor | None) -> torch.Tensor | None:
            return None if rows is None else worker.share(rows).to(worker.device)

        return replace(
            self,
            token_ids=worker.share(self.token_ids).to(worker.device),
            answers=cut(self.answers),
            sequence_ids=self.sequence_ids[worker.rank :: worker.count],
            anchors=cut(self.anchors),
            counted=cut(self.counted),
        )


class Dataset(Protocol):
    """Numbered sequences, and the order in which training sees them.

    Guarantees: ``batch`` depends on its arguments and the data set's seed alone, so that a
    resumed run goes on with the data that it would have seen; an epoch sees each sequence once.
    """

    @property
    def num_sequences(self) -> int:
        """Sequences of one epoch."""

    def sequence(self, index: int) -> Batch:
        """Sequence ``index`` alone, in the order of the data."""

    def batch(self, step: int, size: int) -> Batch:
        """The ``size`` sequences of training step ``step``."""


class StreamSequences:
    """Windows of a stream of documents (see ``Dataset``); every token is learned.

    Every epoch cuts the documents elsewhere, so that only ``sequence`` has lasting numbers.
    """

    def __init__(self, stream: TokenStream) -> None:
        self._stream = stream

    @property
    def num_sequences(self) -> int:
        return self._stream.windows_per_epoch

    def sequence(self, index: int) -> Batch:
        return Batch(self._stream.window(index)[None], None, (index,))

    def batch(self, step: int, size: int) -> Batch:
        return Batch(self._stream.batch(step, size), None, tuple(range(size)))


@dataclass(frozen=True)
class Sequence:
    """Token ids of one sequence, of which those from ``answer_start`` on are learned.

    ``token_ids`` are 32-bit (typecode ``i``), since all of a data set's are in memory.
    ``answer_start`` 0 stands for a document: all of it.
    """

    token_ids: array[int]
    answer_start: int = 0


class FixedSequences:
    """The same sequences every epoch (see ``Dataset``); the first epoch has them as given."""

    def __init__(self, sequences: list[Sequence], seed: int) -> None:
        self._sequences = sequences
        self._seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def sequence(self, index: int) -> Batch:
        return self._collate([index])

    def batch(self, step: int, size: int) -> Batch:
        return self._collate([self._number(step * size + row) for row in range(size)])

    def _number(self, index: int) -> int:
        epoch, offset = divmod(index, len(self._sequences))
        if epoch != self._epoch:
            self._order = np.arange(len(self._sequences))
            if epoch > 0:
                np.random.default_rng((self._seed, epoch)).shuffle(self._order)
            self._epoch = epoch
        return int(self._order[offset])

    def _collate(self, indices: list[int]) -> Batch:
        chosen = [self._sequences[index] for index in indices]
        width = max(len(sequence.token_ids) for sequence in chosen)
        token_ids = torch.zeros(len(chosen), width, dtype=torch.int64)
        answers = torch.zeros(len(chosen), width, dtype=torch.bool)
        for row, sequence in enumerate(chosen):
            length = len(sequence.token_ids)
            token_ids[row, :length] = torch.from_numpy(np.asarray(sequence.token_ids))
            answers[row, sequence.answer_start : length] = True
        return Batch(token_ids, None if answers.all() else answers, tuple(indices))
