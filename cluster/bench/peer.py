"""The peer's side of a comparison: vLLM from a virtual environment of its own (docs/bench.md)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.bench.step_server import StepServer
from cluster.errors import ConfigError, DsparkError

_START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.5
_STEPS_PROGRAM = Path(__file__).with_name("peer_steps.py")


@dataclass(frozen=True, kw_only=True)
class PeerSettings:
    """How the peer serves.

    Attributes:
        venv: its virtual environment.
        cores: that its worker is bound to.
        kv_cache_gb: memory of its cache.
    """

    venv: Path
    target: str
    dtype: str = "bfloat16"
    cores: tuple[int, ...] = (0, 1)
    max_model_len: int = 1024
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    kv_cache_gb: int = 2

    def check(self) -> None:
        """Raises ConfigError where there is no vLLM in the virtual environment."""
        if not (self.venv / "bin" / "vllm").exists():
            raise ConfigError("--peer-venv", f"has no bin/vllm: {self.venv} (docs/bench.md)")

    def environment(self) -> dict[str, str]:
        """Environment of a peer's process."""
        # The number of threads follows from the cores; one set for us would slow the peer down.
        variables = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        cores = ",".join(map(str, self.cores))
        variables |= {
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gb),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        # vLLM's own advice for x86: Intel's OpenMP, which comes with its CPU package.
        openmp = self.venv / "lib" / "libiomp5.so"
        if openmp.exists():
            variables["LD_PRELOAD"] = str(openmp)
        return variables

    def start_steps(self, log: Path) -> StepServer:
        """Its engine in one process, to be stepped. Raises: DsparkError."""
        self.check()
        settings = {
            "model": str(Path(self.target).resolve()),
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "distributed_executor_backend": "uni",
        }
        # What vLLM sets for a worker process of its own, which there is none of here.
        variables = self.environment() | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(len(self.cores)),
            "KMP_AFFINITY": "granularity=fine,explicit,proclist=["
            f"{','.join(map(str, self.cores))}]",
            "KMP_BLOCKTIME": "5",
            "KMP_TPAUSE": "0",
        }
        python = str(self.venv / "bin" / "python")
        return StepServer(
            # -P: the program's folder is no place to import from.
            [python, "-P", str(_STEPS_PROGRAM), json.dumps(settings)],
            variables,
            log,
        )


class PeerServer:
    """The peer's server in a process group of its own, which stands still while it is paused.

    Guarantees: behind ``close`` none of its processes lives.

    Args:
        settings: what it serves.
        speculative: vLLM's ``--speculative-config``; unset: plain decoding.
        log: file for what it prints.

    Raises:
        ConfigError: there is no vLLM in the virtual environment.
    """

    def __init__(
        self, settings: PeerSettings, speculative: Mapping[str, Any] | None, log: Path
    ) -> None:
        settings.check()
        self._log = log
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        with log.open("w") as file:
            self._process = subprocess.Popen(
                serve_command(settings, speculative, port),
                env=settings.environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # a process group, to be stopped and ended as one
            )

    def wait_ready(self, timeout_s: float = _START_TIMEOUT_S) -> None:
        """Waits until it serves. Raises: DsparkError, with the log's reason and name."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise DsparkError(f"the peer ended: {failure_in(self._log)} (log: {self._log})")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5.0):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(_POLL_S)
        raise DsparkError(f"the peer was not ready after {timeout_s:.0f} s (log: {self._log})")

    def pause(self) -> None:
        """Stops all its processes where they are."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Lets them go on."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """Ends all its processes."""
        for number in (signal.SIGCONT, signal.SIGTERM):
            self._signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_TIMEOUT_S)
        self._signal(signal.SIGKILL)  # also of those that outlive the first
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # none is left
            os.killpg(self._process.pid, number)


def serve_command(
    settings: PeerSettings, speculative: Mapping[str, Any] | None, port: int
) -> Sequence[str]:
    """The command line of the peer's OpenAI-compatible server."""
    command = [
        str(settings.venv / "bin" / "python"),
        # `vllm serve` asks for the version of a package `vllm`, which its CPU build is not.
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(Path(settings.target).resolve())),
        *("--dtype", settings.dtype),
        *("--max-model-len", str(settings.max_model_len)),
        *("--max-num-seqs", str(settings.max_num_seqs)),
        *("--max-num-batched-tokens", str(settings.max_num_batched_tokens)),
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
        *("--generation-config", "vllm"),
        *("--uvicorn-log-level", "warning"),
        "--disable-log-stats",
    ]
    if speculative is not None:
        command += ["--speculative-config", json.dumps(dict(speculative))]
    return command


def failure_in(log: Path) -> str:
    """The last line of a log that names an error, else its last line."""
    lines = log.read_text(errors="replace").strip().splitlines()
    errors = [line for line in lines if "Error:" in line]
    return (errors or lines or [""])[-1].strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
