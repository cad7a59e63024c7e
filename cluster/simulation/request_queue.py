"""The requests of a simulated replica: those that wait, and which of those that run fit a pass."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from cluster.simulation.device import Device
from cluster.simulation.job import Job
from cluster.simulation.passes import Chunks
from cluster.simulation.sequence import SimulatedSequence
from cluster.speculation.groups import group_share
from cluster.speculation.speculation_plan import PassLoad

_FIRST_MEAN_OUTPUT_TOKENS = 128.0
_MEAN_OUTPUT_WEIGHT = 0.05


class RequestQueue:
    """Continuous batching as the engine's scheduler has it, over counts of tokens.

    Attributes:
        waiting: not started, or preempted.
        running: with tokens in the cache, oldest first; the same list all the time.
        mean_output_tokens: of requests that have ended, the latest counting most.
        num_preemptions: so far.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.waiting: deque[Job] = deque()
        self.running: list[SimulatedSequence] = []
        self.mean_output_tokens = _FIRST_MEAN_OUTPUT_TOKENS
        self.num_preemptions = 0
        self._is_crowded = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    @property
    def num_free_tokens(self) -> float:
        """That fit into the cache."""
        capacity = self._device.settings.kv_cache_tokens
        return math.inf if capacity is None else capacity - num_context_tokens(self.running)

    @property
    def num_queued_tokens(self) -> float:
        """As ``Scheduler.num_queued_tokens``."""
        mean, run = self.mean_output_tokens, self.running
        queued = sum([s.missing for s in run]) + sum([min(s.left, mean) for s in run])
        return queued + sum([job.num_prompt_tokens + mean for job in self.waiting])

    def load(self, num_groups: int) -> PassLoad:
        """What passes have to do, all groups together."""
        prompts = [s for s in self.running if s.missing > 1]
        num_decoding = len(self.running) - len(prompts)
        parts = chunks(
            prompts, self._device.settings.max_num_batched_tokens * num_groups - num_decoding
        )
        return PassLoad(
            num_requests=num_decoding + num_last(parts),
            num_drafting=num_decoding,
            num_base_tokens=num_decoding + num_prompt_tokens(parts),
            num_context_tokens=num_context_tokens(self.running),
            is_crowded=self._is_crowded,
        )

    def next_job(self, group: int, num_groups: int) -> Job | None:
        """The waiting request that may start in this group's pass, if one may."""
        run = self.running
        self._is_crowded = False
        if not self.waiting:
            return None
        if len(run) >= self._device.settings.max_num_seqs:
            self._is_crowded = True
            return None
        if num_groups > 1:
            most = self._device.settings.max_num_seqs
            share = group_share(len(run), len(self.waiting), most, num_groups)
            if sum([s.group == group for s in run]) >= share:
                return None
        job = self.waiting[0]
        num_tokens = job.num_prompt_tokens + job.num_made
        if len(run) and self.num_free_tokens < num_tokens + 1 + len(run):
            self._is_crowded = True
            return None
        return self.waiting.popleft()

    def start(self, job: Job, group: int, luck: float, now: float) -> SimulatedSequence:
        """Lets a request run."""
        if math.isnan(job.started_s):
            job.started_s = now
        num_tokens = job.num_prompt_tokens + job.num_made
        cached = min(int(num_tokens * self._device.prefix_hit_rate), num_tokens - 1)
        sequence = SimulatedSequence(
            job,
            missing=num_tokens - cached,
            context=cached,
            left=job.num_output_tokens - job.num_made,
            group=group,
            luck=luck,
            last_s=now,
        )
        self.running.append(sequence)
        return sequence

    def make_room(self) -> None:
        """Preempts the latest sequences while the next pass would not fit in the cache."""
        run = self.running
        while len(run) > 1 and self.num_free_tokens < len(run):
            latest = max(run, key=lambda sequence: sequence.job.number)
            self.waiting.appendleft(latest.job)
            run.remove(latest)
            self.num_preemptions += 1

    def remove_ended(self) -> list[Job]:
        """Takes out the requests that have their last token."""
        ended = [s.job for s in self.running if s.left <= 0]
        if ended:
            self.running[:] = [s for s in self.running if s.left > 0]
        for job in ended:
            change = job.num_output_tokens - self.mean_output_tokens
            self.mean_output_tokens += change * _MEAN_OUTPUT_WEIGHT
        return ended


def chunks(sequences: Iterable[SimulatedSequence], room: int) -> Chunks:
    """How many prompt tokens of which of them fit."""
    found = []
    for sequence in sequences:
        if room <= 0:
            break
        count = min(sequence.missing, room)
        found.append((sequence, count))
        room -= count
    return found


def num_last(prompts: Chunks) -> int:
    """How many of these prompts end with their chunk."""
    return sum([sequence.missing == count for sequence, count in prompts])


def num_prompt_tokens(prompts: Chunks) -> int:
    """Of these chunks."""
    return sum([count for _, count in prompts])


def num_context_tokens(sequences: Iterable[SimulatedSequence]) -> int:
    """Cached tokens of them."""
    return sum([sequence.context for sequence in sequences])
