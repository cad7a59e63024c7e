"""Stand-ins for the expensive parts, without a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerFast

from cluster.engine.load import EngineLoad, PrefixCacheStats
from cluster.engine.text import TextStream
from cluster.errors import DsparkError, QueueFullError
from cluster.request import (
    FinishReason,
    PositionLogprobs,
    Request,
    RequestOutput,
    SpeculationStats,
    TokenLogprob,
    TokenSource,
    Usage,
)
from cluster.routing.prefix_journal import PrefixJournal

OnOutputs = Callable[[list[RequestOutput]], None]


def counted_tokens(request: Request, *, vocab_size: int = 1000) -> list[int]:
    """An output that depends on prompt and choice and nothing else, as a seeded one does."""
    start = sum(request.prompt_token_ids) * 31 + request.choice_index * 7919
    return [(start + 17 * index) % vocab_size for index in range(request.sampling.max_tokens)]


class FakeEngineLoop:
    """An engine loop whose outputs are scripted; the same door and thread rules as the real one.

    Args:
        on_outputs: called in this loop's thread, once a step.
        completion: the whole output of a request; it ends before where its sampling says.
        step_s: seconds of a step.
        tokens_per_step: tokens of each request in a step.
        error_at: asked before each token: (request, index) -> what it fails with.
        max_num_seqs: more requests than these are refused.
        tokenizer: for stop strings.
        journal: what its prefix cache can find; unset: it caches nothing.
    """

    def __init__(
        self,
        on_outputs: OnOutputs,
        *,
        completion: Callable[[Request], Sequence[int]] = counted_tokens,
        step_s: float = 0.002,
        tokens_per_step: int = 1,
        error_at: Callable[[Request, int], Exception | None] = lambda request, index: None,
        max_num_seqs: int = 1000,
        tokenizer: PreTrainedTokenizerFast | None = None,
        journal: PrefixJournal | None = None,
    ) -> None:
        self.submitted: list[Request] = []
        self.cancelled: list[tuple[str, Exception, float]] = []  # id, error, when
        self.on_step: Callable[[int], None] = lambda step: None
        # Asked at each step: whether a request that was taken waits, as behind a full batch.
        self.is_queued: Callable[[Request], bool] = lambda request: False
        self._on_outputs = on_outputs
        self._completion = completion
        self._step_s = step_s
        self._tokens_per_step = tokens_per_step
        self._error_at = error_at
        self.max_num_seqs = max_num_seqs
        self._tokenizer = tokenizer
        self._active: dict[str, _Active] = {}
        self._ended: list[RequestOutput] = []
        self._num_output_tokens = 0
        self.prefix_journal = journal or PrefixJournal(num_pages=0, page_size=4)
        self._stopping = False
        self._lock = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            self._lock.notify()
        self._thread.join(5)

    def submit(self, request: Request) -> None:
        with self._lock:
            self.submitted.append(request)
            if len(self._active) >= self.max_num_seqs:
                self._end(request.request_id, 0, QueueFullError("the engine is full", 0.5))
            else:
                self._active[request.request_id] = _Active(request, self._completion(request))
            self._lock.notify()

    def cancel(self, request_id: str, error: Exception) -> None:
        with self._lock:
            self.cancelled.append((request_id, error, time.monotonic()))
            active = self._active.pop(request_id, None)
            if active is not None:
                self._end(request_id, active.offset, error)
            self._lock.notify()

    def load(self) -> EngineLoad:
        return EngineLoad(
            num_running=len(self._active),
            num_free_tokens=1_000_000,
            num_queued_tokens=sum(
                len(a.token_ids) - a.offset  # computes no prompts
                for a in list(self._active.values())
            ),
            num_taken_in=len(self.submitted),
            num_output_tokens=self._num_output_tokens,
            kv_cache_usage=len(self._active) / max(self.max_num_seqs, 1),
            prefix_cache=PrefixCacheStats(100, 60, 7, 2),
            speculation_state="on",
            speculation_reason="scripted",
            stats=SpeculationStats(num_drafts=3, num_accepted_tokens_per_pos=[2, 1]),
            calibration_error=0.03,
            calibration_drift=1.25,
        )

    @property
    def active_ids(self) -> list[str]:
        return list(self._active)

    @property
    def num_active(self) -> int:
        return len(self._active)

    def _end(self, request_id: str, offset: int, error: Exception) -> None:
        self._ended.append(RequestOutput(request_id=request_id, token_offset=offset, error=error))

    def _run(self) -> None:
        step = 0
        while not self._stopping:
            with self._lock:
                if not self._active and not self._ended:
                    self._lock.wait(0.5)
            if self._active:
                time.sleep(self._step_s)
            step += 1
            with self._lock:
                outputs, self._ended = self._ended, []
                for active in list(self._active.values()):
                    if self.is_queued(active.request):
                        continue
                    output = self._advance(active)
                    self._num_output_tokens += len(output.token_ids)
                    outputs.append(output)
                    if output.is_last:
                        del self._active[active.request.request_id]
            if outputs:
                self._on_outputs(outputs)
            self.on_step(step)

    def _advance(self, active: _Active) -> RequestOutput:
        request = active.request
        offset = active.offset
        text = None
        if self._tokenizer is not None:
            text = TextStream(self._tokenizer, request.sampling.stop)
            for token_id in active.token_ids[:offset]:
                text.push(token_id)
        end = min(offset + self._tokens_per_step, len(active.token_ids))
        reason = FinishReason.LENGTH if end == len(active.token_ids) else None
        error = None
        for index in range(offset, end):
            error = self._error_at(request, index)
            stopped = text is not None and text.push(active.token_ids[index]).stopped
            if error is not None:
                end, reason = index, None
                break
            if stopped or active.token_ids[index] in request.sampling.stop_token_ids:
                end, reason = index + 1, FinishReason.STOP
                break
        active.offset = end
        token_ids = tuple(active.token_ids[offset:end])
        sources = (TokenSource.ACCEPTED,) * (len(token_ids) - 1) + (TokenSource.BONUS,)
        return RequestOutput(
            request_id=request.request_id,
            token_offset=offset,
            token_ids=token_ids,
            token_sources=sources if token_ids else (),
            logprobs=_logprobs(token_ids, request.sampling.logprobs),
            finish_reason=reason,
            usage=_usage(request, end) if reason is not None else None,
            error=error,
        )


class _Active:
    def __init__(self, request: Request, token_ids: Sequence[int]) -> None:
        self.request = request
        self.token_ids = list(token_ids)[: request.sampling.max_tokens]
        self.offset = len(request.resume_token_ids)
        if tuple(self.token_ids[: self.offset]) != request.resume_token_ids:
            raise DsparkError("resumed with tokens that are not the request's")


def _logprobs(token_ids: Sequence[int], num_top: int | None) -> tuple[PositionLogprobs, ...]:
    if num_top is None:
        return ()
    return tuple(
        PositionLogprobs(
            TokenLogprob(token_id, -0.5),
            tuple(TokenLogprob(token_id + rank, -0.5 - rank) for rank in range(num_top)),
        )
        for token_id in token_ids
    )


def _usage(request: Request, num_output_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=len(request.prompt_token_ids),
        completion_tokens=num_output_tokens,
        speculation=SpeculationStats(num_drafts=2, num_accepted_tokens_per_pos=[1]),
    )
