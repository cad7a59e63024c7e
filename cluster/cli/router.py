"""The options of ``dspark bench router``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.drafters import note, positive

if TYPE_CHECKING:
    from cluster.bench.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the suite's options."""
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="CSV",
        help="openings and answers are as long as its prompts and outputs (default: generated)",
    )
    parser.add_argument("--conversations", type=positive, default=300, metavar="N")
    parser.add_argument(
        "--starts", type=float, default=2.5, metavar="R", help="conversations begun a second (2.5)"
    )
    parser.add_argument("--replicas", type=positive, default=4, metavar="N")
    parser.add_argument(
        "--pages", type=positive, default=2000, metavar="N", help="of each replica's cache (2000)"
    )
    parser.add_argument("--runs", type=positive, default=3, metavar="N", help="of each policy (3)")
    parser.add_argument("--routers", type=positive, default=1, metavar="N")
    parser.add_argument(
        "--sweep", action="store_true", help="also once with other cache sizes and with 4 routers"
    )
    parser.add_argument(
        "--pick-replicas",
        type=positive,
        default=1000,
        metavar="N",
        help="among how many replicas a choice is timed (1000)",
    )
    parser.add_argument(
        "--cluster",
        action="store_true",
        help="serve conversations with a real cluster of two replicas instead, in turn with "
        "prefixes followed and at random",
    )


def run(args: argparse.Namespace) -> Report:
    """Runs ``router``. Raises: cluster.errors for bad options and data."""
    from cluster.bench import router, served_conversations
    from cluster.bench.conversations import ConversationShape
    from cluster.bench.routed_conversations import FleetShape
    from cluster.cli.load import log_folder
    from cluster.errors import ConfigError

    if not args.starts > 0:
        raise ConfigError("--starts", f"must be more than 0, got {args.starts}")
    if args.cluster:
        with log_folder(args.out) as folder:
            return served_conversations.run(folder, runs=args.runs, note=note)
    plan = router.RouterPlan(
        conversations=ConversationShape(
            num_conversations=args.conversations, starts_per_second=args.starts
        ),
        fleet=FleetShape(
            num_replicas=args.replicas, num_routers=args.routers, num_pages=args.pages
        ),
        other_pages=(args.pages // 2, args.pages * 2) if args.sweep else (),
        other_routers=(4,) if args.sweep else (),
        trace=args.trace,
        runs=args.runs,
        pick_replicas=args.pick_replicas,
    )
    return router.run(plan, note)
