"""``dspark swap``: another drafter for a running cluster, while requests run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Mapping
from typing import Any

from cluster.cli.configuration import read_configuration
from cluster.cli.running import report_to_stderr, wait_ready
from cluster.cli.state import ClusterState, read_state, write_state
from cluster.config import ClusterConfig
from cluster.errors import ClusterStateError, ConfigError

_TIMEOUT_S = 300.0


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds ``swap`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "swap",
        help="change the drafter of a running cluster, while requests run",
        description="Has a running cluster draft with what CONFIG's `speculative` section says "
        "(null: without speculation); everything else in CONFIG must be as it runs. Restarts "
        "nothing and changes no output: requests go on, and their next rounds use the new drafter. "
        "Where a part cannot use it, the drafter that was in use stays.",
    )
    parser.add_argument("config", metavar="CONFIG", help="Serve configuration")
    parser.add_argument(
        "--timeout",
        type=float,
        default=_TIMEOUT_S,
        metavar="SECONDS",
        help=f"longest time until every part uses it (default {_TIMEOUT_S:g})",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ConfigError, CheckpointError: before anything was changed.
        ClusterStateError: there is no cluster, or it does not use the drafter in time.
    """
    path, document, config = read_configuration(args.config)
    state = read_state()
    ray_address = _ray_address(state)
    from cluster.actors.swap import RunningApplication

    started = time.monotonic()
    name = document["applications"][0].get("name", "default")
    with RunningApplication(ray_address, name) as application:
        check_same_cluster(application.config, config)
        application.swap(config.speculative, timeout_s=args.timeout, report=report_to_stderr)
        report_to_stderr("waiting for the drafters to be ready")
        wait_ready(application.router_address, config, started + args.timeout)
    if state is not None and state.is_alive and state.ray_address == ray_address:
        write_state(dataclasses.replace(state, config=str(path)))
    _print_swapped(config, time.monotonic() - started, as_json=args.json)
    return 0


def check_same_cluster(running: ClusterConfig, given: ClusterConfig) -> None:
    """Checks that two configurations differ in nothing but ``speculative``.

    Raises:
        ConfigError: naming the first key that differs.
    """
    exclude = {"speculative"}
    key = _first_difference(running.model_dump(exclude=exclude), given.model_dump(exclude=exclude))
    if key is not None:
        raise ConfigError(key, "differs from the running cluster's; only `speculative` can change")


def _ray_address(state: ClusterState | None) -> str:
    """Of the Ray cluster that the cluster runs on."""
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    if state is None or not state.is_alive or not state.ray_address:
        raise ClusterStateError("there is no cluster: `dspark up` has started none here")
    # Ray protects what it starts on one machine; it keeps the user's token and reads it by itself.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    return state.ray_address


def _first_difference(running: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    for key, value in running.items():
        other = given[key]
        if value == other:
            continue
        if isinstance(value, dict) and isinstance(other, dict):
            return f"{key}.{_first_difference(value, other)}"
        return key
    return None


def _print_swapped(config: ClusterConfig, seconds: float, *, as_json: bool) -> None:
    speculative = config.speculative
    method = None if speculative is None else speculative.method
    model = None if speculative is None else speculative.model
    if as_json:
        swapped = {
            "method": method,
            "model": model,
            "replicas": config.target.initial,
            "drafters": config.drafter.initial if speculative is not None else 0,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(swapped))
        return
    what = "no speculation" if method is None else " ".join(filter(None, (method, model)))
    print(f"{config.model_name} goes on with {what}, after {seconds:.1f} s")
