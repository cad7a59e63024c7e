"""One client's call: all its choices, as one stream of chunks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from cluster.request import Request
from cluster.routing.replica_picker import Prompt
from cluster.rpc.choice import Choice
from cluster.rpc.replica_pool import ReplicaPool
from cluster.rpc.siblings import Siblings
from cluster.v1 import inference_pb2

# gRPC ends a call by a clock of its own, which started a little before ours.
_DEADLINE_SLACK_S = 0.05


class Generation:
    """The choices of one request, run at the same time.

    Guarantees: chunks of one choice come in order; one chunk for each choice is held at most. The
    first choice that fails ends all of them, behind what was received. However ``chunks`` is left,
    nothing of the request runs on.

    Args:
        request: the validated request, as of its first choice.
        num_choices: n; choice i has ``choice_index`` i.
        tokenizer: turns tokens into the client's text.
        pool: where to run.
        eos_token_ids: tokens that end an output, unless the request ignores them.
        queue_timeout_s: unset, or how long a choice may wait on replicas before its first token.
        siblings: of all choices of the client's request, where there are more than these.

    Raises:
        InvalidRequestError: the resumed tokens hold a stop string already.
    """

    def __init__(
        self,
        request: Request,
        num_choices: int,
        tokenizer: PreTrainedTokenizerFast,
        pool: ReplicaPool,
        eos_token_ids: Collection[int] = (),
        queue_timeout_s: float | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        self.request = request
        self._changed = asyncio.Event()
        self._end_error: Exception | None = None
        resumed = request.resume_token_ids
        prompt = Prompt(
            [*request.prompt_token_ids, *resumed], request.sampling.max_tokens - len(resumed)
        )
        siblings = siblings or Siblings()
        self._choices: Sequence[Choice] = [
            Choice(
                replace(request, choice_index=index),
                tokenizer,
                pool,
                self._changed.set,
                eos_token_ids,
                siblings=siblings,
                prompt=prompt,
                queue_timeout_s=queue_timeout_s,
            )
            for index in range(num_choices)
        ]

    async def chunks(self) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Runs the request. Raises: what a choice failed with, or what ``end`` was given."""
        try:
            for choice in self._choices:
                choice.start()
            while True:
                # Before the chunks are taken: what ends a choice comes with or behind its last one.
                done = all(choice.done for choice in self._choices)
                error = next((choice.error for choice in self._choices if choice.error), None)
                for choice in self._choices:
                    chunk = choice.take()
                    if chunk is not None:
                        yield chunk
                if self._end_error is not None and not done:
                    raise self._end_error
                if error is not None:
                    raise error
                if done:
                    return
                await self._changed.wait()
                self._changed.clear()
        finally:
            deadline = self.request.deadline
            late = deadline is not None and time.monotonic() >= deadline - _DEADLINE_SLACK_S
            for choice in self._choices:
                choice.cancel("deadline" if late else "cancelled")

    def end(self, error: Exception) -> None:
        """Ends the call with ``error``, behind what has come, unless it is through by then."""
        self._end_error = error
        self._changed.set()
