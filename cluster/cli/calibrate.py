"""``dspark calibrate``: fits a drafter's confidences and writes calibration.json beside it."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table

from cluster.cli.drafters import (
    DEFAULT_DRAFTER,
    add_rounds,
    drafters_of,
    note,
    positive,
    settings_of,
    target_of,
    temperatures_of,
    wide_console,
)
from cluster.speculation.record import VERIFIERS

if TYPE_CHECKING:
    from cluster.bench.calibration import FitPlan

_SHOWN_CONFIDENCES = (0.5, 0.7, 0.9)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds ``calibrate`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "calibrate",
        help="fit a drafter's confidences to what is accepted",
        description="Runs rounds on training prompts, fits what becomes of the confidences of "
        "each position, for each verifier and bucket of temperatures (0, to 0.5, to 0.85, above), "
        "writes calibration.json beside the drafter's checkpoint, and reports the error before "
        "and after on held-out prompts.",
    )
    add_plan(parser)
    return parser


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Adds what ``dspark bench calibration`` needs as well."""
    parser.add_argument(
        "--drafter",
        default=DEFAULT_DRAFTER,
        metavar="METHOD=DIR",
        help=f"what to calibrate (default {DEFAULT_DRAFTER})",
    )
    parser.add_argument(
        "--verifier",
        action="append",
        choices=VERIFIERS,
        help="repeatable (default both; coupled is what greedy and seeded requests get)",
    )
    parser.add_argument(
        "--training-data",
        default="stdlib-heldout-fit",
        metavar="DATA",
        help="prompts to fit on, that neither model was trained on: a set of code "
        "(docs/evaluation.md), or a JSONL file (default stdlib-heldout-fit)",
    )
    parser.add_argument(
        "--heldout-data",
        default="stdlib-heldout-judge",
        metavar="DATA",
        help="other prompts to judge on (default stdlib-heldout-judge)",
    )
    parser.add_argument(
        "--rounds", type=positive, default=20_000, metavar="N", help="to fit on (default 20000)"
    )
    parser.add_argument(
        "--heldout-rounds", type=positive, default=20_000, metavar="N", help="to judge on (20000)"
    )
    add_rounds(parser, prompts=4096, prompt_tokens=32, max_tokens=32)


def plan_of(args: argparse.Namespace) -> FitPlan:
    """The plan that ``add_plan`` has read."""
    from cluster.bench.calibration import FitPlan

    return FitPlan(
        target=target_of(args),
        temperatures=temperatures_of(args),
        verifiers=args.verifier or VERIFIERS,
        training=args.training_data,
        heldout=args.heldout_data,
        training_rounds=args.rounds,
        heldout_rounds=args.heldout_rounds,
        num_prompts=args.prompts,
        prompt_tokens=args.prompt_tokens,
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command. Raises: cluster.errors for bad options, data and checkpoints."""
    from cluster.bench.calibration import fit_drafter, folder_to_write, store, summarise

    (drafter,) = drafters_of([args.drafter])
    folder = folder_to_write(drafter)  # before the rounds
    settings = settings_of(args)
    fits = []
    for fit in fit_drafter(drafter, plan_of(args), settings, note):
        # Each at once, so that what stops the next costs no more than that.
        path = store(args.target, folder, fit, settings)
        fits.append(fit)
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
    import numpy as np

    from cluster.speculation.calibration import LogitMap, logit, sigmoid

    heldout = fit["heldout"]
    table = Table(
        title=f"{fit['verifier']}, temperature {fit['temperature']:g}: {heldout['rounds']} rounds "
        f"of {heldout['requests']} requests on {heldout['dataset']}, fitted on "
        f"{fit['training']['rounds']} rounds on {fit['training']['dataset']}",
        title_justify="left",
        box=SIMPLE,
    )
    for heading in (
        "position",
        *(f"of {confidence:.0%}" for confidence in _SHOWN_CONFIDENCES),
        "ECE before",
        "after",
        "95%",
        "noise",
        "of requests",
        "AUC",
    ):
        table.add_column(heading, justify="right")
    for position, line in enumerate(fit["maps"]):
        scaled = sigmoid(LogitMap(**line).apply(logit(np.array(_SHOWN_CONFIDENCES))))
        before = heldout["before"]["ece"][position]
        after = {name: values[position] for name, values in heldout["after"].items()}
        if after["ece"] is None:
            continue
        low, high = after["ece_interval"]
        auc = "" if after["auc"] is None else f"{after['auc']:.3f}"
        table.add_row(
            str(position + 1),
            *(f"{confidence:.0%}" for confidence in scaled.tolist()),
            f"{before:.2%}",
            f"{after['ece']:.2%}",
            f"{low:.2%} - {high:.2%}",
            f"{after['ece_noise']:.2%}",
            f"{after['ece_request_noise']:.2%}",
            auc,
        )
    return table
