"""A cluster that lives as long as a ``with`` block of this process."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from cluster.cli.http_door import check_port, http_url, wait_http
from cluster.cli.processes import end_processes, find_descendants, wait_gone
from cluster.config import ClusterConfig
from cluster.errors import (
    ClusterStateError,
    ConfigError,
    DeadlineExceededError,
    RayStartError,
    ReplicaLostError,
)
from cluster.scaling_config import ReplicaRange

if TYPE_CHECKING:
    from cluster.actors.launch import LaunchedCluster

_POLL_S = 0.1
_END_TIMEOUT_S = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunningCluster:
    """Starts a cluster on entering, with every part ready, and stops it on leaving.

    Guarantees: behind the block nothing that it started lives any more, whatever happened inside;
    SIGTERM leaves the block as Ctrl-C does, while the cluster is being stopped both are ignored,
    and behind the block both do what they did before. Ray's log files are removed, except after a
    failed start.
    """

    def __init__(
        self,
        document: dict[str, Any],
        config: ClusterConfig,
        *,
        timeout_s: float,
        report: Callable[[str], None],
    ) -> None:
        """
        Args:
            document: the Serve configuration, from ``load_serve_config``.
            config: the same, parsed.
            timeout_s: how long the start may take.
            report: takes one line of progress.
        """
        self.address = ""
        self.ray_address = ""
        self.http_url = http_url(document)
        # Sockets live below it, and their paths may have about 100 characters.
        self.temp_dir = Path(tempfile.mkdtemp(prefix="dspark-", dir=_short_temp_dir()))
        self.startup_s = 0.0
        self._document = document
        self._config = config
        self._timeout_s = timeout_s
        self._say = report
        self._started = time.monotonic()
        self._cluster: LaunchedCluster | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> RunningCluster:
        check_credentials(self._config)
        self._started = time.monotonic()
        deadline = self._started + self._timeout_s
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._handlers[number] = signal.getsignal(number)
        _raise_on_sigterm()
        try:
            self._start(deadline)
        except BaseException as error:
            self._stop(keep_logs=isinstance(error, ClusterStateError))
            raise
        self.startup_s = time.monotonic() - self._started
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop(keep_logs=False)

    def _report(self, what: str) -> None:
        self._say(f"{time.monotonic() - self._started:5.1f} s  {what}")

    def _start(self, deadline: float) -> None:
        self._report("starting Ray and Serve")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        is_here = "RAY_ADDRESS" not in os.environ
        if is_here:
            check_port(self._document)
        try:
            self._cluster = self._launch()
        except SystemExit:  # what Ray's own handler makes of SIGTERM
            raise KeyboardInterrupt from None
        _raise_on_sigterm()  # Ray has put a handler of its own there
        self._report("starting router, target shards and drafters")
        self.ray_address = self._cluster.ray_address
        self.address = self._cluster.wait_running(deadline - time.monotonic())
        self._report("waiting for every part to be ready")
        wait_ready(self.address, self._config, deadline)
        if is_here and self.http_url is not None:
            wait_http(self.http_url, deadline)

    def _launch(self) -> LaunchedCluster:
        """A busy machine may be slower than Ray allows its own node: once more, then."""
        from cluster.actors.launch import LaunchedCluster

        others = set(find_descendants(os.getpid()))
        try:
            return LaunchedCluster(self._document, self._config, self.temp_dir)
        except RayStartError as error:
            self._report(f"{error}: once more")
            end_processes(set(find_descendants(os.getpid())) - others)
            return LaunchedCluster(self._document, self._config, self.temp_dir)

    def _stop(self, *, keep_logs: bool) -> None:
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)
        children = find_descendants(os.getpid())
        if self._cluster is not None:
            self._report("draining and stopping")
            self._cluster.stop()
            wait_gone(children, _END_TIMEOUT_S)
        end_processes(children)
        if keep_logs:
            self._report(f"Ray's logs are in {self.temp_dir}")
        else:
            shutil.rmtree(self.temp_dir, ignore_errors=True)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def wait_ready(address: str, config: ClusterConfig, deadline: float) -> None:
    """Waits until the router knows every replica as ready, and each replica every drafter.

    Where their number follows the load it may have changed by now: then there must be one, or as
    many as there are at least (no drafter where there need not be any at start).

    Args:
        address: the router's.
        config: says how many of each there must be.
        deadline: a ``time.monotonic()`` value.

    Raises:
        ClusterStateError: not by then; says what is missing.
    """
    from cluster.rpc.client import Client

    num_replicas = _fewest(config.target)
    num_drafters = _fewest(config.drafter) if config.has_drafters else 0
    missing = "the router does not answer"
    with Client(address) as client:
        while time.monotonic() < deadline:
            try:
                status = client.status()
            except (ClusterStateError, ReplicaLostError, DeadlineExceededError):
                time.sleep(_POLL_S)
                continue
            ready = [replica for replica in status.replicas if replica.state == "ready"]
            drafters = [
                sum(drafter.state == "ready" for drafter in replica.drafters) for replica in ready
            ]
            if len(ready) >= num_replicas and min(drafters) >= num_drafters:
                return
            missing = (
                f"{len(ready)} of {num_replicas} target replicas are ready, "
                f"with {drafters} of {num_drafters} drafters each"
            )
            time.sleep(_POLL_S)
    raise ClusterStateError(f"not every part was ready in time: {missing}")


def _fewest(part: ReplicaRange) -> int:
    return max(part.lowest, min(part.initial, 1))


def check_credentials(config: ClusterConfig) -> None:
    """Looks whether this process will be let in by the cluster, before that is started.

    Raises:
        ConfigError: the environment (``Credentials.from_environment``) lacks what ``security``
            asks for, or a file of either cannot be used.
        UnauthenticatedError: the API key in it is not one of the cluster's.
    """
    security = config.security
    if security.client_tls is None and security.api_keys_file is None:
        return
    from cluster.rpc.credentials import Credentials
    from cluster.security.authenticator import Authenticator

    credentials = Credentials.from_environment()
    if security.client_tls is not None and credentials.tls is None:
        raise ConfigError(
            "DSPARK_TLS_CA_FILE", "must name the authority of security.client_tls' certificate"
        )
    # On another machine's Ray cluster the file is there and not here.
    if security.api_keys_file is not None and Path(security.api_keys_file).exists():
        if not credentials.api_key:
            raise ConfigError("DSPARK_API_KEY", "must hold one of security.api_keys_file's keys")
        Authenticator(security.api_keys_file).authenticate(f"Bearer {credentials.api_key}")


def report_to_stderr(line: str) -> None:
    """Progress for a user who waits; standard output is for results."""
    print(f"dspark: {line}", file=sys.stderr, flush=True)


def _short_temp_dir() -> str:
    usual = tempfile.gettempdir()
    return usual if len(usual) <= 30 else "/tmp"


def _raise_on_sigterm() -> None:
    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
