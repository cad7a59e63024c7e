"""The engine: one target replica's loop, one step at a time.

A step schedules a group of sequences, verifies their guesses and computes their prompts in one
pass, samples once, and hands out what every request gained. With several pipeline stages, as many
groups are in flight, and a step launches what it can before it finishes the oldest.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from cluster.config import ClusterConfig, SpeculativeConfig
from cluster.engine.curve_keeper import CurveKeeper
from cluster.engine.draft_client import DraftClient
from cluster.engine.drafting import feature_slots
from cluster.engine.feature_refresh import FeatureRefresh
from cluster.engine.grammar import GrammarCompiler, GrammarMatcher
from cluster.engine.load import EngineLoad, SpeculationLoad
from cluster.engine.pages import PagePool
from cluster.engine.planning import RecordObserver
from cluster.engine.prefix_cache import PrefixCache
from cluster.engine.profile import StepProbe
from cluster.engine.prompt_scores import take_prompt_scores
from cluster.engine.runner import Runner
from cluster.engine.sampler import SampleOutput, Sampler
from cluster.engine.scheduler import ScheduledSequence, Scheduler, flatten
from cluster.engine.sequence import Sequence
from cluster.engine.speculator import Speculator
from cluster.engine.step_input import StepInput
from cluster.errors import InvalidRequestError
from cluster.request import FinishReason, Request, RequestOutput, SpeculationStats
from cluster.speculation.calibration import Calibration
from cluster.speculation.cost_model import CostModel
from cluster.speculation.speculation_policy import PassPromise
from cluster.speculation.switch import SpeculationMode


@dataclass(frozen=True)
class _Pass:
    """A scheduled pass that is under way."""

    group: int
    entries: list[ScheduledSequence]
    step: StepInput
    started_s: float  # of the engine's clock, which stands still while drafts are waited for
    promise: PassPromise | None  # where there is a speculator


class Engine:
    """Serves requests on one target. Not thread-safe: see ``cluster.engine.loop``.

    Every added request ends in exactly one last ``RequestOutput``: finished or with an error.

    Args:
        config: the cluster's configuration.
        runner: the target's shards.
        tokenizer: needed for stop strings and grammars only.
        eos_token_ids: tokens that end an output.
        draft_client: the drafters, or ``None`` to decode plainly.
        calibration: of the drafter's confidences; unset: they are taken as they are.
        target_digest: finds the verify curve of an earlier start; unset: it is measured.
        seed: of the random streams (tests); unset: from the operating system.

    Raises:
        ConfigError: the cache cannot hold one full context, or a configured curve is broken.
    """

    def __init__(
        self,
        config: ClusterConfig,
        runner: Runner,
        *,
        eos_token_ids: tuple[int, ...],
        tokenizer: Any = None,
        draft_client: DraftClient | None = None,
        calibration: Calibration | None = None,
        target_digest: str | None = None,
        seed: int | None = None,
    ) -> None:
        shard = runner.shard
        self.vocab_size = shard.vocab_size
        self.max_model_len = min(
            config.target.max_model_len or shard.max_model_len, shard.max_model_len
        )
        self._max_batch_tokens = config.target.max_num_batched_tokens
        self._runner = runner
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self.grammars = GrammarCompiler.of(tokenizer, self.vocab_size, eos_token_ids)
        self._pages = PagePool(shard.num_pages, shard.page_size, shard.cache.release)
        self._pages.check_holds(self.max_model_len)
        self._prefixes = PrefixCache(
            self._pages, config.target.enable_prefix_caching and shard.cache.keeps_pages
        )
        self.prefix_journal = self._prefixes.journal  # for any thread
        self._num_stages = self._num_groups = runner.num_stages
        self._scheduler = Scheduler(config.target, self._pages, self._prefixes, self._num_groups)
        speculative = config.speculative
        self._sampler = Sampler(
            eos_token_ids=eos_token_ids,
            trust_drafter=speculative is None or speculative.trust_drafter,
            device=shard.device,
            seed=seed,
        )
        self._stats = SpeculationStats()
        self._waited_s = 0.0
        self._last_finish = time.monotonic()
        probe = StepProbe(runner, self._pages, config.target, self.max_model_len)
        self._curve_keeper = CurveKeeper(probe, config.target, target_digest)
        self.cost_model = CostModel(self._curve_keeper.curve)
        self._speculator = self._make_speculator(speculative, draft_client, calibration)
        self._refresh = FeatureRefresh(self._scheduler, self.cost_model)
        self._sequences: dict[str, Sequence] = {}
        self._in_flight: deque[_Pass] = deque()
        self._next_group = 0
        self._num_output_tokens = self._num_prompt_tokens = 0
        self._num_by_budget = [0]

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do anything."""
        return bool(self._sequences)

    def add_request(self, request: Request, grammar: GrammarMatcher | None = None) -> None:
        """Queues a request, with a matcher that ``grammars`` has made for it, or makes one here.

        Raises:
            InvalidRequestError: a field cannot be served, or the id is in use.
            QueueFullError: too many requests wait.
        """
        request.validate(
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self._eos_token_ids,
        )
        if request.request_id in self._sequences:
            raise InvalidRequestError("request_id", f"'{request.request_id}' is being served")
        matcher = grammar or self.grammars.matcher(request)
        sequence = Sequence.of(request, self.max_model_len, self._tokenizer, matcher)
        self._scheduler.add(sequence)
        if not self._sequences:
            self._last_finish = time.monotonic()  # what idled was not slow
        self._sequences[request.request_id] = sequence

    def cancel(self, request_id: str, error: Exception) -> None:
        """Ends a request with ``error`` before the next pass; unknown ids are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.end_error is None:
            sequence.end_error = error

    def step(self) -> list[RequestOutput]:
        """Launches what fits, finishes the oldest pass, and tells what every request gained."""
        outputs = self._end_marked()
        self._refresh.advance()
        self._regroup()
        while len(self._in_flight) < self._num_stages and self._launch_next():
            pass
        if self._in_flight:
            outputs += self._finish(self._in_flight.popleft())
        return outputs

    def load(self) -> EngineLoad:
        """The moment's load and the totals since the start."""
        speculator = self._speculator
        speculation = SpeculationLoad(reason="no drafter is configured")
        if speculator is not None:
            speculation = speculator.load()
        is_off = speculation.mode == SpeculationMode.PLAIN
        return EngineLoad(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            kv_cache_usage=self._pages.usage,
            num_free_tokens=self._pages.num_free * self._pages.page_size,
            num_queued_tokens=self._scheduler.num_queued_tokens,
            mean_output_tokens=self._scheduler.mean_output_tokens,
            num_output_tokens=self._num_output_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            num_requests_by_budget=self._num_by_budget,
            num_preemptions=self._scheduler.num_preemptions,
            prefix_cache=self._prefixes.stats(),
            speculation_state="off" if is_off else "on",
            speculation_reason=speculation.reason,
            speculation=speculation,
            stats=self._stats,
            calibration_error=speculator.calibration_error if speculator is not None else None,
            calibration_drift=speculator.calibration_drift if speculator is not None else 1.0,
            paced=self._runner.pace.pace.stats if self._runner.pace is not None else None,
        )

    def observe_rounds(self, observer: RecordObserver) -> None:
        """Has a record of every verified proposal passed to ``observer`` (evaluation)."""
        if self._speculator is not None:
            self._speculator.set_observer(observer)

    def swap_drafter(
        self,
        speculative: SpeculativeConfig | None,
        draft_client: DraftClient | None,
        calibration: Calibration | None = None,
    ) -> list[RequestOutput]:
        """Goes over to another drafter between two passes; no request and no output changes.

        Passes under way are finished with the guesses of the former drafter; what it has proposed
        beyond that is never verified. Where the drafter reads other features than are cached,
        sequences are computed again one by one, and decode plainly until then.

        Args:
            speculative: how it drafts; every shard has staged its projection.
            draft_client: the drafters; the former one is left to the caller. Both are ``None`` for
                plain decoding.
            calibration: of its confidences; unset: they are taken as they are.

        Returns:
            What requests gained by the passes that were under way.
        """
        former, self._speculator = self._speculator, None
        if former is not None:
            for sequence in self._sequences.values():
                former.forget(sequence)
        outputs: list[RequestOutput] = []
        while self._in_flight:
            outputs += self._finish(self._in_flight.popleft())
        for sequence in self._sequences.values():
            sequence.proposal = None
        are_read = speculative is not None and speculative.uses_features
        are_kept = self._runner.use_staged_features()
        self._refresh.mark(self._sequences.values(), are_read=are_read, are_kept=are_kept)
        if are_read and not are_kept:
            self._prefixes.clear()
        self._sampler.trust_drafter = speculative is None or speculative.trust_drafter
        self._speculator = self._make_speculator(speculative, draft_client, calibration)
        return outputs

    def use_speculation_policy(self, speculative: SpeculativeConfig) -> None:
        """Goes on with the same drafter in another way: scheduler, switching, grouping, caps.

        What was learnt stays, and so do the draft sessions.

        Raises:
            ValueError: there is no drafter.
        """
        if self._speculator is None:
            raise ValueError("there is no drafter whose use could change")
        self._speculator.use_policy(speculative)

    def predicted_step_s(self) -> float:
        """Seconds of the longest step, all bounds reached and all rounds late. For any thread."""
        speculator = self._speculator  # once: a swap may be taking it away
        draft_s = 0.0 if speculator is None else speculator.timeout_s * self._num_groups
        full_cache = self._pages.num_pages * self._pages.page_size
        return draft_s + float(self.cost_model.verify_seconds(self._max_batch_tokens, full_cache))

    def check(self) -> None:
        """Verifies that the pages of all sequences are theirs, suffice, and are all that is held.

        Takes time in proportion to the cache's pages.

        Raises:
            RuntimeError: otherwise.
        """
        sequences = self._sequences.values()
        self._pages.check([s.pages for s in sequences])
        for sequence in sequences:
            if len(sequence.pages) < self._pages.pages_for(sequence.num_computed_tokens):
                raise RuntimeError(f"{sequence.request.request_id} lacks pages of its context")

    def work_idle(self) -> bool:
        """Without requests: spends one pass at most on the cost model. Returns whether to go on."""
        if self._curve_keeper.improve():
            self.cost_model.replace_curve(self._curve_keeper.curve)
        return self._curve_keeper.is_mid_visit

    def keep_alive(self) -> None:
        """Tells idle shards that the engine is there."""
        self._runner.keep_alive()

    def close(self) -> None:
        """Ends the drafters' connections and lets the other shards stop."""
        if self._speculator is not None:
            self._speculator.close()
        self._runner.stop()

    def _end_marked(self) -> list[RequestOutput]:
        """Ends cancelled and overdue requests that are not in flight."""
        now = time.monotonic()
        outputs = []
        for sequence in list(self._sequences.values()):
            if sequence.end_error is None:
                sequence.end_error = sequence.overdue_error(now)
            if sequence.end_error is not None and not sequence.is_in_flight:
                outputs.append(self._end(sequence, error=sequence.end_error))
        return outputs

    def _launch_next(self) -> bool:
        """Starts the next group that has something to do. Returns whether there was one."""
        busy = {entry.group for entry in self._in_flight}
        for offset in range(self._num_groups):
            group = (self._next_group + offset) % self._num_groups
            if group in busy:
                continue
            drafts: dict[Sequence, tuple[int, ...]] = {}
            if self._speculator is not None:
                self._waited_s += self._speculator.collect(group)
                drafts = self._speculator.choose(group, self._scheduler)
            entries = self._scheduler.schedule(group, drafts)
            if entries:
                self._launch(group, entries)
                self._next_group = (group + 1) % self._num_groups
                return True
        return False

    def _clock(self) -> float:
        return time.monotonic() - self._waited_s

    def _make_speculator(
        self,
        speculative: SpeculativeConfig | None,
        draft_client: DraftClient | None,
        calibration: Calibration | None,
    ) -> Speculator | None:
        if speculative is None or draft_client is None:
            return None
        return Speculator(
            speculative,
            draft_client,
            calibration=calibration or Calibration(),
            cost_model=self.cost_model,
            read_features=self._read_features,
            max_model_len=self.max_model_len,
            stats=self._stats,
            num_stages=self._num_stages,
        )

    def _launch(self, group: int, entries: list[ScheduledSequence]) -> None:
        started_s = self._clock()
        step = flatten(entries, self._pages.page_size)
        promise = None
        if self._speculator is not None:
            num_sampling = sum(entry.samples for entry in entries)
            promise = self._speculator.promise(
                group, num_sampling, step.num_tokens, step.num_context_tokens
            )
        for entry in entries:
            entry.sequence.is_in_flight = True
        self._runner.launch(step)
        self._in_flight.append(_Pass(group, entries, step, started_s, promise))

    def _finish(self, done: _Pass) -> list[RequestOutput]:
        """Samples a pass's tokens, commits them, ends what is done and announces what goes on."""
        logits = take_prompt_scores(self._runner.collect(), done.entries)
        sampling = [entry for entry in done.entries if entry.samples]
        samples = iter(self._sampler.sample(logits, [e.sample_input for e in sampling]))
        outputs: list[RequestOutput] = []
        going_on: list[Sequence] = []
        for entry in done.entries:
            sequence = entry.sequence
            sequence.is_in_flight = False
            reason = None
            sample = next(samples) if entry.samples else None
            if sample is not None and sequence.check_grammar():
                output, reason = self._commit(entry, sample)
                outputs.append(output)
            else:
                sequence.num_computed_tokens += entry.num_tokens
            self._prefixes.keep(sequence, sequence.num_computed_tokens)
            if reason is not None:
                self._remove(sequence)
            elif sequence.end_error is None:
                going_on.append(sequence)
        finished = time.monotonic()
        num_tokens = sum(len(output.token_ids) for output in outputs)
        self._observe(done, num_tokens, finished - self._last_finish)
        self._last_finish = finished
        if self._speculator is not None:
            self._speculator.announce(done.group, going_on, self._scheduler)
        return outputs

    def _observe(self, done: _Pass, num_output_tokens: int, seconds: float) -> None:
        """Learns from a pass that ended ``seconds`` behind the one before it."""
        promise = done.promise
        if promise is None or promise.mode is not SpeculationMode.GROUPED:
            # Beside a drafter at work a pass may be slower, which says nothing of other passes.
            self.cost_model.observe_verify(
                done.step.num_tokens,
                self._clock() - done.started_s,
                num_context_tokens=done.step.num_context_tokens,
            )
        if promise is not None and self._speculator is not None:
            self._speculator.delivered(promise, num_output_tokens, seconds)

    def _regroup(self) -> None:
        """Goes over to as many groups as should take turns, once nothing is under way."""
        wanted = self._num_stages if self._speculator is None else self._speculator.num_groups
        if wanted == self._num_groups or self._in_flight:
            return
        if self._speculator is not None:
            for group in range(self._num_groups):
                self._waited_s += self._speculator.collect(group)
        self._scheduler.set_num_groups(wanted)
        self._num_groups, self._next_group = wanted, 0

    def _commit(
        self, entry: ScheduledSequence, sample: SampleOutput
    ) -> tuple[RequestOutput, FinishReason | None]:
        """Appends a sequence's new tokens, cut where it ends."""
        sequence = entry.sequence
        if self._speculator is not None:
            self._speculator.observe(entry, sample)
        offset = sequence.num_output_tokens
        reason = sequence.append(sample.token_ids, self._eos_token_ids)
        kept = sequence.num_output_tokens - offset
        accepted = min(sample.num_accepted_tokens, kept)
        sequence.num_computed_tokens += entry.num_tokens + accepted
        sequence.proposal = None
        self._pages.shrink(sequence.pages, len(sequence.token_ids))
        num_drafts = len(entry.draft_token_ids)
        sequence.stats.observe(num_drafts, accepted)
        self._stats.observe(num_drafts, accepted)
        while len(self._num_by_budget) <= num_drafts:
            self._num_by_budget.append(0)
        self._num_by_budget[num_drafts] += 1
        self._num_output_tokens += kept
        is_first = offset == len(sequence.request.resume_token_ids)
        if is_first:
            self._num_prompt_tokens += sequence.num_prompt_tokens
        output = RequestOutput(
            request_id=sequence.request.request_id,
            token_offset=offset,
            token_ids=sample.token_ids[:kept],
            token_sources=sample.token_sources[:kept],
            logprobs=sample.logprobs[:kept],
            prompt_logprobs=tuple(sequence.prompt_logprobs) if is_first else (),
            finish_reason=reason,
            usage=sequence.usage() if reason is not None else None,
        )
        return output, reason

    def _end(self, sequence: Sequence, *, error: Exception) -> RequestOutput:
        self._remove(sequence)
        return RequestOutput(
            request_id=sequence.request.request_id,
            token_offset=sequence.num_output_tokens,
            usage=sequence.usage(),
            error=error,
        )

    def _remove(self, sequence: Sequence) -> None:
        if self._speculator is not None:
            self._speculator.forget(sequence)
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request.request_id]

    def _read_features(self, ranges: list[tuple[Sequence, int, int]]) -> torch.Tensor:
        slots = feature_slots(ranges, self._pages.page_size)
        return self._runner.shard.gather_features(torch.from_numpy(slots))
