"""A server of the bench's own in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from types import TracebackType
from typing import Self

from cluster.errors import DsparkError

HOST = "127.0.0.1"


class PortProcess:
    """``python -m MODULE ARGUMENTS`` while a ``with`` block runs.

    The program prints the port on which it listens as its first line, and serves until its standard
    input ends.

    Args:
        what: it is called so in errors.
        module, arguments: of the program.

    Attributes:
        address: ``host:port``.

    Raises:
        DsparkError: it does not start; its error is on standard error.
    """

    def __init__(self, what: str, module: str, *arguments: str) -> None:
        self.address = ""
        self._what = what
        self._command = [sys.executable, "-m", module, *arguments]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line.strip().isdigit():
            self._process.kill()
            raise DsparkError(f"{self._what} does not start")
        self.address = f"{HOST}:{int(line)}"
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait()
