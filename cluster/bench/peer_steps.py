"""Decode steps of vLLM, timed one by one: a program for ``cluster.bench.step_server``.

Run with the peer's Python, which has no package of this project; so it imports none. Its argument
is a JSON object, the arguments of ``vllm.LLM``.
"""

import json
import os
import sys
import time
from typing import Any, Protocol


class StepProgram(Protocol):
    """What a step server does when told; results must be JSON values."""

    def fill(self, prompts: list[list[int]], max_tokens: int) -> None:
        """Starts a greedy request for each prompt, and computes until all of them decode."""

    def steps(self, count: int) -> list[float]:
        """Seconds of each of ``count`` further steps.

        Raises:
            RuntimeError: a step was not one token of every request.
        """

    def clear(self) -> None:
        """Drops all requests."""


class PeerSteps:
    """A ``StepProgram`` on vLLM's engine in this process. ``settings`` are those of ``LLM``."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM

        self._engine = LLM(disable_log_stats=True, **settings).llm_engine
        self._requests: list[str] = []
        self._num_started = 0

    def fill(self, prompts: list[list[int]], max_tokens: int) -> None:
        """As ``StepProgram``."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        for prompt in prompts:
            self._num_started += 1
            self._requests.append(str(self._num_started))
            self._engine.add_request(self._requests[-1], {"prompt_token_ids": prompt}, params)
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
            if len(outputs) != len(self._requests) or any(output.finished for output in outputs):
                raise RuntimeError("a step was not one token of every request")
        return seconds

    def clear(self) -> None:
        """As ``StepProgram``."""
        self._engine.abort_request(self._requests)
        self._engine.step()
        self._requests = []


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
