"""A process that decodes step by step when told, so that two engines can be timed in turn."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.errors import DsparkError

_CLOSE_TIMEOUT_S = 30.0


class StepServer:
    """Runs a ``StepProgram`` (``cluster.bench.peer_steps``) in a process of its own.

    Guarantees: between two calls the process waits for input and computes nothing; behind ``close``
    it is gone.

    Args:
        command: with the program's argument.
        environment: the process's whole environment.
        log: file for what the process prints.

    Raises:
        DsparkError: here and in every call, when the process has ended; names the log.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self._read()

    def fill(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        """As ``StepProgram.fill``."""
        self._tell(do="fill", prompts=[list(prompt) for prompt in prompts], max_tokens=max_tokens)

    def steps(self, count: int) -> list[float]:
        """As ``StepProgram.steps``."""
        return [float(seconds) for seconds in self._tell(do="steps", count=count)]

    def clear(self) -> None:
        """As ``StepProgram.clear``."""
        self._tell(do="clear")

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _tell(self, **command: Any) -> Any:
        if self._process.stdin is None:
            raise RuntimeError("a step server has standard input")
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return self._read()

    def _read(self) -> Any:
        if self._process.stdout is None:
            raise RuntimeError("a step server has standard output")
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        return json.loads(line)["result"]

    def _failure(self) -> DsparkError:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return DsparkError(
            f"a process to be measured has ended: {lines[-1] if lines else ''} (log: {self._log})"
        )
