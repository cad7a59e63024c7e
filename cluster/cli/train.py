"""``dspark train``: trains a drafter for a target."""

from __future__ import annotations

import argparse
import json
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
        help="replaces one value of CONFIG; paths are relative to the current folder; repeatable",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command. Raises: cluster.errors for bad configuration, data and checkpoints."""
    from cluster.training.config import load_train_config
    from cluster.training.loop import check_inputs, log_to_stderr, train_worker
    from cluster.training.report import require_extra
    from cluster.training.resume import read_summary

    log_to_stderr()
    config = load_train_config(args.config, tuple(args.set))
    parallel = config.parallel
    if parallel.num_workers == 1:
        train_worker(config, 0, 1, "cuda" if parallel.use_gpu else "cpu")
    else:
        require_extra("parallel.num_workers", "ray.train.torch")
        from cluster.actors.training import train_on_ray

        check_inputs(config)
        train_on_ray(
            train_worker,
            config,
            num_workers=parallel.num_workers,
            use_gpu=parallel.use_gpu,
            cpus_per_worker=parallel.cpus_per_worker,
            max_failures=parallel.max_failures,
            folder=config.run_folder / "ray",
        )
    summary = read_summary(Path(config.output.folder))
    if args.json:
        print(json.dumps(summary))
    else:
        length = summary["heldout_acceptance_length"]
        print(f"{config.output.folder}: held-out acceptance length {length:.3f}")
    return 0
