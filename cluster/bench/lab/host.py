"""One host of the lab: namespaces of its own, and what runs in them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from cluster.errors import DsparkError

_NAMESPACES = ("--net", "--uts", "--ipc", "--pid", "--mount")
_INIT = Path(__file__).with_name("host_init.py")
_PROC = Path("/proc")
_END_TIMEOUT_S = 10.0
_POLL_S = 0.02


class HostProcess(NamedTuple):
    """A process of a host: its id as this machine counts, and its command line."""

    pid: int
    command: str


class Host:
    """A host with a name, an address, processes and shared memory of its own.

    Guarantees: nothing of it outlives ``close``, or the process that made it.

    Args:
        name: of the host.
        address: IPv4, which ``network.Network`` gives it.
        binds: (source, target) files or folders that this host sees otherwise than the machine.

    Raises:
        DsparkError: the machine does not allow it; says why.
    """

    def __init__(self, name: str, address: str, binds: Sequence[tuple[Path, Path]] = ()) -> None:
        self.name = name
        self.address = address
        command = ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "--kill-child=KILL"]
        command += [sys.executable, "-I", "-S", str(_INIT)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        settings = {
            "name": name,
            "binds": [[str(source), str(target)] for source, target in binds],
            "tmpfs": ["/dev/shm"],
        }
        self._write(json.dumps(settings))
        if self._process.stdout is None or self._process.stdout.readline() != "ready\n":
            _, problem = self._process.communicate()
            raise DsparkError(f"host {name} cannot be made: {problem.strip()}")
        self.pid = self._init_pid()
        self._namespace = os.readlink(f"/proc/{self.pid}/ns/pid")

    def start(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Starts a command here; options as of ``subprocess.Popen``.

        What is returned is this machine's end of it: ``send`` reaches the command itself.
        """
        enter = ["nsenter", f"--target={self.pid}", *_NAMESPACES, f"--wd={os.getcwd()}", "--"]
        return subprocess.Popen([*enter, *command], env=environment, **options)

    def run(self, *command: str) -> None:
        """Runs a command here to its end. Raises: DsparkError: it fails."""
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output, _ = process.communicate()
        if process.returncode != 0:
            raise DsparkError(f"{' '.join(command)} on {self.name}: {output.strip()}")

    def processes(self, wanted: str = "") -> list[HostProcess]:
        """What runs here and has ``wanted`` in its command line, but for the host's own."""
        found = []
        for entry in _PROC.iterdir():
            if not entry.name.isdecimal() or int(entry.name) == self.pid:
                continue
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if os.readlink(entry / "ns/pid") != self._namespace:
                    continue
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                if command and wanted in command:  # what has ended has none
                    found.append(HostProcess(int(entry.name), command))
        return sorted(found)

    def send(self, number: signal.Signals, wanted: str = "") -> list[HostProcess]:
        """Sends a signal to what ``processes`` finds, and returns that."""
        found = self.processes(wanted)
        for process in found:
            self.send_to(process, number)
        return found

    def send_to(self, process: HostProcess, number: signal.Signals) -> None:
        """Sends a signal to a process of this host, if it still lives."""
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{process.pid}/ns/pid") == self._namespace:
                os.kill(process.pid, number)

    def close(self) -> None:
        """Ends everything here, at once."""
        self._process.kill()  # and with it its child, the host's first process
        self._process.communicate()
        deadline = time.monotonic() + _END_TIMEOUT_S
        while (_PROC / str(self.pid)).exists() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _init_pid(self) -> int:
        (child,) = (
            _PROC.joinpath(str(self._process.pid), "task", str(self._process.pid), "children")
            .read_text()
            .split()
        )
        return int(child)

    def _write(self, line: str) -> None:
        stdin: IO[str] | None = self._process.stdin
        if stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # what it says instead is read behind this
                stdin.write(line + "\n")
                stdin.flush()
