"""Which tokens of which requests go into the next pass.

There is no prefill or decode phase: every sequence's computed tokens catch up with its committed
ones, guesses included. Decoding sequences go first, prompts fill what is left of the token budget
in chunks, so a long prompt never stalls the rest. Guesses only get what every decoding sequence
leaves of tokens and pages. When pages still run out, the sequence of the latest turn not in flight
gives its pages back and is computed again later, but for what the prefix cache still has of it.

Who waits, waits in the order of turns (``Request.turn``): first come, first served within a
priority, and nobody is overtaken by what comes more than a minute behind it. What is at the front
and does not fit yet keeps all others waiting, so that large requests are not passed over either.
"""

from __future__ import annotations

from bisect import insort_left, insort_right
from dataclasses import dataclass

import numpy as np

from cluster.config import TargetConfig
from cluster.engine.pages import PagePool
from cluster.engine.prefix_cache import PrefixCache
from cluster.engine.sampler import SampleInput
from cluster.engine.sequence import Sequence
from cluster.engine.step_input import StepInput
from cluster.errors import QueueFullError
from cluster.speculation.groups import group_share
from cluster.speculation.speculation_plan import PassLoad

_FIRST_MEAN_OUTPUT_TOKENS = 128.0
# Rows of logits that a pass may have for prompts: each is as long as the vocabulary.
MAX_SCORED_ROWS = 256
_MEAN_OUTPUT_WEIGHT = 0.05  # of each output that ends


@dataclass(frozen=True)
class ScheduledSequence:
    """``num_tokens`` committed tokens of a sequence from its first uncomputed one, then drafts."""

    sequence: Sequence
    num_tokens: int
    draft_token_ids: tuple[int, ...]

    @property
    def samples(self) -> bool:
        """Whether the pass reaches the sequence's last committed token, so that it samples."""
        return self.num_tokens == self.sequence.num_missing_tokens

    @property
    def scored(self) -> range:
        """Positions of the prompt whose next tokens' log-probabilities the pass gives."""
        sequence = self.sequence
        if not sequence.wants_prompt_logprobs:
            return range(0)
        start = sequence.num_computed_tokens
        end = min(start + self.num_tokens, sequence.num_prompt_tokens - 1)
        return range(max(start, len(sequence.prompt_logprobs)), end)

    @property
    def sample_input(self) -> SampleInput:
        """What the sampler needs of it, where it samples."""
        sequence = self.sequence
        return SampleInput(
            params=sequence.request.sampling,
            token_ids=sequence.token_ids,
            num_prompt_tokens=sequence.num_prompt_tokens,
            choice_index=sequence.request.choice_index,
            draft_token_ids=self.draft_token_ids,
            proposal=sequence.proposal,
            grammar=sequence.grammar,
            rules=sequence.rules,
        )


class Scheduler:
    """Keeps the waiting and the running sequences; holds no tensors.

    Running sequences are spread over ``num_groups`` groups, of which each pass takes one.

    Args:
        config: bounds.
        pages: of the cache.
        prefixes: of the same pages; what is found there is not computed.
        num_groups: at least 1.
    """

    def __init__(
        self, config: TargetConfig, pages: PagePool, prefixes: PrefixCache, num_groups: int
    ) -> None:
        self._config = config
        self._pages = pages
        self._prefixes = prefixes
        self._num_groups = num_groups
        self.waiting: list[Sequence] = []  # in the order of turns
        self.running: dict[Sequence, None] = {}  # a set that keeps its order
        self.num_preemptions = 0
        self._is_crowded = False
        self.mean_output_tokens = _FIRST_MEAN_OUTPUT_TOKENS
        self._num_waiting_tokens = 0

    @property
    def num_queued_tokens(self) -> int:
        """Tokens to be computed for the sequences that are here: what is missing of them, and the
        outputs to come. Those are taken to be as long as others were, however much of one is there.
        """
        mean = self.mean_output_tokens
        running = sum(s.num_missing_tokens + min(s.room, mean) for s in self.running)
        return round(running + self._num_waiting_tokens + mean * len(self.waiting))

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence.

        Raises:
            QueueFullError: ``max_num_waiting`` sequences wait already.
        """
        if len(self.waiting) >= self._config.max_num_waiting:
            raise QueueFullError(
                f"{len(self.waiting)} requests wait on this replica", retry_after_s=1.0
            )
        sequence.num_waiting_tokens = len(sequence.token_ids) - self._pages.page_size * len(
            self._prefixes.match(sequence)
        )
        self._num_waiting_tokens += sequence.num_waiting_tokens
        insort_right(self.waiting, sequence, key=_turn)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out and frees its pages; it must not be in flight."""
        if sequence in self.running:
            del self.running[sequence]
            change = sequence.num_output_tokens - self.mean_output_tokens
            self.mean_output_tokens += change * _MEAN_OUTPUT_WEIGHT
        else:
            self.waiting.remove(sequence)
            self._num_waiting_tokens -= sequence.num_waiting_tokens
        self._pages.shrink(sequence.pages, 0)

    def group_members(self, group: int) -> list[Sequence]:
        """Running sequences of one group, oldest first."""
        return [s for s in self.running if s.group == group]

    def draft_limits(self, group: int) -> dict[Sequence, int]:
        """How many guesses of each proposal the group's next pass can hold.

        To be asked before guesses are chosen, and it looks at lengths only. If a guess could lose
        its place because of others that are verified in the same pass, then by the competition in
        a plan also because of itself (DESIGN, rule 3).
        """
        decoding = [s for s in self.group_members(group) if s.num_missing_tokens == 1]
        widths = {s: s.proposal.num_draft_tokens for s in decoding if s.proposal is not None}
        if not widths:
            return {}
        share = (self._config.max_num_batched_tokens - len(decoding)) // len(widths)
        free = self._pages.num_free - sum(self._missing_pages(s, 0) for s in decoding)
        limits = {}
        for sequence, width in widths.items():
            limit = min(width, share)
            extra = self._missing_pages(sequence, limit) - self._missing_pages(sequence, 0)
            if extra > free:
                limit = extra = 0
            free -= extra
            limits[sequence] = limit
        return limits

    def base_load(self, group: int) -> tuple[int, int]:
        """Sequences that sample, and tokens, in the group's next pass without any guess.

        It looks at lengths only, as ``draft_limits`` does, and so not at who may be preempted.
        """
        members = self.group_members(group)
        members.sort(key=lambda s: s.num_missing_tokens > 1)  # as they are scheduled
        room = self._config.max_num_batched_tokens
        num_sampling = num_tokens = 0
        for sequence in members:
            taken = min(sequence.num_missing_tokens, room - num_tokens)
            num_sampling += taken == sequence.num_missing_tokens
            num_tokens += taken
        return num_sampling, num_tokens

    def load(self) -> PassLoad:
        """What passes have to do for the sequences that run, all groups together."""
        loads = [self.base_load(group) for group in range(self._num_groups)]
        return PassLoad(
            num_requests=sum(num_sampling for num_sampling, _ in loads),
            num_drafting=sum(map(_may_be_drafted_for, self.running)),
            num_base_tokens=sum(num_tokens for _, num_tokens in loads),
            num_context_tokens=sum(s.num_computed_tokens for s in self.running),
            is_crowded=self._is_crowded,
        )

    def set_num_groups(self, num_groups: int) -> None:
        """Spreads the running sequences over so many groups; none of them may be in flight."""
        self._num_groups = num_groups
        for index, sequence in enumerate(self.running):
            sequence.group = index % num_groups

    def schedule(
        self, group: int, drafts: dict[Sequence, tuple[int, ...]]
    ) -> list[ScheduledSequence]:
        """Chooses the next pass of ``group``.

        Args:
            group: none of its sequences may be in flight.
            drafts: draft tokens to verify, by sequence, within ``draft_limits``.
        """
        budget = self._config.max_num_batched_tokens
        room = MAX_SCORED_ROWS
        scheduled: list[ScheduledSequence] = []
        members = self.group_members(group)
        members.sort(key=lambda s: s.num_missing_tokens > 1)  # stable: decoding ones first
        for sequence in members:
            if budget == 0:
                break
            if sequence not in self.running:
                continue  # preempted by one before it
            limit = min(budget, room) if sequence.wants_prompt_logprobs else budget
            if limit == 0:
                continue
            chosen = self._fit(sequence, drafts.get(sequence, ()), limit, scheduled)
            if chosen is not None:
                scheduled.append(chosen)
                budget -= chosen.num_tokens + len(chosen.draft_token_ids)
                room -= len(chosen.scored)
        is_full = False
        free_places = self._free_places(group)
        while free_places > 0 and self.waiting and budget > 0:
            sequence = self.waiting[0]
            limit = min(budget, room) if sequence.wants_prompt_logprobs else budget
            if limit == 0:
                break
            found = self._prefixes.match(sequence)
            if not self._admits(sequence, found):
                is_full = True
                break
            self._prefixes.start(sequence, found)
            num_tokens = min(sequence.num_missing_tokens, limit)
            self._pages.grow(sequence.pages, len(sequence.token_ids))
            self.waiting.pop(0)
            self._num_waiting_tokens -= sequence.num_waiting_tokens
            sequence.group = group
            free_places -= 1
            self.running[sequence] = None
            scheduled.append(self._entry(sequence, num_tokens, ()))
            budget -= num_tokens
            room -= len(scheduled[-1].scored)
        is_full |= len(self.running) >= self._config.max_num_seqs
        self._is_crowded = is_full and bool(self.waiting)
        return scheduled

    def _admits(self, sequence: Sequence, found: list[int]) -> bool:
        """Whether a waiting sequence fits as a whole, with a page to spare for each running one.

        Without that it would be computed in part, preempted and computed again, over and over. Of
        its pages, those that were found in others' hands need no room.
        """
        num_shared = sum(map(self._pages.is_held, found))
        needed = self._pages.pages_for(len(sequence.token_ids) + 1) - num_shared
        return not self.running or needed + len(self.running) <= self._pages.num_free

    def _free_places(self, group: int) -> int:
        """How many sequences may start in the group."""
        most = self._config.max_num_seqs
        share = group_share(len(self.running), len(self.waiting), most, self._num_groups)
        size = sum(sequence.group == group for sequence in self.running)
        return min(share - size, most - len(self.running))

    def _fit(
        self,
        sequence: Sequence,
        drafts: tuple[int, ...],
        budget: int,
        scheduled: list[ScheduledSequence],
    ) -> ScheduledSequence | None:
        """Gets pages for a running sequence, preempting those of later turns if it must."""
        num_tokens = min(sequence.num_missing_tokens, budget)
        end = sequence.num_computed_tokens + num_tokens + len(drafts)
        while not self._pages.grow(sequence.pages, end):
            busy = {entry.sequence for entry in scheduled}
            candidates = [s for s in self.running if not s.is_in_flight and s not in busy]
            victim = max(candidates, key=_turn)
            self.preempt(victim)
            if victim is sequence:
                return None
        return self._entry(sequence, num_tokens, drafts)

    def _entry(
        self, sequence: Sequence, num_tokens: int, drafts: tuple[int, ...]
    ) -> ScheduledSequence:
        self._prefixes.keep(sequence, sequence.num_computed_tokens + num_tokens)
        return ScheduledSequence(sequence, num_tokens, drafts)

    def _missing_pages(self, sequence: Sequence, num_drafts: int) -> int:
        """Pages that a decoding sequence lacks for its own next token and so many guesses."""
        needed = self._pages.pages_for(len(sequence.token_ids) + num_drafts)
        return max(needed - len(sequence.pages), 0)

    def preempt(self, sequence: Sequence) -> None:
        """Frees a running sequence's pages; it is computed again when it is its turn.

        It must not be in flight. Its full pages can be found until somebody needs them.
        """
        del self.running[sequence]
        self._pages.shrink(sequence.pages, 0)
        sequence.num_computed_tokens = 0
        sequence.has_outdated_features = False
        sequence.proposal = None
        sequence.num_waiting_tokens = len(sequence.token_ids)
        self._num_waiting_tokens += sequence.num_waiting_tokens
        insort_left(self.waiting, sequence, key=_turn)
        self.num_preemptions += 1


def _turn(sequence: Sequence) -> float:
    return sequence.request.turn


def _may_be_drafted_for(sequence: Sequence) -> bool:
    is_decoding = sequence.num_missing_tokens == 1
    return is_decoding and not sequence.request.speculation.is_off


def flatten(entries: list[ScheduledSequence], page_size: int) -> StepInput:
    """Lays the scheduled tokens of all sequences, guesses included, one behind the other."""
    token_ids: list[int] = []
    logit_rows: list[int] = []
    query_lens, starts = [], []
    for entry in entries:
        sequence = entry.sequence
        start = sequence.num_computed_tokens
        end = start + entry.num_tokens
        logit_rows += (len(token_ids) + position - start for position in entry.scored)
        token_ids += sequence.token_ids[start:end]
        if entry.samples:
            first = len(token_ids) - 1
            logit_rows += range(first, first + len(entry.draft_token_ids) + 1)
        token_ids += entry.draft_token_ids
        starts.append(start)
        query_lens.append(entry.num_tokens + len(entry.draft_token_ids))
    lengths = np.asarray(query_lens, dtype=np.int64)
    first_positions = np.asarray(starts, dtype=np.int64)
    firsts = np.cumsum(lengths) - lengths
    owner = np.repeat(np.arange(len(entries)), lengths)
    positions = np.arange(len(token_ids)) - firsts[owner] + first_positions[owner]
    width = max(len(entry.sequence.pages) for entry in entries)
    tables = np.zeros((len(entries), width), dtype=np.int64)
    for row, entry in enumerate(entries):
        tables[row, : len(entry.sequence.pages)] = entry.sequence.pages
    return StepInput(
        token_ids=np.asarray(token_ids, dtype=np.int64),
        positions=positions,
        slots=tables[owner, positions // page_size] * page_size + positions % page_size,
        query_lens=lengths,
        context_lens=first_positions + lengths,
        block_tables=tables,
        logit_rows=np.asarray(logit_rows, dtype=np.int64),
    )
