"""``dspark bench fuzz``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cluster.cli.drafters import note, positive

if TYPE_CHECKING:
    from cluster.bench.report import Report

_SURFACES = ("client", "http", "drafter", "proposals", "config")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the suite's options."""
    parser.add_argument(
        "--surface",
        action="append",
        choices=_SURFACES,
        help="what is sent broken messages; repeatable (all)",
    )
    parser.add_argument(
        "--messages",
        type=positive,
        default=20_000,
        metavar="N",
        help="for each surface, in a process of its own (20000)",
    )
    parser.add_argument(
        "--live",
        type=int,
        default=2_000,
        metavar="N",
        help="for each surface with a port, through sockets (2000)",
    )
    parser.add_argument(
        "--live-engine",
        type=int,
        default=0,
        metavar="N",
        help="from drafters to an engine, which has to ask for each (0)",
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        default=2,
        metavar="N",
        help="processes at once: one for each surface and way (2)",
    )
    parser.add_argument("--seed", type=positive, default=1, metavar="N")


def run(args: argparse.Namespace) -> Report:
    """Runs the suite. Raises: ConfigError: a package is missing."""
    from cluster.bench import fuzz

    return fuzz.run(
        surfaces=args.surface or _SURFACES,
        num_messages=args.messages,
        num_live_messages=args.live,
        num_engine_messages=args.live_engine,
        seed=args.seed,
        num_at_once=args.jobs,
        note=note,
    )
