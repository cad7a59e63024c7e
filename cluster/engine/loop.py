"""Runs an engine in a thread of its own, so that its steps wait for nobody."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from cluster.config import SpeculativeConfig
from cluster.engine.draft_client import DraftClient
from cluster.engine.engine import Engine
from cluster.engine.grammar import GrammarMatcher
from cluster.engine.load import EngineLoad
from cluster.errors import DsparkError, ReplicaLostError
from cluster.request import Request, RequestOutput
from cluster.routing.prefix_journal import PrefixJournal
from cluster.speculation.calibration import Calibration

logger = logging.getLogger(__name__)

_KEEP_ALIVE_S = 5.0
_IDLE_WAIT_S = 0.5

OnOutputs = Callable[[list[RequestOutput]], None]


@dataclass(frozen=True)
class _Cancellation:
    """A request that is to end with ``error``."""

    request_id: str
    error: Exception


@dataclass(frozen=True)
class _Swap:
    """Another drafter, for the next time that no pass is about to start."""

    speculative: SpeculativeConfig | None
    draft_client: DraftClient | None
    calibration: Calibration | None
    done: Future[None] = field(default_factory=Future)


@dataclass(frozen=True)
class _Constrained:
    """A request with its compiled grammar, or with what is wrong with that."""

    request: Request
    grammar: GrammarMatcher | None = None
    error: Exception | None = None


_Message = Request | _Constrained | _Cancellation | _Swap


def _request_of(message: Request | _Constrained) -> Request:
    return message if isinstance(message, Request) else message.request


def _lost(request_id: str, reason: str) -> RequestOutput:
    return RequestOutput(request_id=request_id, token_offset=0, error=ReplicaLostError(reason))


class EngineLoop:
    """The engine's thread and its thread-safe door.

    Every submitted request ends in exactly one last output, also when it is refused (then that is
    its only one) and when the engine fails (then ``ReplicaLostError``). ``failure`` tells what
    broke the engine; nothing is served behind that. Grammars are compiled in a thread of their own.

    Args:
        engine: not to be touched by anyone else from now on.
        on_outputs: called in the engine's thread once a step; must return quickly and not raise.
    """

    def __init__(self, engine: Engine, on_outputs: OnOutputs) -> None:
        self.engine = engine
        self.failure: BaseException | None = None
        self.last_progress = time.monotonic()
        self._on_outputs = on_outputs
        self._inbox: deque[_Message] = deque()
        self._active: set[str] = set()
        self._wake = threading.Condition()
        self._stopping = False
        self._end_reason: str | None = None
        self._num_taken_in = 0
        self._load = engine.load()
        # One, so that a cancellation cannot overtake its request.
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiling: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Ends the thread after its step; what is unfinished gets ``ReplicaLostError``."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, request: Request) -> None:
        """Hands over a request; every answer, refusals included, comes through ``on_outputs``."""
        if request.sampling.grammar is None:
            self._post(request)
            return
        with self._wake:
            self._compiling.add(request.request_id)
        try:
            self._compiler.submit(self._compile, request)
        except RuntimeError:  # the engine has ended, and so has its compiler
            self._post(request)

    def cancel(self, request_id: str, error: Exception) -> None:
        """Ends a request with ``error`` before the next pass; unknown ids are ignored."""
        cancellation = _Cancellation(request_id, error)
        with self._wake:
            is_compiling = request_id in self._compiling
        if not is_compiling:
            self._post(cancellation)
            return
        with contextlib.suppress(RuntimeError):  # the engine has ended: so has the request
            self._compiler.submit(self._post, cancellation)

    def swap_drafter(
        self,
        speculative: SpeculativeConfig | None,
        draft_client: DraftClient | None,
        calibration: Calibration | None = None,
    ) -> Future[None]:
        """Goes over to another drafter between two passes; see ``Engine.swap_drafter``.

        Returns:
            Done when the former drafter is used no more; ``ReplicaLostError`` when the engine ends
            before.
        """
        swap = _Swap(speculative, draft_client, calibration)
        with self._wake:
            reason = self._end_reason
            if reason is None:
                self._inbox.append(swap)
                self._wake.notify()
        if reason is not None:
            swap.done.set_exception(ReplicaLostError(reason))
        return swap.done

    def load(self) -> EngineLoad:
        """The load after the last step."""
        return self._load

    @property
    def prefix_journal(self) -> PrefixJournal:
        """What the prefix cache can find."""
        return self.engine.prefix_journal

    def predicted_step_s(self) -> float:
        """Seconds that the longest step is expected to take, for watchdogs."""
        return self.engine.predicted_step_s()

    def _post(self, message: Request | _Constrained | _Cancellation) -> None:
        with self._wake:
            reason = self._end_reason
            if reason is None:
                self._inbox.append(message)
                self._wake.notify()
        if reason is not None and not isinstance(message, _Cancellation):
            self._on_outputs([_lost(_request_of(message).request_id, reason)])

    def _compile(self, request: Request) -> None:
        try:
            message = _Constrained(request, self.engine.grammars.matcher(request))
        except Exception as error:  # of this request alone, whatever it is
            message = _Constrained(request, error=error)
        self._post(message)
        with self._wake:
            self._compiling.discard(request.request_id)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
            self._fail_all("the replica is shutting down")
        except BaseException as error:
            self.failure = error
            logger.exception("the engine failed")
            self._fail_all(f"the engine failed: {type(error).__name__}")
        finally:
            self._close_engine()

    def _turn(self) -> None:
        while self._inbox:
            self._deliver(self._take_in(self._inbox.popleft()))
        if self.engine.has_work:
            outputs = self.engine.step()
            self._update_load()
            self.last_progress = time.monotonic()
            self._deliver(outputs)
        else:
            self._wait()

    def _wait(self) -> None:
        """Waits until something is posted. When that takes longer, checks the engine once, then
        keeps the shards company and the cost model current, one pass at a time, so that a request
        waits for one at most.
        """
        if self._is_posted(_IDLE_WAIT_S):
            return
        self.engine.check()
        last_sign = time.monotonic()
        pause_s = 0.0
        while not self._is_posted(pause_s):
            pause_s = 0.0 if self.engine.work_idle() else _IDLE_WAIT_S
            self._update_load()  # drafters come and go without any step
            self.last_progress = time.monotonic()
            if self.last_progress - last_sign > _KEEP_ALIVE_S:
                self.engine.keep_alive()
                last_sign = self.last_progress

    def _is_posted(self, timeout_s: float) -> bool:
        """Waits for something to do, at most ``timeout_s``."""
        with self._wake:
            return self._wake.wait_for(lambda: bool(self._inbox) or self._stopping, timeout_s)

    def _take_in(self, message: _Message) -> list[RequestOutput]:
        if isinstance(message, _Swap):
            return self._swap(message)
        if isinstance(message, _Cancellation):
            self.engine.cancel(message.request_id, message.error)
            return []
        self._num_taken_in += 1
        request, grammar = _request_of(message), None
        if isinstance(message, _Constrained):
            if message.error is not None:
                return [
                    RequestOutput(
                        request_id=request.request_id, token_offset=0, error=message.error
                    )
                ]
            grammar = message.grammar
        try:
            self.engine.add_request(request, grammar)
        except DsparkError as error:
            return [RequestOutput(request_id=request.request_id, token_offset=0, error=error)]
        self._active.add(request.request_id)
        return []

    def _update_load(self) -> None:
        self._load = replace(self.engine.load(), num_taken_in=self._num_taken_in)

    def _swap(self, swap: _Swap) -> list[RequestOutput]:
        if not swap.done.set_running_or_notify_cancel():
            return []
        try:
            outputs = self.engine.swap_drafter(
                swap.speculative, swap.draft_client, swap.calibration
            )
        except BaseException as error:
            swap.done.set_exception(error)
            raise
        swap.done.set_result(None)
        return outputs

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        if not outputs:
            return
        self._active.difference_update(o.request_id for o in outputs if o.is_last)
        self._on_outputs(outputs)

    def _fail_all(self, reason: str) -> None:
        with self._wake:
            self._end_reason = reason
        waiting = [
            _request_of(m).request_id for m in self._inbox if isinstance(m, Request | _Constrained)
        ]
        for message in self._inbox:
            # One that nobody waits for any more takes no exception.
            if isinstance(message, _Swap) and message.done.set_running_or_notify_cancel():
                message.done.set_exception(ReplicaLostError(reason))
        self._inbox.clear()
        self._deliver([_lost(request_id, reason) for request_id in [*waiting, *self._active]])

    def _close_engine(self) -> None:
        self._compiler.shutdown(wait=False)
        try:
            self.engine.close()
        except Exception:
            logger.exception("the engine did not close cleanly")
