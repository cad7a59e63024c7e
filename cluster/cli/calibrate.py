"""``dspark calibrate``: fits a drafter's confidences and writes calibration.json beside it."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table

from cluster.cli.drafters import (
    DEFAULT_DRAFTER,
    DEFAULT_TARGET,
    add_rounds,
    drafters_of,
    note,
    positive,
    sampling_temperature,
    settings_of,
    wide_console,
)

if TYPE_CHECKING:
    from cluster.bench.calibration import Data


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds ``calibrate`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "calibrate",
        help="fit a drafter's confidences to what is accepted",
        description="Runs rounds on training prompts, fits one temperature per position for each "
        "verifier, writes calibration.json beside the drafter's checkpoint, and reports the error "
        "before and after on held-out prompts.",
    )
    parser.add_argument(
        "--drafter",
        default=DEFAULT_DRAFTER,
        metavar="METHOD=DIR",
        help=f"what to calibrate (default {DEFAULT_DRAFTER})",
    )
    add_calibration(parser)
    return parser


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Adds what ``dspark bench calibration`` needs as well."""
    parser.add_argument("--target", default=DEFAULT_TARGET, metavar="DIR")
    parser.add_argument(
        "--temperature",
        action="append",
        type=sampling_temperature,
        metavar="T",
        help="repeatable, one for each bucket: 0, to 0.5, to 0.85, above (default 0 and 1)",
    )
    parser.add_argument(
        "--verifier",
        action="append",
        choices=["coupled", "rejection"],
        help="repeatable (default both; coupled is what greedy and seeded requests get)",
    )
    parser.add_argument(
        "--training-data",
        default="stdlib-training",
        metavar="DATA",
        help="prompts to fit on: stdlib-training, or a JSONL file (default stdlib-training)",
    )
    parser.add_argument(
        "--heldout-data",
        default="stdlib-heldout",
        metavar="DATA",
        help="prompts to judge on: stdlib-heldout, or a JSONL file (default stdlib-heldout)",
    )
    parser.add_argument(
        "--rounds", type=positive, default=20_000, metavar="N", help="to fit on (default 20000)"
    )
    parser.add_argument(
        "--heldout-rounds", type=positive, default=20_000, metavar="N", help="to judge on (20000)"
    )
    parser.add_argument(
        "--prompts",
        type=positive,
        default=4096,
        metavar="N",
        help="most prompts of a set (4096)",
    )
    add_rounds(parser, max_tokens=64)


def calibration_data(args: argparse.Namespace) -> Data:
    """The data that ``add_calibration`` has read."""
    from cluster.bench.calibration import Data

    return Data(
        training=args.training_data,
        heldout=args.heldout_data,
        training_rounds=args.rounds,
        heldout_rounds=args.heldout_rounds,
        num_prompts=args.prompts,
        prompt_tokens=args.prompt_tokens,
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command. Raises: cluster.errors for bad options, data and checkpoints."""
    from cluster.bench.calibration import fit_drafter, store, summarise

    (drafter,) = drafters_of([args.drafter])
    settings = settings_of(args)
    fits = list(
        fit_drafter(
            args.target,
            drafter,
            args.temperature or [0.0, 1.0],
            args.verifier or ["coupled", "rejection"],
            calibration_data(args),
            settings,
            note,
        )
    )
    path = store(args.target, drafter, fits, settings)
    figures = summarise(fits)
    if args.json:
        print(json.dumps({"file": path, **figures}))
        return 0
    console = wide_console()
    for fit in figures["fits"]:
        console.print(fit_table(fit))
    console.print(f"written to {path}")
    return 0


def fit_table(fit: dict[str, Any]) -> Table:
    """One fit's held-out figures by position."""
    heldout = fit["heldout"]
    table = Table(
        title=f"{fit['verifier']}, temperature {fit['temperature']:g}: {heldout['rounds']} rounds "
        f"of {heldout['requests']} requests on {heldout['dataset']}, fitted on "
        f"{fit['training']['rounds']} rounds on {fit['training']['dataset']}",
        title_justify="left",
        box=SIMPLE,
    )
    for heading in ("position", "temperature", "ECE before", "after", "95%", "noise", "AUC"):
        table.add_column(heading, justify="right")
    for position, temperature in enumerate(fit["temperatures"]):
        before = heldout["before"]["ece"][position]
        after = {name: values[position] for name, values in heldout["after"].items()}
        if after["ece"] is None:
            continue
        low, high = after["ece_interval"]
        auc = "" if after["auc"] is None else f"{after['auc']:.3f}"
        table.add_row(
            str(position + 1),
            f"{temperature:.3f}",
            f"{before:.2%}",
            f"{after['ece']:.2%}",
            f"{low:.2%} - {high:.2%}",
            f"{after['ece_noise']:.2%}",
            auc,
        )
    return table
