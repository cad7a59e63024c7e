"""Changing the drafter of a running cluster from a driver process, for the command line."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema

from cluster.actors.discovery import list_replicas
from cluster.actors.drafter_choice import DrafterInUse, to_user_config, with_user_config
from cluster.actors.names import DRAFTER, ROUTER, TARGET_REPLICA
from cluster.config import ClusterConfig, SpeculativeConfig
from cluster.errors import ClusterStateError, ConfigError

_POLL_S = 0.2
_SWAPPED = (DRAFTER, TARGET_REPLICA)


class RunningApplication:
    """A Serve application of ours that another process has started. Use as a context manager.

    Guarantees: a swap restarts nothing; one that some part cannot follow is taken back, and leaves
    what was in use.

    Args:
        ray_address: ``host:port`` of the Ray cluster.
        name: of the application.

    Raises:
        ClusterStateError: there is no such cluster, or no such application on it.
    """

    def __init__(self, ray_address: str, name: str) -> None:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            ray.init(address=ray_address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ClusterStateError(
                f"{error} (one that wants a token needs RAY_AUTH_MODE=token here too)"
            ) from None
        self._name = name
        try:
            client = _get_global_client(raise_if_no_controller_running=False)
            deployed = {} if client is None else client.get_serve_details()["applications"]
            if deployed.get(name, {}).get("deployed_app_config") is None:
                raise ClusterStateError(f"no Serve application named {name!r} runs there")
        except BaseException:
            ray.shutdown()
            raise
        self._client: Any = client
        # Serve removes what a configuration leaves out, so the others are named too.
        self._applications = [
            details["deployed_app_config"]
            for details in deployed.values()
            if details.get("deployed_app_config") is not None
        ]
        self._application = next(a for a in self._applications if a["name"] == name)
        self.config = with_user_config(
            ClusterConfig.parse(self._application["args"]), self._user_config()
        )

    def __enter__(self) -> RunningApplication:
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    @property
    def router_address(self) -> str:
        """``host:port`` of a router."""
        return list_replicas(self._name, ROUTER)[0].address

    def swap(
        self,
        speculative: SpeculativeConfig | None,
        *,
        timeout_s: float,
        report: Callable[[str], None],
    ) -> None:
        """Goes over to another drafter, and returns once every replica and drafter uses it.

        Args:
            speculative: of the drafter; ``None``: no speculation.
            timeout_s: longest time to wait; what is not ready by then goes on getting ready.
            report: takes one line of progress.

        Raises:
            ConfigError: the cluster was started without drafters.
            ClusterStateError: a part cannot use it, or is not ready in time.
        """
        if not self._has_drafters():
            raise ConfigError(
                "speculative", "the running cluster was started without drafters; start it anew"
            )
        deadline = time.monotonic() + timeout_s
        former = self.config.speculative
        self._deploy(speculative)
        missing = "no part has answered"
        while time.monotonic() < deadline:
            parts = self._ask()
            told = [(name, state) for name, state in parts if state.wanted == speculative]
            if failed := [(name, state.error) for name, state in told if state.error]:
                self._deploy(former)
                name, error = failed[0]
                raise ClusterStateError(f"{name} cannot use it, all stays as it was: {error}")
            ready = [name for name, state in told if state.in_use == speculative]
            if len(ready) == len(parts) == self._num_parts():
                return
            progress = f"{len(ready)} of {self._num_parts()} drafters and target replicas use it"
            if progress != missing:
                report(progress)
                missing = progress
            time.sleep(_POLL_S)
        raise ClusterStateError(f"not in use everywhere after {timeout_s:.0f} s: {missing}")

    def set_num_drafters(self, num_drafters: int) -> None:
        """Changes the number of drafters, at least 1, where it is fixed; does not wait for them.

        Raises:
            ConfigError: it follows the load, or there are none.
        """
        if not self._has_drafters() or self.config.drafter.is_scaled:
            raise ConfigError("drafter.num_replicas", "is not fixed in the running cluster")
        self._set_options(DRAFTER, {"num_replicas": num_drafters})
        self._deploy_all()

    def _has_drafters(self) -> bool:
        return DRAFTER in serve.status().applications[self._name].deployments

    def _num_parts(self) -> int:
        deployments = serve.status().applications[self._name].deployments
        return sum(sum(deployments[name].replica_states.values()) for name in _SWAPPED)

    def _ask(self) -> list[tuple[str, DrafterInUse]]:
        """What each running target replica and drafter answers, with the deployment's name."""
        answers: list[tuple[str, DrafterInUse]] = []
        for name in _SWAPPED:
            handle = serve.get_deployment_handle(name, self._name)
            try:
                states = handle.broadcast("drafter_in_use").results(timeout_s=5.0)
            except (RayError, RayServeException, TimeoutError):
                continue  # one of them has just gone: it is asked again
            answers += [(name, state) for state in states]
        return answers

    def _user_config(self) -> Any:
        """Of the target replicas; the drafters have the same."""
        for deployment in self._application.get("deployments") or ():
            if deployment["name"] == TARGET_REPLICA:
                return deployment.get("user_config")
        return None

    def _deploy(self, speculative: SpeculativeConfig | None) -> None:
        for name in _SWAPPED:
            self._set_options(name, {"user_config": to_user_config(speculative)})
        self._deploy_all()

    def _set_options(self, deployment: str, options: dict[str, Any]) -> None:
        all_options = {d["name"]: d for d in self._application.get("deployments") or ()}
        all_options[deployment] = {
            **all_options.get(deployment, {"name": deployment}),
            **options,
        }
        self._application["deployments"] = list(all_options.values())

    def _deploy_all(self) -> None:
        # Serve keeps replicas as long as `args` and the import path stay what they are.
        self._client.deploy_apps(
            ServeDeploySchema.model_validate({"applications": self._applications})
        )
