"""Ray nodes on the lab's hosts."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from cluster.bench.lab.host import Host
from cluster.bench.lab.network import Network
from cluster.errors import DsparkError

GCS_PORT = 6379
_START_TIMEOUT_S = 300.0
_STARTED = "Ray runtime started"
_POLL_S = 0.1
_OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes
# What Ray finds out by itself would be about the machine, which the hosts share.
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    # A host that is silent for about 4 s is lost; one that answers 1 s late is not.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


def ray_environment(network: Network) -> dict[str, str]:
    """What the environment of every process that talks to the lab's Ray must hold."""
    token = network.folder / "ray-token"
    if not token.exists():
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {
        **kept,
        **_ENVIRONMENT,
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(network.ray_folder),
    }


class RayNode:
    """One host's Ray: the head where no other head is given.

    Args:
        resources: custom ones that this host has.
        num_cpus: that it says it has.
        nice: how far its processes stand back, as of ``nice``, behind those of other hosts. Hosts
            share the machine's cores, and a part that starts takes seconds of them.
        head: the head's host.
    """

    def __init__(
        self,
        network: Network,
        host: Host,
        *,
        resources: Mapping[str, float],
        num_cpus: int = 4,
        nice: int = 0,
        head: Host | None = None,
    ) -> None:
        self.host = host
        self._network = network
        self._process: subprocess.Popen[bytes] | None = None
        self._log = network.folder / f"ray-{host.name}.log"
        self._command = [
            *("nice", f"--adjustment={nice}"),
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
            f"--node-ip-address={host.address}",
            f"--num-cpus={num_cpus}",
            f"--resources={json.dumps(dict(resources))}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            "--disable-usage-stats",
        ]
        if head is None:
            self._command += ["--head", f"--port={GCS_PORT}", "--include-dashboard=false"]
            self._command.append(f"--temp-dir={network.ray_folder}")
        else:
            self._command.append(f"--address={head.address}:{GCS_PORT}")

    @property
    def is_running(self) -> bool:
        """Whether it has been started, and not ended since."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts it, behind whatever is left of its predecessor."""
        self.kill()
        with self._log.open("wb") as log:
            self._process = self.host.start(
                self._command,
                environment=ray_environment(self._network),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def wait_started(self) -> None:
        """Waits until it has joined the others. Raises: DsparkError: it cannot."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline and self.is_running:
            if _STARTED in self._log.read_text(errors="replace"):
                return
            time.sleep(_POLL_S)
        raise DsparkError(f"Ray does not start on {self.host.name}: {_tail(self._log)}")

    def kill(self) -> None:
        """Kills everything of the host's Ray, at once."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        _kill_all(self.host)


def _kill_all(host: Host) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while host.send(signal.SIGKILL) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
