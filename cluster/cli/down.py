"""``dspark down``: drains and stops what ``dspark up`` started."""

from __future__ import annotations

import argparse
import json
import signal
import time
from typing import Any

from cluster.cli.processes import signal_process, wait_gone
from cluster.cli.running import report_to_stderr
from cluster.cli.state import end_orphans, read_state
from cluster.errors import ClusterStateError

_DRAIN_TIMEOUT_S = 180.0


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds ``down`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "down",
        help="drain and stop what `up` started",
        description="Lets running streams finish, then stops what `dspark up` started and nothing "
        "else. Returns when its processes have ended.",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=_DRAIN_TIMEOUT_S,
        metavar="SECONDS",
        help=f"longest time to wait for the end (default {_DRAIN_TIMEOUT_S:g})",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ClusterStateError: nothing to stop, or it did not end in time.
    """
    state = read_state()
    if state is None:
        raise ClusterStateError("there is no cluster to stop: `dspark up` has started none here")
    started = time.monotonic()
    if state.is_alive:
        report_to_stderr("draining and stopping")
        signal_process(state.process, signal.SIGTERM)
        if wait_gone([state.process], args.timeout):
            raise ClusterStateError(
                f"process {state.process.pid} has not ended within {args.timeout:g} s"
            )
    end_orphans(state)
    seconds = time.monotonic() - started
    if args.json:
        print(json.dumps({"stopped": True, "address": state.address, "seconds": round(seconds, 3)}))
    else:
        print(f"stopped after {seconds:.1f} s")
    return 0
