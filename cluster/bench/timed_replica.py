"""A replica without a model: the engine's own scheduler and caches, on a clock that is told.

Which request waits, which pages are found and which are let go is decided by the objects that
serve; only what a pass computes is left out, and how long it takes comes from a line.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from cluster.config import TargetConfig
from cluster.engine.pages import PagePool
from cluster.engine.prefix_cache import PrefixCache
from cluster.engine.scheduler import ScheduledSequence, Scheduler
from cluster.engine.sequence import Sequence
from cluster.request import Request, SamplingParams
from cluster.routing.replica_loads import ReplicaLoad


@dataclass(frozen=True)
class PassTime:
    """Seconds of a pass: ``base_s``, and ``token_s`` for each of its tokens."""

    base_s: float = 0.008
    token_s: float = 0.00004

    def seconds(self, num_tokens: int) -> float:
        """Of a pass with so many tokens."""
        return self.base_s + self.token_s * num_tokens


class TimedReplica:
    """Runs requests whose outputs are known, pass by pass.

    Args:
        num_pages: of its cache.
        config: its bounds.
        pass_time: how long a pass takes.
    """

    def __init__(self, num_pages: int, config: TargetConfig, pass_time: PassTime) -> None:
        self._pages = PagePool(num_pages + 1, config.page_size)
        self.prefixes = PrefixCache(self._pages, is_enabled=True)
        self._scheduler = Scheduler(config, self._pages, self.prefixes, num_groups=1)
        self._pass_time = pass_time
        self._under_way: list[ScheduledSequence] = []
        self._answers: dict[str, Tokens[int]] = {}
        self.num_submitted = 0
        self.is_busy = False

    def submit(self, request_id: str, prompt: Tokens[int], answer: Tokens[int], now: float) -> None:
        """Queues a request. Raises: QueueFullError."""
        request = Request(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=len(answer)),
            arrival_time=now,
        )
        length = len(prompt) + len(answer)
        self.num_submitted += 1
        self._answers[request_id] = answer
        self._scheduler.add(Sequence.of(request, max_model_len=length, tokenizer=None))

    def begin(self) -> tuple[float, list[str]]:
        """Starts a pass. Returns its seconds, and who is computed for the first time in it; 0.0
        where there is nothing to do."""
        waiting = {s.request.request_id for s in self._scheduler.waiting if not s.has_started}
        self._under_way = self._scheduler.schedule(0, {})
        if not self._under_way:
            return 0.0, []
        self.is_busy = True
        num_tokens = sum(entry.num_tokens for entry in self._under_way)
        ids = [entry.sequence.request.request_id for entry in self._under_way]
        return self._pass_time.seconds(num_tokens), [i for i in ids if i in waiting]

    def finish(self) -> tuple[list[str], list[Sequence]]:
        """Ends the pass. Returns who has its first token now, and the sequences that have ended."""
        self.is_busy = False
        first: list[str] = []
        ended: list[Sequence] = []
        for entry in self._under_way:
            sequence, samples = entry.sequence, entry.samples
            sequence.num_computed_tokens += entry.num_tokens
            if samples:
                request_id = sequence.request.request_id
                answer = self._answers[request_id]
                if not sequence.num_output_tokens:
                    first.append(request_id)
                sequence.append([answer[sequence.num_output_tokens]], ())
                if sequence.num_output_tokens == len(answer):
                    ended.append(sequence)
            self.prefixes.keep(sequence, sequence.num_computed_tokens)
        for sequence in ended:
            self._scheduler.remove(sequence)
            del self._answers[sequence.request.request_id]
        return first, ended

    def load(self, num_routers: int) -> ReplicaLoad:
        """What it reports."""
        return ReplicaLoad(
            num_queued_tokens=self._scheduler.num_queued_tokens,
            num_free_tokens=self._pages.num_free * self._pages.page_size,
            num_routers=num_routers,
            mean_output_tokens=self._scheduler.mean_output_tokens,
        )
