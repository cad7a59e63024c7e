"""The options of ``dspark bench simulator``."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.drafters import note, positive
from cluster.cli.frontier import add_frontier, run_frontier

if TYPE_CHECKING:
    from cluster.bench.report import Report
    from cluster.bench.simulator import Rows

_HOURS = 24
_STRETCH_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``simulator``."""
    parser.add_argument("--fleet", type=Path, metavar="FILE", help="fleet that is predicted now")
    parser.add_argument(
        "--predicted",
        type=Path,
        metavar="FILE",
        help="a prediction made before, by `dspark simulate FLEET --concurrency N … --json`",
    )
    measured = parser.add_mutually_exclusive_group(required=True)
    measured.add_argument(
        "--measured", type=Path, metavar="FILE", help="what `dspark bench frontier --json` printed"
    )
    measured.add_argument(
        "--measure", action="store_true", help="measure now, with the options of `frontier` below"
    )
    parser.add_argument(
        "--predicted-seconds",
        type=float,
        default=300.0,
        metavar="S",
        help="that --fleet is simulated for, each way at each concurrency (300)",
    )
    day = parser.add_argument_group("a day of a trace, timed")
    day.add_argument("--trace", metavar="CSV", help="an hour of it, that is repeated 24 times")
    day.add_argument("--trace-fleet", type=Path, metavar="FILE", help="that serves it")
    day.add_argument("--replicas", type=positive, default=1000, metavar="N")
    day.add_argument("--rate-scale", type=float, default=1.0, metavar="X", help="as often")
    add_frontier(parser)


def run(args: argparse.Namespace) -> Report:
    """Runs ``simulator``. Raises: cluster.errors."""
    from cluster.bench import simulator
    from cluster.errors import ConfigError

    if (args.fleet is None) == (args.predicted is None):
        raise ConfigError("--fleet", "give one of --fleet and --predicted")
    if (args.trace is None) != (args.trace_fleet is None):
        raise ConfigError("--trace", "goes with --trace-fleet")
    # What was predicted is read, or made, before anything is measured.
    known = None if args.predicted is None else simulator.read_rows(args.predicted)
    if args.measure:
        measured = run_frontier(args).figures["rows"]
    else:
        measured = simulator.read_rows(args.measured)
    predicted = _predict(args, measured) if known is None else known
    trace = None
    if args.trace is not None:
        trace = _time_day(args)
    report = simulator.compare(predicted, measured, trace)
    simulator.note_points(report.figures["rows"], note)
    return report


def _predict(args: argparse.Namespace, measured: Rows) -> Rows:
    from cluster.bench.fleet_files import read_fleet
    from cluster.bench.simulate import frontier_rows
    from cluster.simulation.workload import ClosedLoop

    loops = [
        ClosedLoop(
            row["concurrency"], args.prompt_tokens, args.max_tokens, args.predicted_seconds, 10.0
        )
        for row in measured
    ]
    return frontier_rows(read_fleet(args.fleet), loops, note)


def _time_day(args: argparse.Namespace) -> dict[str, float]:
    from cluster.bench.arrival_trace import read_trace
    from cluster.bench.fleet_files import read_fleet
    from cluster.bench.simulate import fleet_of_size
    from cluster.bench.simulator import time_trace
    from cluster.simulation.simulation import Detail
    from cluster.simulation.workload import trace_jobs

    fleet = fleet_of_size(read_fleet(args.trace_fleet), args.replicas)
    trace = read_trace(args.trace, sys.maxsize)
    jobs = functools.partial(
        trace_jobs, trace, repeat=_HOURS, rate_scale=args.rate_scale, seed=fleet.config.seed
    )
    return time_trace(fleet, jobs, Detail(stretch_s=_STRETCH_S, sample_s=600.0))
