"""``dspark bench``: measurements that stand behind the project's claims."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds ``bench`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure: parity with plain transformers",
        description="Runs a suite. parity: held-out prompts, greedy and seeded, all at once, "
        "judged position by position against plain transformers on the same checkpoint.",
    )
    parser.add_argument("suite", choices=["parity"])
    parser.add_argument("--target", default="deployments/models/stdlib-7m", metavar="DIR")
    parser.add_argument("--drafter", default="deployments/models/stdlib-7m-dspark", metavar="DIR")
    parser.add_argument("--prompts", type=int, default=100, metavar="N")
    parser.add_argument("--max-tokens", type=int, default=48, metavar="N")
    parser.add_argument("--address", help="running cluster; unset: an engine in this process")
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the suite. Returns 1 where its own bar does not hold."""
    from cluster.bench import parity

    report = parity.run(
        target=args.target,
        drafter=args.drafter,
        num_prompts=args.prompts,
        max_tokens=args.max_tokens,
        address=args.address,
    )
    print(report.to_json() if args.json else report.to_text())
    return 0 if report.passed else 1
