"""``dspark eval``: how much of what drafters guess is accepted, and how sure they rightly are."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table

from cluster.cli.drafters import (
    DEFAULT_DRAFTER,
    add_rounds,
    drafters_of,
    note,
    sampling_seed,
    settings_of,
    target_of,
    temperatures_of,
    wide_console,
)

if TYPE_CHECKING:
    from cluster.bench.drafters import Comparison


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds ``eval`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "eval",
        help="measure drafters: acceptance by position and calibration, side by side",
        description="Runs prompts through the serving engine in this process, with one drafter "
        "after the other, and shows what was accepted. A round counts when its whole block was "
        "verified; acceptance length is the mean over rounds of accepted + 1.",
    )
    add_comparison(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write eval.json and plots (PNG) there"
    )
    return parser


def add_comparison(parser: argparse.ArgumentParser) -> None:
    """Adds what ``dspark bench drafters`` needs as well."""
    parser.add_argument(
        "--drafter",
        action="append",
        metavar="METHOD=DIR",
        help="also NAME=METHOD:DIR, and ngram without a folder; repeatable "
        f"(default {DEFAULT_DRAFTER})",
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="DATA",
        help="stdlib-heldout, or a JSONL file of prompts; repeatable (default stdlib-heldout)",
    )
    parser.add_argument(
        "--seed",
        action="append",
        type=sampling_seed,
        metavar="S",
        help="repeatable: every prompt once for each (default 0)",
    )
    parser.add_argument(
        "--seeded",
        action="store_true",
        help="give sampled requests seeds: coupled verification instead of rejection",
    )
    add_rounds(parser, prompts=32, prompt_tokens=128, max_tokens=128)


def comparison_of(args: argparse.Namespace) -> Comparison:
    """The comparison that ``add_comparison`` has read."""
    from cluster.bench.drafters import Comparison

    return Comparison(
        target=target_of(args),
        datasets=args.data or ["stdlib-heldout"],
        num_prompts=args.prompts,
        prompt_tokens=args.prompt_tokens,
        temperatures=temperatures_of(args),
        seeds=sorted(set(args.seed or [0])),
        is_seeded=args.seeded,
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command. Raises: cluster.errors for bad options, data and checkpoints."""
    from cluster.bench.drafters import evaluate
    from cluster.bench.report import describe_machine

    drafters, settings = drafters_of(args.drafter), settings_of(args)
    if args.out is not None:
        from cluster.bench.plots import check_plots

        check_plots()
        _make_folder(args.out)
    evaluations = list(evaluate(drafters, comparison_of(args), settings, note))
    rows = [evaluation.figures() for evaluation in evaluations]
    document = json.dumps({"target": args.target, "machine": describe_machine(), "rows": rows})
    if args.out is not None:
        from cluster.bench.plots import plot_positions, plot_reliability

        (args.out / "eval.json").write_text(document + "\n", encoding="utf-8")
        plot_positions(rows, args.out)
        for evaluation in evaluations:
            if evaluation.table.is_drafted.any():
                plot_reliability(evaluation, args.out)
    if args.json:
        print(document)
    else:
        console = wide_console()
        for table in (acceptance_table(rows), rate_table(rows), confidence_table(rows)):
            console.print(table)
    return 0


def _make_folder(path: Path) -> None:
    """Before the rounds, so that a folder that cannot be made costs none."""
    from cluster.errors import ConfigError

    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("--out", f"{path} cannot be made: {error.strerror}") from None


def acceptance_table(rows: list[dict[str, Any]]) -> Table:
    """Acceptance length and conditional acceptance by position, a line for each row."""
    width = max(len(row.get("conditional_acceptance", ())) for row in rows)
    table = Table(title="Conditional acceptance by position", title_justify="left", box=SIMPLE)
    for heading in ("drafter", "data", "T", "verifier", "rounds", "length", "95%"):
        table.add_column(heading, no_wrap=True)
    for position in range(width):
        table.add_column(str(position + 1), justify="right", no_wrap=True)
    for row in rows:
        cells = [
            row["drafter"],
            row["dataset"],
            f"{row['temperature']:g}",
            row["verifier"],
            str(row["rounds"]),
        ]
        if row["rounds"]:
            low, high = row["acceptance_length_interval"]
            cells += [f"{row['acceptance_length']:.2f}", f"{low:.2f}-{high:.2f}"]
            cells += ["" if v is None else f"{v:.2f}" for v in row["conditional_acceptance"]]
        table.add_row(*cells)
    return table


def rate_table(rows: list[dict[str, Any]]) -> Table:
    """The part of all rounds that accepted everything up to a position, a line for each row."""
    width = max(len(row.get("acceptance_rate", ())) for row in rows)
    table = Table(title="Acceptance rate by position", title_justify="left", box=SIMPLE)
    for heading in ("drafter", "data", "T"):
        table.add_column(heading, no_wrap=True)
    for position in range(width):
        table.add_column(str(position + 1), justify="right", no_wrap=True)
    for row in rows:
        rates = (f"{value:.2f}" for value in row.get("acceptance_rate", ()))
        table.add_row(row["drafter"], row["dataset"], f"{row['temperature']:g}", *rates)
    return table


def confidence_table(rows: list[dict[str, Any]]) -> Table:
    """By position: calibration error of the survival (20 bins) and Brier score, before and after
    calibration, and AUC, which calibration leaves as it is."""
    table = Table(title="Confidence by position", title_justify="left", box=SIMPLE)
    for heading in ("drafter", "data", "T", "figure"):
        table.add_column(heading, no_wrap=True)
    width = max(len(row["confidence"]["ece"]) for row in rows)
    for position in range(width):
        table.add_column(str(position + 1), justify="right", no_wrap=True)
    for row in rows:
        start = (row["drafter"], row["dataset"], f"{row['temperature']:g}")
        lines = [("ECE", row["confidence"], "ece"), ("ECE noise", row["confidence"], "ece_noise")]
        if row["calibrated_confidence"] is not None:
            lines.insert(1, ("ECE calibrated", row["calibrated_confidence"], "ece"))
        for label, figures, name in lines:
            values = ("" if v is None else f"{v:.1%}" for v in figures[name])
            table.add_row(*start, label, *values)
        for label, figures, name in (
            ("Brier", row["confidence"], "brier"),
            ("Brier calibrated", row["calibrated_confidence"], "brier"),
            ("AUC", row["confidence"], "auc"),
        ):
            if figures is not None:
                values = ("" if v is None else f"{v:.3f}" for v in figures[name])
                table.add_row(*start, label, *values)
    return table
