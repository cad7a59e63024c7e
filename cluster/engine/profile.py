"""Measures what the target's steps cost, over batch tokens and context, as they are when serving.

A measured step is a whole one: flattening, the pass through all shards, verifying and sampling. It
consists of sequences that decode with blocks of guesses and, where the batch is larger than all
blocks, of a prompt chunk; their pages are spread over the cache as those of requests that grow
side by side.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from itertools import islice

import numpy as np

from cluster.config import TargetConfig
from cluster.engine.pace import TargetPace
from cluster.engine.pages import PagePool
from cluster.engine.runner import Runner
from cluster.engine.sampler import Sampler
from cluster.engine.scheduler import ScheduledSequence, flatten
from cluster.engine.sequence import Sequence
from cluster.request import Request, SamplingParams
from cluster.speculation.verify_curve import CurveOrigin, VerifyCurve

# A decoding sequence of a measured step: its own token and seven guesses.
BLOCK_TOKENS = 8
_MAX_DETERMINISTIC_TOKENS = 16  # one pass a token: the curve is a straight line
# Of the largest context. Time grows with it, and faster where what is read outgrows caches.
_CONTEXT_SHARES = (1 / 16, 1 / 4, 1 / 2, 3 / 4, 1)
_QUICK_REPEATS = 2
_QUICK_S = 1.0
_VISITS = 2
_PASSES_PER_VISIT = 3  # the first of them wakes up caches and clocks


@dataclass(frozen=True)
class BatchShape:
    """Sequences of one step: new tokens and cached tokens of each."""

    query_lens: tuple[int, ...]
    cached_lens: tuple[int, ...]


class StepProbe:
    """Runs steps of a wanted size that nobody asked for.

    Guarantees: writes to free pages only, and gives them back before ``measure`` returns; reads the
    rest of a context from pages that nobody holds, which stay as they are, so that few cached
    prefixes are lost; one call of ``measure`` is one pass.

    Args:
        runner: the target's shards, with no pass under way.
        pages: the cache's pages.
        config: of the target.
        max_model_len: longest sequence.
    """

    def __init__(
        self, runner: Runner, pages: PagePool, config: TargetConfig, max_model_len: int
    ) -> None:
        self._runner = runner
        self._pages = pages
        self._config = config
        self._max_model_len = max_model_len
        # Streams of its own: measuring must not change what requests draw.
        self._sampler = Sampler(eos_token_ids=(), device=runner.shard.device, seed=0)
        self._random = np.random.default_rng(0)

    @property
    def execution(self) -> str:
        """How the target's shards run their layers."""
        return self._runner.shard.execution

    @property
    def pace(self) -> TargetPace | None:
        """What the target's passes keep to, if they are paced."""
        return self._runner.pace

    def token_sizes(self) -> list[int]:
        """Batch tokens worth measuring: powers of two and the largest step."""
        largest = self._config.max_num_batched_tokens
        if self._config.deterministic:
            largest = min(largest, _MAX_DETERMINISTIC_TOKENS)
        return sorted({*(2**k for k in range(largest.bit_length())), largest})

    def context_sizes(self) -> list[int]:
        """Context tokens worth measuring: none, and up to what fits the cache and the batch."""
        if self._config.deterministic:
            return [0]
        sequences = self._config.max_num_seqs
        free = (self._pages.num_pages - sequences) * self._pages.page_size
        largest = min(sequences * self._max_model_len, free) - sequences * BLOCK_TOKENS
        return sorted({0, *(int(share * max(largest, 0)) for share in _CONTEXT_SHARES)})

    def shape(self, num_tokens: int, context_tokens: int) -> BatchShape | None:
        """The batch that stands for a size: no more sequences than blocks and context need.

        Returns:
            ``None`` where no batch can be so.
        """
        limit = self._max_model_len
        num_blocks = -(-num_tokens // BLOCK_TOKENS)
        num_contexts = -(-context_tokens // max(limit - BLOCK_TOKENS, 1))
        size = min(max(num_blocks, num_contexts), num_tokens, self._config.max_num_seqs)
        lens = np.full(size, min(num_tokens // size, BLOCK_TOKENS))
        rest = num_tokens - int(lens.sum())
        if lens[0] < BLOCK_TOKENS:
            lens[:rest] += 1
        else:  # more than all blocks: what is left are prompts
            lens[::-1] += _filled(np.full(size, limit - BLOCK_TOKENS), rest)
        cached = np.minimum(limit - lens, context_tokens // size)
        cached += _filled(limit - lens - cached, context_tokens - int(cached.sum()))
        if lens.sum() != num_tokens or cached.sum() != context_tokens or (cached < 0).any():
            return None
        num_pages = sum(self._pages.pages_for(int(n)) for n in lens + cached)
        if num_pages > self._pages.num_pages:
            return None
        return BatchShape(tuple(lens.tolist()), tuple(cached.tolist()))

    def warm_up(self) -> None:
        """Runs the smallest and the largest step once: the first ones are slow on any device."""
        sizes = self.token_sizes()
        for size in (sizes[0], sizes[-1]):
            if (shape := self.shape(size, 0)) is not None:
                self.measure(shape)

    def measure(self, shape: BatchShape) -> float:
        """Seconds of one step.

        Raises:
            RuntimeError: requests hold the pages that it needs, or the shards are broken.
        """
        held: list[int] = []
        try:
            entries = self._entries(shape, held)
            for entry in entries:
                cached = entry.sequence.num_computed_tokens
                self._runner.shard.cache.pretend(entry.sequence.pages[0], cached)
            start = time.perf_counter()
            self._runner.launch(flatten(entries, self._pages.page_size))
            self._sampler.sample(self._runner.collect(), [e.sample_input for e in entries])
            return time.perf_counter() - start
        finally:
            self._pages.shrink(held, 0)

    def _entries(self, shape: BatchShape, held: list[int]) -> list[ScheduledSequence]:
        page_size = self._pages.page_size
        sizes = list(zip(shape.query_lens, shape.cached_lens, strict=True))
        # A sequence's first page is its own too: a cache may know the sequence by it.
        read = [max(cached // page_size - 1, 0) for _, cached in sizes]
        own = [self._pages.pages_for(sum(size)) - n for size, n in zip(sizes, read, strict=True)]
        if sum(own) + sum(read) > self._pages.num_free:
            raise RuntimeError("no free pages to measure a step with")
        self._pages.grow(held, sum(own) * page_size)
        written = iter(self._random.permutation(held).tolist())
        others = iter(self._random.permutation(self._pages.free_pages()).tolist())
        entries = []
        for (query, cached), num_own, num_read in zip(sizes, own, read, strict=True):
            pages = [next(written), *islice(others, num_read), *islice(written, num_own - 1)]
            num_committed = 1 if query <= BLOCK_TOKENS else query
            token_ids = self._random.integers(0, self._runner.shard.vocab_size, cached + query)
            committed = token_ids[: cached + num_committed].tolist()
            sequence = Sequence(
                request=Request(
                    request_id="profile",
                    prompt_token_ids=tuple(committed),
                    sampling=SamplingParams(),
                ),
                token_ids=committed,
                num_prompt_tokens=len(committed),
                max_output_tokens=BLOCK_TOKENS,
                num_computed_tokens=cached,
                pages=pages,
            )
            drafts = tuple(token_ids[cached + num_committed :].tolist())
            entries.append(ScheduledSequence(sequence, num_committed, drafts))
        return entries


class CurveProfiler:
    """Measures a verify curve: quickly at once, thoroughly one pass at a time, or as told.

    Noise of a shared machine only ever adds time: a point is the least of what it measured, and
    repeats are spread over time (all points in turn), so that a disturbance hits one of them.

    Args:
        probe: runs the steps.
        origin: noted in the curves.
        tokens, contexts: the grid, 0 among the contexts; unset: the probe's. Sizes that no batch
            can have are left out.
    """

    def __init__(
        self,
        probe: StepProbe,
        origin: CurveOrigin | None = None,
        *,
        tokens: list[int] | None = None,
        contexts: list[int] | None = None,
    ) -> None:
        self._probe = probe
        self._origin = origin
        sizes = tokens or probe.token_sizes()
        self._tokens = [size for size in sizes if probe.shape(size, 0) is not None]
        self._contexts = [
            context
            for context in contexts or probe.context_sizes()
            if any(probe.shape(size, context) is not None for size in self._tokens)
        ]
        self._shapes = {
            (row, column): shape
            for row, size in enumerate(self._tokens)
            for column, context in enumerate(self._contexts)
            if (shape := probe.shape(size, context)) is not None
        }
        self._seconds = np.full((len(self._tokens), len(self._contexts)), np.inf)
        self._to_visit = deque([*self._shapes] * _VISITS)
        self._num_passes = 0

    @property
    def num_points(self) -> int:
        """Points of the grid that some batch can have."""
        return len(self._shapes)

    def is_measured(self, row: int, column: int) -> bool:
        """Whether a point of the whole grid was measured; else the curve has an estimate there."""
        return bool(np.isfinite(self._seconds[row, column]))

    def profile_quickly(self) -> VerifyCurve:
        """Every batch size without context, and contexts at one batch size; about a second.

        Of the contexts every second one, the largest included. Each of these points is measured at
        least once, however long that takes.
        """
        first_rows: dict[int, int] = {}  # by column: the smallest batch that has the context
        for row, column in self._shapes:
            first_rows.setdefault(column, row)
        columns = sorted(first_rows)[:0:-2]
        points = [(row, 0) for row in range(len(self._tokens))]
        points += [(first_rows[column], column) for column in columns]
        self._measure_in_turn(points, _QUICK_REPEATS, deadline_s=time.perf_counter() + _QUICK_S)
        return self._curve()

    def profile_all(self, repeats: int) -> VerifyCurve:
        """Every point of the grid: once to warm up, then ``repeats`` times."""
        self._measure_in_turn(list(self._shapes), repeats)
        return self._curve()

    def continue_visit(self) -> VerifyCurve | None:
        """One pass more towards a thorough curve; each point is visited for a few passes in a row.

        Returns:
            The curve, once every point has been visited often enough: the last call.
        """
        self._measure(self._to_visit[0])
        self._num_passes += 1
        if self._num_passes == _PASSES_PER_VISIT:
            self._num_passes = 0
            self._to_visit.popleft()
        return None if self._to_visit else self._curve()

    @property
    def is_mid_visit(self) -> bool:
        """Whether the next pass of ``continue_visit`` should follow at once."""
        return self._num_passes > 0

    def _measure_in_turn(
        self, points: list[tuple[int, int]], repeats: int, deadline_s: float = np.inf
    ) -> None:
        """Measures every point once, and then as often as told while there is time."""
        for number, point in enumerate(points * (1 + repeats)):
            if number >= len(points) and time.perf_counter() > deadline_s:
                break
            self._measure(point)

    def _measure(self, point: tuple[int, int]) -> None:
        seconds = self._probe.measure(self._shapes[point])
        self._seconds[point] = min(self._seconds[point], seconds)

    def _curve(self) -> VerifyCurve:
        """The curve of what has been measured; contexts that were not are left out."""
        seconds = np.where(np.isinf(self._seconds), np.nan, self._seconds)
        columns = np.flatnonzero(~np.isnan(seconds).all(axis=0))
        contexts = [self._contexts[column] for column in columns]
        return VerifyCurve.fit(self._tokens, contexts, seconds[:, columns], self._origin)


def _filled(room: np.ndarray, total: int) -> np.ndarray:
    """``total`` put into places with ``room``, one after the other; what does not fit is lost."""
    ends = np.minimum(np.cumsum(room), total)
    return np.diff(ends, prepend=0)
