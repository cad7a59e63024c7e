"""The options of ``dspark bench pool``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import cluster
from cluster.cli.drafters import DEFAULT_DRAFTER, DEFAULT_TARGET, drafters_of, note, positive
from cluster.cli.load import log_folder
from cluster.errors import ConfigError
from cluster.pace_config import PaceConfig

if TYPE_CHECKING:
    from cluster.bench.own_serving import OwnSettings
    from cluster.bench.report import Report

DEFAULT_PROFILE = "h100-8b-a10"


def add_paced(
    parser: argparse.ArgumentParser,
    *,
    profile: str,
    time_scale: float,
    concurrency: int,
    concurrency_help: str,
) -> None:
    """Adds what a paced cluster serves and is asked; the last four are defaults, and a help."""
    parser.add_argument("--target", default=DEFAULT_TARGET, metavar="DIR")
    parser.add_argument("--drafter", default=DEFAULT_DRAFTER, metavar="METHOD=DIR")
    parser.add_argument(
        "--profile",
        default=profile,
        metavar="FILE",
        help=f"device profile, or the name of one in deployments/profiles (default {profile})",
    )
    parser.add_argument(
        "--time-scale",
        type=float,
        default=time_scale,
        metavar="X",
        help=f"stretches the profile's times (default {time_scale:g})",
    )
    parser.add_argument(
        "--concurrency",
        type=positive,
        default=concurrency,
        metavar="N",
        help=f"{concurrency_help} (default {concurrency})",
    )
    parser.add_argument(
        "--data",
        default="stdlib-heldout",
        metavar="DATA",
        help="stdlib-heldout, or a JSONL file of prompts",
    )


def paced_own(args: argparse.Namespace) -> OwnSettings:
    """What ``add_paced`` has read of a cluster; in float32, so that answers can be judged."""
    from cluster.bench.own_serving import OwnSettings

    return OwnSettings(
        target=args.target,
        drafter=drafters_of([args.drafter])[0],
        dtype="float32",
        num_threads=1,
        scheduler="search",
        enforce_eager=True,
    )


def profile_path(args: argparse.Namespace) -> Path:
    """The file that ``--profile`` means. Raises: ConfigError: there is none."""
    beside_package = Path(cluster.__file__).resolve().parents[1] / "deployments"
    for folder in (Path(), Path("deployments"), beside_package):
        path = Path(PaceConfig(profile=args.profile).resolved(folder).profile)
        if path.is_file():
            return path
    raise ConfigError("--profile", f"there is no profile {args.profile!r}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_paced(
        parser,
        profile=DEFAULT_PROFILE,
        time_scale=12.0,
        concurrency=16,
        concurrency_help="requests at once; twice as many come later",
    )
    parser.add_argument(
        "--to-zero",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="how long speculation must be off before the pool goes to zero (default 10)",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=10,
        metavar="N",
        help="measurements with the drafters needed, and one more (default 10; 0: none)",
    )


def run(args: argparse.Namespace) -> Report:
    """Runs the suite. Raises: cluster.errors."""
    from cluster.bench import pool

    own = paced_own(args)
    plan = pool.PoolPlan(
        profile=profile_path(args),
        time_scale=args.time_scale,
        concurrency=args.concurrency,
        to_zero_s=args.to_zero,
        pairs=args.pairs,
    )
    with log_folder(args.out) as folder:
        return pool.run(own, plan, data=args.data, folder=folder, note=note)
