"""Starting and stopping one cluster from a driver process, for the command line."""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve._private.client import ServeControllerClient
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from cluster.actors.discovery import list_replicas
from cluster.actors.names import ROUTER
from cluster.config import ClusterConfig
from cluster.errors import ClusterStateError, ConfigError, DsparkError, RayStartError

_POLL_S = 0.1
# Serve builds the application in a task that asks for one.
_BUILD_CPUS = 1.0
# What a part may need behind its drain to close what it holds.
_CLOSE_S = 10.0
# Ray hands a start-up error on as text; ours begin with their class.
_OUR_ERROR = re.compile(r"cluster\.errors\.(\w+): (.+)")
# Ray's, of no class of its own: its node has 30 s, whatever else the machine does.
_RAY_IS_LATE = "The current node timed out during startup"

_logger = logging.getLogger(__name__)


class LaunchedCluster:
    """A Serve application of ours, on a Ray that was started for it or that ``RAY_ADDRESS`` names.

    Guarantees: ``stop`` drains and removes the application and ends what was started here, and
    nothing else; a Ray cluster that was there before stays. Used as a context manager it stops on
    every way out.
    """

    def __init__(self, document: dict[str, Any], config: ClusterConfig, temp_dir: Path) -> None:
        """Deploys; does not wait for the parts.

        Args:
            document: a Ray Serve configuration with one application, as ``load_serve_config``
                returns it.
            config: the parsed ``args`` of that application.
            temp_dir: folder for Ray's files when it is started here; its path must be short.

        Raises:
            ConfigError: Serve refuses the configuration.
            ClusterStateError: an application of that name runs already.
            RayStartError: Ray was too slow; processes of it may be left.
        """
        try:
            schema = ServeDeploySchema.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ConfigError(key, first["msg"]) from None
        self._app_name = schema.applications[0].name
        self._drain_timeout_s = config.drain_timeout_s
        self._owns_ray = "RAY_ADDRESS" not in os.environ
        self._owns_serve = False
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            _connect(config, temp_dir)
            self._deploy(schema)
        except BaseException:
            ray.shutdown()
            raise

    def __enter__(self) -> LaunchedCluster:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def ray_address(self) -> str:
        """``host:port`` of the Ray cluster."""
        return ray.get_runtime_context().gcs_address

    def wait_running(self, timeout_s: float) -> str:
        """Waits until Serve calls every deployment running.

        Returns:
            The address (``host:port``) of a router.

        Raises:
            ConfigError: a part refuses the configuration or a checkpoint.
            ClusterStateError: a part failed to start otherwise, or it took too long.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = serve.status().applications[self._app_name]
            if status.status == ApplicationStatus.RUNNING:
                return list_replicas(self._app_name, ROUTER)[0].address
            messages = {
                name: deployment.message
                for name, deployment in status.deployments.items()
                if "failed to start" in deployment.message
            }
            if messages or status.status == ApplicationStatus.DEPLOY_FAILED:
                raise _start_error(messages or {self._app_name: status.message})
            time.sleep(_POLL_S)
        raise ClusterStateError(f"not every part was running within {timeout_s:.0f} s")

    def stop(self) -> None:
        """Drains and removes the application, then ends what was started here."""
        if not ray.is_initialized():
            return
        try:
            self._delete_application()
            if self._owns_serve and not self._owns_ray:
                serve.shutdown()
        finally:
            ray.shutdown()

    def _delete_application(self) -> None:
        """Serve stops routers, targets and drafters one after the other, each with its drain."""
        deadline = time.monotonic() + 3 * (self._drain_timeout_s + _CLOSE_S)
        _serve_client().delete_apps([self._app_name], blocking=False)
        while self._app_name in serve.status().applications:
            if time.monotonic() > deadline:
                _logger.warning("%s has not stopped in time", self._app_name)
                return
            time.sleep(_POLL_S)

    def _deploy(self, schema: ServeDeploySchema) -> None:
        self._owns_serve = _get_global_client(raise_if_no_controller_running=False) is None
        serve.start(
            proxy_location=schema.proxy_location, http_options=schema.http_options.model_dump()
        )
        if self._app_name in serve.status().applications:
            raise ClusterStateError(f"a Serve application named {self._app_name!r} runs already")
        _serve_client().deploy_apps(schema)


def _serve_client() -> ServeControllerClient:
    """The way to deploy a configuration; the public interface only takes Python objects."""
    client = _get_global_client()
    if client is None:
        raise ClusterStateError("Serve does not run")
    return client


def _connect(config: ClusterConfig, temp_dir: Path) -> None:
    """Connects to the Ray cluster of ``RAY_ADDRESS``, or starts one that ends with this process.

    Raises:
        ClusterStateError: there is none at that address.
        RayStartError: the one to be started was too slow.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ClusterStateError(
                f"RAY_ADDRESS: {error} (one that wants a token needs RAY_AUTH_MODE=token here too)"
            ) from None
        return
    # Ray runs workers as background work; ours answer people.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        ray.init(
            address="local",
            # Ray counts CPUs but does not divide them: a small machine's parts share what there is.
            num_cpus=max(os.cpu_count() or 1, math.ceil(_required_cpus(config))),
            # The names of other nodes' pools: here they are all this one.
            resources=_required_resources(config),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(temp_dir),
        )
    except Exception as error:
        if str(error).startswith(_RAY_IS_LATE):
            raise RayStartError("Ray's node did not start in time") from None
        raise


def _required_cpus(config: ClusterConfig) -> float:
    target = config.target
    required = target.highest * target.num_shards * target.num_cpus
    # In a rollout the new ones start beside the old ones.
    required += 2 * config.router.num_replicas * config.router.num_cpus
    if config.has_drafters:
        required += config.drafter.highest * config.drafter.num_cpus
    return required + _BUILD_CPUS


def _required_resources(config: ClusterConfig) -> dict[str, float]:
    target = config.target
    required: Counter[str] = Counter()
    for resources, count in (
        (target.resources, target.highest * target.num_shards),
        (config.router.resources, 2 * config.router.num_replicas),
        (config.drafter.resources, config.drafter.highest if config.has_drafters else 0),
    ):
        for name, amount in resources.items():
            required[name] += math.ceil(amount * count)
    return {name: float(count) for name, count in required.items()}


def _start_error(messages: dict[str, str]) -> DsparkError:
    """What to tell about the first part that failed: our own error's text, else the last line."""
    part, message = next(iter(messages.items()))
    if ours := _OUR_ERROR.findall(message):
        kind, text = ours[-1]
        if kind in ("ConfigError", "CheckpointError"):
            key, _, problem = text.partition(": ")
            return ConfigError(key, problem)
        return ClusterStateError(f"{part} cannot start: {text}")
    lines = [line for line in message.splitlines() if line.strip()]
    return ClusterStateError(f"{part} cannot start: {lines[-1] if lines else 'no reason given'}")
