"""A whole cluster on the lab's hosts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import yaml

from cluster.bench.lab.host import Host
from cluster.bench.lab.network import Network
from cluster.bench.lab.ray_node import GCS_PORT, RayNode, ray_environment
from cluster.errors import DsparkError

# Every part is a process that imports for seconds, and all hosts have the cores of one machine.
_START_TIMEOUT_S = 900.0


class LabHost(NamedTuple):
    """A host, its custom resources of Ray, and how ``nice`` its processes are to the other hosts';
    the first of several is the head."""

    name: str
    resources: Mapping[str, float]
    nice: int = 0


class LabCluster:
    """Ray on every host of a lab, and ``dspark up`` on its head, while a ``with`` block runs.

    Nodes that have ended are started again by ``tend``, as Kubernetes would.

    Args:
        hosts: the head first.
        document: a Ray Serve configuration, as ``dspark up`` takes it; routers must listen on all
            addresses.
        folder: for the configuration and logs.

    Attributes:
        network: to break links with.
        nodes: by host.
        address: of a router, as of the start.

    Raises:
        DsparkError: there is no lab, or the cluster does not start; names the log.
    """

    def __init__(self, hosts: Sequence[LabHost], document: Mapping[str, Any], folder: Path) -> None:
        self.network = Network([host.name for host in hosts])
        self.nodes: dict[str, RayNode] = {}
        self.address = ""
        self._hosts = hosts
        self._folder = folder
        self._config = folder / "lab-cluster.yaml"
        self._config.write_text(yaml.safe_dump(dict(document)), encoding="utf-8")
        self._log = folder / "lab-cluster.log"
        self._process: subprocess.Popen[str] | None = None

    @property
    def head(self) -> Host:
        """Where Ray's head and Serve's controller run."""
        return self.network.hosts[self._hosts[0].name]

    def __enter__(self) -> Self:
        self.network.__enter__()
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def tend(self, but: Collection[str] = ()) -> list[str]:
        """Starts again what has ended of Ray, ``but`` not on these hosts; returns where."""
        ended = [
            name for name, node in self.nodes.items() if name not in but and not node.is_running
        ]
        for name in ended:
            self.nodes[name].start()
        return ended

    def environment(self) -> dict[str, str]:
        """For processes on the lab's hosts that talk to Ray."""
        return {
            **ray_environment(self.network),
            "RAY_ADDRESS": f"{self.head.address}:{GCS_PORT}",
            "DSPARK_STATE_DIR": str(self.network.folder / "state"),
        }

    def _start(self) -> None:
        head = None
        for name, resources, nice in self._hosts:
            host = self.network.hosts[name]
            node = RayNode(self.network, host, resources=resources, nice=nice, head=head)
            self.nodes[name] = node
            node.start()
            if head is None:
                node.wait_started()
                head = host
        for node in self.nodes.values():
            try:
                node.wait_started()
            except DsparkError:  # Ray gives a node 30 s to start, which all together may take
                node.start()
                node.wait_started()
        command = [sys.executable, "-m", "cluster.cli", "up", str(self._config), "--json"]
        command += ["--timeout", str(_START_TIMEOUT_S)]
        with self._log.open("a") as log:
            process = self.head.start(
                command,
                environment=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._process = process
        line = process.stdout.readline() if process.stdout is not None else ""
        while line and not line.startswith("{"):  # of Ray's, which says what it says there too
            line = process.stdout.readline() if process.stdout is not None else ""
        ready = json.loads(line) if line else {}
        if "address" not in ready:
            raise DsparkError(f"the cluster does not start: {ready.get('error')} ({self._log})")
        self.address = ready["address"]

    def _stop(self) -> None:
        """The hosts go, and everything on them: nobody waits for a broken cluster to drain."""
        self.network.__exit__(None, None, None)
        if self._process is not None:
            self._process.communicate()
