"""The options of ``dspark bench chaos`` and ``dspark bench drafter-loss``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cluster.cli.drafters import note, positive
from cluster.cli.load import log_folder
from cluster.cli.pool import add_paced, paced_own, profile_path

if TYPE_CHECKING:
    from cluster.bench.report import Report

DEFAULT_PROFILE = "h100-8b-tp1"


def add_chaos(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``chaos``."""
    add_paced(
        parser,
        profile=DEFAULT_PROFILE,
        time_scale=20.0,
        concurrency=8,
        concurrency_help="requests at once",
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=1800,
        metavar="N",
        help="how long parts are killed (default 1800; starting and judging come on top)",
    )
    parser.add_argument(
        "--period",
        type=positive,
        default=20,
        metavar="SECONDS",
        help="from one part that is killed or stopped to the next (default 20)",
    )
    parser.add_argument(
        "--deadline",
        type=positive,
        default=90,
        metavar="SECONDS",
        help="of each request (default 90)",
    )
    parser.add_argument(
        "--seed", type=positive, default=1, metavar="N", help="of what is broken, and when"
    )


def run_chaos(args: argparse.Namespace) -> Report:
    """Runs the suite. Raises: cluster.errors."""
    from cluster.bench import chaos

    plan = chaos.ChaosPlan(
        profile=profile_path(args),
        time_scale=args.time_scale,
        seconds=args.seconds,
        period_s=args.period,
        concurrency=args.concurrency,
        deadline_s=args.deadline,
        seed=args.seed,
    )
    _check_lab()
    own = paced_own(args)
    with log_folder(args.out) as folder:
        return chaos.run(own, plan, data=args.data, folder=folder, note=note)


def add_drafter_loss(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``drafter-loss``."""
    add_paced(
        parser,
        profile=DEFAULT_PROFILE,
        time_scale=16.0,
        concurrency=8,
        concurrency_help="requests at once",
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=3,
        metavar="N",
        help="how often drafters are killed, and late (default 3)",
    )


def run_drafter_loss(args: argparse.Namespace) -> Report:
    """Runs the suite. Raises: cluster.errors."""
    from cluster.bench import drafter_loss

    plan = drafter_loss.DrafterLossPlan(
        profile=profile_path(args),
        time_scale=args.time_scale,
        rounds=args.rounds,
        concurrency=args.concurrency,
    )
    _check_lab()
    own = paced_own(args)
    with log_folder(args.out) as folder:
        return drafter_loss.run(own, plan, data=args.data, folder=folder, note=note)


def _check_lab() -> None:
    from cluster.bench.lab.network import why_unavailable
    from cluster.errors import DsparkError

    if reason := why_unavailable():
        raise DsparkError(f"this machine cannot have several hosts: {reason}")
