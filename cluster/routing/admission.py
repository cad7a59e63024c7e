"""How much work a router takes on, and when a client it refuses should come back."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from cluster.errors import InvalidRequestError, QueueFullError
from cluster.request import Priority

# Of the whole bound. What is less urgent leaves room for what is more.
SHARES = {Priority.INTERACTIVE: 1.0, Priority.DEFAULT: 0.9, Priority.BATCH: 0.5}

MIN_RETRY_S = 0.1
MAX_RETRY_S = 60.0
_UNKNOWN_RETRY_S = 1.0  # before anything was done
_RATE_WINDOW_S = 10.0


class Admission:
    """Bounds the tokens that admitted requests still need: prompts to compute, outputs to come.

    Guarantees: that sum never exceeds ``max_queued_tokens``, nor a priority's share of it when a
    request of that priority is admitted. What does not fit is refused at once, with a delay after
    which about as much will have been done as is too much now.

    Args:
        max_queued_tokens: the bound.
        clock: seconds.
        seed: of the jitter; unset: from the operating system.
    """

    def __init__(
        self,
        max_queued_tokens: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        self._max_queued_tokens = max_queued_tokens
        self._random = random.Random(seed)
        self._rate = _Rate(clock)
        self.num_queued_tokens = 0

    def admit(
        self, *, prompt_tokens: int, output_tokens: int, num_choices: int, priority: Priority
    ) -> Admitted:
        """Takes a request on.

        Args:
            prompt_tokens: of its prompt, with what exists of its output already.
            output_tokens: most that may follow, of each choice.

        Raises:
            QueueFullError: it does not fit now.
            InvalidRequestError: it never will.
        """
        bound = self._bound(priority)
        needed = num_choices * (prompt_tokens + output_tokens)
        if needed > bound:
            raise InvalidRequestError(
                "sampling.max_tokens",
                f"{num_choices} x ({prompt_tokens} prompt + {output_tokens} output) tokens are "
                f"more than the {bound} that this router queues at priority "
                f"{priority.name.lower()}",
            )
        excess = self.num_queued_tokens + needed - bound
        if excess > 0:
            raise QueueFullError(
                f"the request needs {needed} tokens; {self.num_queued_tokens} of {bound} are taken",
                self.retry_after_s(excess),
            )
        self.num_queued_tokens += needed
        return Admitted(self._release, prompt_tokens, output_tokens, num_choices)

    def check_fits(self, num_tokens: int, priority: Priority) -> None:
        """Checks that so much, of several requests, may be admitted at a time at all.

        Raises:
            InvalidRequestError: naming ``prompt``.
        """
        bound = self._bound(priority)
        if num_tokens > bound:
            raise InvalidRequestError(
                "prompt",
                f"the prompts and their longest outputs have {num_tokens} tokens, more than the "
                f"{bound} that this router queues at priority {priority.name.lower()}",
            )

    def retry_after_s(self, num_tokens: int, *, at_least_s: float = MIN_RETRY_S) -> float:
        """Seconds until about so many tokens will have been done, more by up to half at random, so
        that those who were refused together do not come back together."""
        rate = self._rate.per_second()
        delay_s = num_tokens / rate if rate > 0.0 else _UNKNOWN_RETRY_S
        delay_s = min(max(delay_s, at_least_s, MIN_RETRY_S), MAX_RETRY_S)
        return delay_s * self._random.uniform(1.0, 1.5)

    def _bound(self, priority: Priority) -> int:
        return int(self._max_queued_tokens * SHARES[priority])

    def _release(self, num_tokens: int) -> None:
        self.num_queued_tokens -= num_tokens
        self._rate.count(num_tokens)


class Admitted:
    """An admitted request's share of the queue, which shrinks as its tokens come; a context
    manager that gives back what is left of it."""

    def __init__(
        self,
        release: Callable[[int], None],
        prompt_tokens: int,
        output_tokens: int,
        num_choices: int,
    ) -> None:
        self._release = release
        self._prompt_tokens = prompt_tokens
        self._left = [prompt_tokens + output_tokens] * num_choices
        self._is_computed = [False] * num_choices

    def advance(self, choice_index: int, num_tokens: int) -> None:
        """So many output tokens of a choice have come."""
        if not num_tokens:
            return
        if not self._is_computed[choice_index]:
            self._is_computed[choice_index] = True
            num_tokens += self._prompt_tokens
        done = min(num_tokens, self._left[choice_index])
        self._left[choice_index] -= done
        self._release(done)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._release(sum(self._left))
        self._left = [0] * len(self._left)


class _Rate:
    """How much is done in a second, lately."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started_at = self._counted_at = clock()
        self._amount = 0.0  # each token counts for less as time passes

    def count(self, amount: float) -> None:
        """So much was done."""
        self._age()
        self._amount += amount

    def per_second(self) -> float:
        """The average, of which what is 10 s old weighs a third of what is new."""
        self._age()
        span_s = _RATE_WINDOW_S * -math.expm1(
            -(self._counted_at - self._started_at) / _RATE_WINDOW_S
        )
        return self._amount / span_s if span_s > 0.0 else 0.0

    def _age(self) -> None:
        now = self._clock()
        self._amount *= math.exp(-(now - self._counted_at) / _RATE_WINDOW_S)
        self._counted_at = now
