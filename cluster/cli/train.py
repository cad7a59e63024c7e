"""``dspark train``: trains a drafter for a target."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds ``train`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="train a drafter for a target",
        description="Trains the drafter that CONFIG describes (deployments/training/ has examples; "
        "docs/training.md explains the keys). Started again with the same CONFIG, an interrupted "
        "run goes on from its last checkpoint.",
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="replaces one value of CONFIG; repeatable",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command. Raises: cluster.errors for bad configuration, data and checkpoints."""
    from cluster.training.config import load_train_config
    from cluster.training.loop import check_inputs, train
    from cluster.training.parallel import Worker

    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("cluster").setLevel(logging.INFO)
    config = load_train_config(args.config, tuple(args.set))
    if config.parallel.num_workers == 1 and not config.parallel.use_gpu:
        summary = train(config, Worker())
    else:
        from cluster.actors.training import train_on_ray

        check_inputs(config)
        summary = train_on_ray(train, config, config.parallel)
    if args.json:
        print(json.dumps(summary))
    else:
        length = summary["heldout_acceptance_length"]
        print(f"{config.output.folder}: held-out acceptance length {length:.3f}")
    return 0
