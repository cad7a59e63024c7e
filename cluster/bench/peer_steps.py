"""Decode steps of vLLM, timed one by one: a program for ``cluster.bench.step_server``.

Run with the peer's Python, which has no package of this project; so it imports none. Its argument
is a JSON object, the arguments of ``vllm.LLM``.
"""

import abc
import json
import os
import sys
import time
from typing import Any


class StepProgram(abc.ABC):
    """Decodes a batch of requests step by step; subclasses say on which engine.

    Greedy requests that do not end by themselves.
    """

    def __init__(self) -> None:
        self._requests: list[str] = []
        self._num_started = 0

    def fill(self, prompts: list[list[int]], max_tokens: int) -> None:
        """Starts a request for each prompt, and computes until all of them decode."""
        for prompt in prompts:
            self._num_started += 1
            self._requests.append(str(self._num_started))
            self.add_request(self._requests[-1], prompt, max_tokens)
        waiting = set(self._requests)
        while waiting:
            waiting -= {output.request_id for output in self.step()}

    def steps(self, count: int) -> list[float]:
        """Seconds of each of ``count`` further steps.

        Raises:
            RuntimeError: a step was not one token of every request.
        """
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            outputs = self.step()
            seconds.append(time.perf_counter() - started)
            if len(outputs) != len(self._requests) or any(self.is_last(o) for o in outputs):
                raise RuntimeError("a step was not one token of every request")
        return seconds

    def clear(self) -> None:
        """Drops all requests."""
        self.drop_requests(self._requests)
        self._requests = []

    @abc.abstractmethod
    def add_request(self, request_id: str, prompt: list[int], max_tokens: int) -> None:
        """Queues a request."""

    @abc.abstractmethod
    def step(self) -> list[Any]:
        """One step of the engine; an output, with its ``request_id``, for each token."""

    @abc.abstractmethod
    def is_last(self, output: Any) -> bool:
        """Whether the request has ended with it."""

    @abc.abstractmethod
    def drop_requests(self, request_ids: list[str]) -> None:
        """Ends requests early."""


class PeerSteps(StepProgram):
    """vLLM's engine in this process. ``settings`` are those of ``LLM``."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM

        super().__init__()
        self._engine = LLM(disable_log_stats=True, **settings).llm_engine

    def add_request(self, request_id: str, prompt: list[int], max_tokens: int) -> None:
        """As ``StepProgram``."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        self._engine.add_request(request_id, {"prompt_token_ids": prompt}, params)

    def step(self) -> list[Any]:
        """As ``StepProgram``."""
        return list(self._engine.step())

    def is_last(self, output: Any) -> bool:
        """As ``StepProgram``."""
        return bool(output.finished)

    def drop_requests(self, request_ids: list[str]) -> None:
        """As ``StepProgram``."""
        self._engine.abort_request(request_ids)
        self._engine.step()


def serve(make_program: Any) -> None:
    """Does what standard input says, a JSON line a command, until it ends.

    A command is ``{"do": METHOD, ...its arguments}``; the answer is one line ``{"result": ...}``.
    The first line says that the program is ready. Whatever else is printed goes to standard error.

    Args:
        make_program: makes the ``StepProgram`` from the first argument's JSON object.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    program = make_program(json.loads(sys.argv[1]))
    print(json.dumps({"result": "ready"}), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        result = getattr(program, command.pop("do"))(**command)
        print(json.dumps({"result": result}), file=answers)


if __name__ == "__main__":
    serve(PeerSteps)
