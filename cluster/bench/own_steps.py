"""Decode steps of our engine, timed one by one: a program for ``cluster.bench.step_server``.

Its argument is a JSON object, the ``args`` of a configuration.
"""

from __future__ import annotations

from typing import Any

from cluster.bench.local_engine import build_local_engine
from cluster.bench.peer_steps import StepProgram, serve
from cluster.config import ClusterConfig
from cluster.errors import RequestCancelledError
from cluster.request import Request, RequestOutput, SamplingParams


class OwnSteps(StepProgram):
    """Our engine in this process.

    Args:
        values: the ``args`` of a configuration.

    Raises:
        ConfigError, CheckpointError: the target cannot be served so.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self._engine = build_local_engine(ClusterConfig.parse(values), seed=0)

    def add_request(self, request_id: str, prompt: list[int], max_tokens: int) -> None:
        """As ``StepProgram``."""
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self._engine.add_request(
            Request(request_id=request_id, prompt_token_ids=tuple(prompt), sampling=sampling)
        )

    def step(self) -> list[RequestOutput]:
        """As ``StepProgram``."""
        return self._engine.step()

    def is_last(self, output: RequestOutput) -> bool:
        """As ``StepProgram``."""
        return output.is_last

    def drop_requests(self, request_ids: list[str]) -> None:
        """As ``StepProgram``."""
        for request_id in request_ids:
            self._engine.cancel(request_id, RequestCancelledError("measured"))
        while self._engine.has_work:
            self._engine.step()


if __name__ == "__main__":
    serve(OwnSteps)
