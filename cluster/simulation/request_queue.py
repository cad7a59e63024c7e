"""The requests of a simulated replica: those that wait, and which of those that run fit a pass."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import numpy.typing as npt

from cluster.simulation.device import Device
from cluster.simulation.job import Job
from cluster.simulation.running import Running
from cluster.speculation.speculation_plan import PassLoad

_FIRST_MEAN_OUTPUT_TOKENS = 128.0
_MEAN_OUTPUT_WEIGHT = 0.05

Integers = npt.NDArray[np.int64]
Chunks = list[tuple[int, int]]


class RequestQueue:
    """Continuous batching as the engine's scheduler has it, over counts of tokens.

    Attributes:
        waiting: not started, or preempted.
        running: with tokens in the cache.
        mean_output_tokens: of requests that have ended, the latest counting most.
        num_preemptions: so far.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.waiting: deque[Job] = deque()
        self.running = Running(device.settings.max_num_seqs)
        self.mean_output_tokens = _FIRST_MEAN_OUTPUT_TOKENS
        self.num_preemptions = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not len(self.running)

    @property
    def num_free_tokens(self) -> float:
        """That fit into the cache."""
        capacity = self._device.settings.kv_cache_tokens
        return math.inf if capacity is None else capacity - self.running.num_context_tokens

    @property
    def num_queued_tokens(self) -> float:
        """As ``Scheduler.num_queued_tokens``."""
        mean, run = self.mean_output_tokens, self.running
        queued = sum(run.missing.tolist()) + sum(min(left, mean) for left in run.left.tolist())
        return queued + sum(job.num_prompt_tokens + mean for job in self.waiting)

    def chunks(self, rows: list[int], room: int) -> Chunks:
        """How many prompt tokens of which sequences fit."""
        chunks = []
        for row in rows:
            if room <= 0:
                break
            count = min(int(self.running.missing[row]), room)
            chunks.append((row, count))
            room -= count
        return chunks

    def num_last(self, chunks: Chunks) -> int:
        """How many of these prompts end with their chunk."""
        missing = self.running.missing
        return sum(int(missing[i]) == count for i, count in chunks)

    def context(self, rows: Integers, others: list[int]) -> int:
        """Cached tokens of these sequences."""
        context = self.running.context
        return sum(context[rows].tolist()) + sum(int(context[i]) for i in others)

    def load(self, num_groups: int) -> PassLoad:
        """What passes have to do, all groups together."""
        run = self.running
        num_decoding = run.missing.tolist().count(1)
        room = self._device.settings.max_num_batched_tokens * num_groups - num_decoding
        chunks = self.chunks(np.flatnonzero(run.missing > 1).tolist(), room)
        return PassLoad(
            num_requests=num_decoding + self.num_last(chunks),
            num_drafting=num_decoding,
            num_base_tokens=num_decoding + sum(count for _, count in chunks),
            num_context_tokens=run.num_context_tokens,
        )

    def next_job(self, group: int, num_groups: int) -> Job | None:
        """The waiting request that may start in this group's pass, if one may."""
        run = self.running
        if not self.waiting or len(run) >= self._device.settings.max_num_seqs:
            return None
        if num_groups > 1:
            sizes = np.bincount(run.group, minlength=num_groups)
            if int(sizes.argmin()) != group:
                return None
        job = self.waiting[0]
        num_tokens = job.num_prompt_tokens + job.num_made
        if len(run) and self.num_free_tokens < num_tokens + 1 + len(run):
            return None
        return self.waiting.popleft()

    def start(self, job: Job, group: int, luck: float, now: float) -> tuple[int, int]:
        """Lets a request run; returns its place and how many tokens of its prompt are missing."""
        if math.isnan(job.started_s):
            job.started_s = now
        num_tokens = job.num_prompt_tokens + job.num_made
        cached = min(int(num_tokens * self._device.prefix_hit_rate), num_tokens - 1)
        index = self.running.add(
            job,
            missing=num_tokens - cached,
            context=cached,
            left=job.num_output_tokens - job.num_made,
            group=group,
            luck=luck,
            last_s=now,
        )
        return index, num_tokens - cached

    def make_room(self) -> None:
        """Preempts the latest sequences while the next pass would not fit in the cache."""
        run = self.running
        while len(run) > 1 and self.num_free_tokens < len(run):
            latest = max(range(len(run)), key=lambda i: run.jobs[i].number)
            self.waiting.appendleft(run.jobs[latest])
            run.keep(np.arange(len(run)) != latest)
            self.num_preemptions += 1

    def remove_ended(self) -> list[Job]:
        """Takes out the requests that have their last token."""
        run = self.running
        lefts = run.left.tolist()
        if not lefts or min(lefts) > 0:
            return []
        is_over = run.left <= 0
        ended = [run.jobs[i] for i in np.flatnonzero(is_over).tolist()]
        run.keep(~is_over)
        for job in ended:
            change = job.num_output_tokens - self.mean_output_tokens
            self.mean_output_tokens += change * _MEAN_OUTPUT_WEIGHT
        return ended
