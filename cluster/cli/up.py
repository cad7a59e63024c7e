"""``dspark up``: starts a cluster, and holds it until it is told to stop."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cluster.cli.configuration import DEFAULT_CONFIG, read_configuration
from cluster.cli.http_door import http_url
from cluster.cli.processes import find_descendants, find_process
from cluster.cli.running import RunningCluster, report_to_stderr
from cluster.cli.state import (
    ClusterState,
    end_orphans,
    read_state,
    remove_state,
    state_dir,
    write_state,
)
from cluster.config import ClusterConfig
from cluster.errors import ClusterStateError

_START_TIMEOUT_S = 300.0
_POLL_S = 0.2
_TAIL_LINES = 20


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds ``up`` to the command line."""
    parser = commands.add_parser(
        "up",
        help="start a cluster here, or on the Ray cluster named by RAY_ADDRESS",
        description="Starts a cluster here, or on the Ray cluster named by RAY_ADDRESS, and prints "
        "its address when every part is ready. Stops it on Ctrl-C, SIGTERM or `dspark down`.",
    )
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help=f"Serve configuration (default {DEFAULT_CONFIG})",
    )
    parser.add_argument(
        "--detach", action="store_true", help="return once every part is ready; stop with `down`"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=_START_TIMEOUT_S,
        metavar="SECONDS",
        help=f"longest time the start may take (default {_START_TIMEOUT_S:g})",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ConfigError, CheckpointError: before anything was started.
        ClusterStateError: a cluster runs already, or this one cannot start.
    """
    path, document, config = read_configuration(args.config)
    running = read_state()
    if running is not None and running.is_alive:
        raise ClusterStateError(
            f"a cluster runs already (process {running.process.pid}); `dspark down` stops it"
        )
    if running is not None:
        end_orphans(running)
    if args.detach:
        return _start_detached(path, args)
    return _hold(path, document, config, args)


def _hold(
    path: Path, document: dict[str, Any], config: ClusterConfig, args: argparse.Namespace
) -> int:
    process = find_process(os.getpid())
    if process is None:
        raise ClusterStateError("this process cannot be found in the process list")
    state = ClusterState(process=process, config=str(path))
    write_state(state)
    try:
        with RunningCluster(
            document, config, timeout_s=args.timeout, report=report_to_stderr
        ) as cluster:
            children = tuple(find_descendants(os.getpid()))
            state = dataclasses.replace(
                state,
                address=cluster.address,
                ray_address=cluster.ray_address,
                temp_dir=str(cluster.temp_dir),
                children=children,
            )
            write_state(state)
            _print_ready(state, config, cluster.http_url, cluster.startup_s, as_json=args.json)
            while True:
                signal.pause()
    except KeyboardInterrupt:
        return 0 if state.is_ready else 128 + signal.SIGINT
    finally:
        remove_state()


def _start_detached(path: Path, args: argparse.Namespace) -> int:
    folder = state_dir()
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / "cluster.log"
    command = [sys.executable, "-m", "cluster.cli", "up", str(path), "--timeout", str(args.timeout)]
    started = time.monotonic()
    with log_path.open("w") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        while child.poll() is None:
            state = read_state()
            if state is not None and state.is_ready and state.process.pid == child.pid:
                _, document, config = read_configuration(str(path))
                url, startup_s = http_url(document), time.monotonic() - started
                _print_ready(state, config, url, startup_s, as_json=args.json)
                return 0
            time.sleep(_POLL_S)
    except BaseException:
        child.terminate()
        raise
    lines = log_path.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
    print("\n".join(lines), file=sys.stderr)
    failure = f"the cluster did not start; its log is {log_path}"
    print(f"dspark: {failure}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": failure}))
    return child.returncode if child.returncode > 0 else 1


def _print_ready(
    state: ClusterState,
    config: ClusterConfig,
    url: str | None,
    startup_s: float,
    *,
    as_json: bool,
) -> None:
    num_drafters = config.drafter.initial if config.has_drafters else 0
    if as_json:
        ready = {
            "address": state.address,
            "ray_address": state.ray_address,
            "http": url,
            "model": config.model_name,
            "replicas": config.target.initial,
            "shards": config.target.initial * config.target.num_shards,
            "drafters": num_drafters,
            "routers": config.router.num_replicas,
            "pid": state.process.pid,
            "startup_seconds": round(startup_s, 3),
        }
        print(json.dumps(ready), flush=True)
        return
    where = state.address if url is None else f"{state.address} and {url}/v1"
    print(
        f"{config.model_name} is ready at {where} after {startup_s:.1f} s: "
        f"{config.target.initial} x {config.target.num_shards} target shards, "
        f"{num_drafters} drafters, {config.router.num_replicas} routers",
        flush=True,
    )
