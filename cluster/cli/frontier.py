"""The options of ``dspark bench frontier``, ``pipeline`` and ``burst``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli.drafters import note, positive
from cluster.cli.load import add_own, check_plots, log_folder, own_of
from cluster.config import SpeculativeConfig

if TYPE_CHECKING:
    from cluster.bench.report import Report

_BURST_SEQS = 32


def add_frontier(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``frontier``."""
    _add_turns(parser, "1, 2, 4, 8, 16, 32, 64")


def add_pipeline(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``pipeline``."""
    _add_turns(parser, "1, 4, 16, 32; 16 is always among them")
    parser.add_argument(
        "--round-trip-ms",
        type=float,
        default=10.0,
        metavar="X",
        help="of the delayed network, in the profile's time (10)",
    )
    parser.add_argument(
        "--drafter-devices",
        action="append",
        type=float,
        metavar="X",
        help="a replica's part of a drafter's devices, as a share of its own; repeatable (1, 0.1)",
    )


def run_pipeline(args: argparse.Namespace) -> Report:
    """Runs ``pipeline``. Raises: cluster.errors."""
    from cluster.bench import pipeline

    shape = pipeline.PipelineShape()
    shape = replace(
        shape,
        concurrencies=tuple(
            sorted({*(args.concurrency or shape.concurrencies), shape.compared_at})
        ),
        round_trip_s=args.round_trip_ms / 1e3,
        drafter_devices=tuple(args.drafter_devices or shape.drafter_devices),
        **_turns_of(args),
    )
    with log_folder(args.out) as folder:
        return pipeline.run(_values(args, folder, max(shape.concurrencies)), shape, note)


def _add_turns(parser: argparse.ArgumentParser, concurrencies: str) -> None:
    add_own(parser)
    _add_pace(parser)
    parser.add_argument(
        "--concurrency",
        action="append",
        type=positive,
        metavar="N",
        help=f"requests at once; repeatable (default {concurrencies})",
    )
    parser.add_argument(
        "--turns", type=positive, default=10, metavar="N", help="of each way (default 10)"
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="of a turn that count (2)"
    )
    parser.add_argument("--warm-up", type=float, default=0.5, metavar="S", help="of a turn (0.5)")
    parser.add_argument("--prompt-tokens", type=positive, default=128, metavar="N")
    parser.add_argument("--max-tokens", type=positive, default=256, metavar="N")
    parser.add_argument("--data", default="stdlib-heldout", metavar="DATA")


def run_frontier(args: argparse.Namespace) -> Report:
    """Runs ``frontier``. Raises: cluster.errors."""
    from cluster.bench import frontier

    check_plots(args.out)
    shape = frontier.FrontierShape()
    shape = replace(
        shape,
        concurrencies=tuple(args.concurrency or shape.concurrencies),
        **_turns_of(args),
    )
    with log_folder(args.out) as folder:
        report = frontier.run(_values(args, folder, max(shape.concurrencies)), shape, note)
    if args.out is not None:
        from cluster.bench.frontier_plot import plot_ways

        args.out.mkdir(parents=True, exist_ok=True)
        plot_ways(report.figures["rows"], args.out / "frontier.png")
    return report


def _turns_of(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "turns": args.turns,
        "seconds": args.seconds,
        "warm_up_s": args.warm_up,
        "prompt_tokens": args.prompt_tokens,
        "max_tokens": args.max_tokens,
        "data": args.data,
    }


def add_burst(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``burst``."""
    add_own(parser)
    _add_pace(parser)
    parser.add_argument("--max-num-seqs", type=positive, default=_BURST_SEQS, metavar="N")
    parser.add_argument("--runs", type=positive, default=10, metavar="N", help="paired runs (10)")
    for name, default, meaning in (
        ("--light-s", 15.0, "seconds of light load"),
        ("--burst-s", 10.0, "seconds of the burst"),
        ("--after-s", 20.0, "seconds behind it, once nothing waits"),
    ):
        parser.add_argument(name, type=float, default=default, metavar="S", help=meaning)
    parser.add_argument("--prompt-tokens", type=positive, default=64, metavar="N")
    parser.add_argument("--max-tokens", type=positive, default=64, metavar="N")
    parser.add_argument("--data", default="stdlib-heldout", metavar="DATA")


def run_burst(args: argparse.Namespace) -> Report:
    """Runs ``burst``. Raises: cluster.errors."""
    from cluster.bench import burst

    shape = burst.BurstShape(
        runs=args.runs,
        light_s=args.light_s,
        burst_s=args.burst_s,
        after_s=args.after_s,
        prompt_tokens=args.prompt_tokens,
        max_tokens=args.max_tokens,
        data=args.data,
    )
    with log_folder(args.out) as folder:
        values = _values(args, folder, args.max_num_seqs)
        # What waits longer than a batch takes is for other replicas.
        values["target"]["max_num_waiting"] = args.max_num_seqs
        return burst.run(values, shape, note)


def _add_pace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help="device profile that passes keep the time of (docs/pace.md); unset: unpaced",
    )
    parser.add_argument("--time-scale", type=float, default=1.0, metavar="X")


def _values(args: argparse.Namespace, folder: Path, max_num_seqs: int) -> dict[str, Any]:
    """``args`` of the configuration that is measured."""
    from cluster.bench.own_serving import profile_curve

    own = replace(
        own_of(args),
        scheduler="search",
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(512, 8 * max_num_seqs + args.prompt_tokens),
        draft_top_k=1,  # requests are greedy
    )
    if args.profile is None:
        note("measuring the verify curve")
        own = profile_curve(own, folder, repeats=5)
    values = own.values()
    if args.profile is not None:
        pace = {"profile": args.profile, "time_scale": args.time_scale}
        for part in ("target", "drafter"):
            values[part]["pace"] = pace
        if values.get("speculative") is not None:  # what is slow on purpose is not late
            late_ms = SpeculativeConfig.model_fields["draft_timeout_ms"].default
            values["speculative"]["draft_timeout_ms"] = late_ms * args.time_scale
    values["drafter"]["max_sessions"] = 2 * max_num_seqs
    # Prompts come again and again: none is to be found from the time before.
    values["target"]["enable_prefix_caching"] = False
    return values
