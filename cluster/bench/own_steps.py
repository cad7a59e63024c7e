"""Decode steps of our engine, timed one by one: a program for ``cluster.bench.step_server``.

Its argument is a JSON object, the ``args`` of a configuration.
"""

from __future__ import annotations

import time
from typing import Any

from cluster.bench.local_engine import build_local_engine
from cluster.bench.peer_steps import serve
from cluster.config import ClusterConfig
from cluster.errors import RequestCancelledError
from cluster.request import Request, SamplingParams


class OwnSteps:
    """A ``StepProgram`` on our engine in this process.

    Raises:
        ConfigError, CheckpointError: the target cannot be served so.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._engine = build_local_engine(ClusterConfig.parse(values), seed=0)
        self._requests: list[str] = []
        self._num_started = 0

    def fill(self, prompts: list[list[int]], max_tokens: int) -> None:
        """As ``StepProgram``."""
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        for prompt in prompts:
            self._num_started += 1
            self._requests.append(str(self._num_started))
            self._engine.add_request(
                Request(
                    request_id=self._requests[-1], prompt_token_ids=tuple(prompt), sampling=sampling
                )
            )
        waiting = set(self._requests)
        while waiting:
            waiting -= {output.request_id for output in self._engine.step()}

    def steps(self, count: int) -> list[float]:
        """As ``StepProgram``."""
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            outputs = self._engine.step()
            seconds.append(time.perf_counter() - started)
            if len(outputs) != len(self._requests) or any(output.is_last for output in outputs):
                raise RuntimeError("a step was not one token of every request")
        return seconds

    def clear(self) -> None:
        """As ``StepProgram``."""
        for request_id in self._requests:
            self._engine.cancel(request_id, RequestCancelledError("measured"))
        while self._engine.has_work:
            self._engine.step()
        self._requests = []


if __name__ == "__main__":
    serve(OwnSteps)
