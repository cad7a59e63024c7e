"""The options of ``dspark bench speed``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli.drafters import note, positive
from cluster.cli.load import (
    add_own,
    add_shape,
    check_plots,
    log_folder,
    own_of,
    plot_rows,
    shape_of,
)
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.bench.report import Report
    from cluster.bench.speed import SpeedSettings

_PARTS = ["steps", "throughput", "formula"]
_CONCURRENCIES = [1, 2, 4, 8, 16, 32]
_BATCHES = [1, 4, 8, 16, 32]
_CONTEXTS = [150, 900]
# The peer's block of guesses, by mode: its best on the widened pair (docs/bench.md).
_PEER_TOKENS = 4
_QUICK_CONCURRENCIES = [1, 4]
_QUICK_TOKENS = 32
_QUICK_RUNS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the suite's options."""
    parser.add_argument(
        "--peer-venv",
        type=Path,
        required=True,
        metavar="DIR",
        help="virtual environment with vLLM's CPU build (docs/bench.md)",
    )
    parser.add_argument(
        "--peer-draft-model",
        metavar="DIR",
        help="draft model of the peer; unset: it is measured plain and with n-grams only",
    )
    parser.add_argument(
        "--peer-num-speculative-tokens",
        type=positive,
        default=_PEER_TOKENS,
        metavar="N",
        help=f"the peer's guesses a round (default {_PEER_TOKENS})",
    )
    parser.add_argument(
        "--cores", default="0,1", metavar="N,N", help="cores of both sides (default 0,1)"
    )
    add_own(parser)
    parser.add_argument(
        "--part",
        action="append",
        choices=_PARTS,
        help="repeatable (default all three); formula runs throughput as well",
    )
    parser.add_argument(
        "--runs", type=positive, default=5, metavar="N", help="paired runs (default 5)"
    )
    parser.add_argument(
        "--steps", type=positive, default=8, metavar="N", help="steps of a run that count (8)"
    )
    _add_sizes(parser, "--batch", "of the plain steps", _BATCHES)
    _add_sizes(parser, "--context-tokens", "of the plain steps", _CONTEXTS)
    _add_sizes(parser, "--concurrency", "of the throughput", _CONCURRENCIES)
    add_shape(parser, waves=2)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few and short runs, to see that everything works: figures of no worth",
    )


def run(args: argparse.Namespace) -> Report:
    """Runs the suite. Raises: cluster.errors."""
    from cluster.bench import speed

    check_plots(args.out)
    cores = _cores(args.cores)
    with log_folder(args.out) as folder:
        settings = _settings(args, cores, folder)
        settings.peer.check()
        # Whatever is started from here on runs there, on both sides, the load generator included.
        os.sched_setaffinity(0, cores)
        report = speed.run(settings, note)
    plot_rows(report.figures.get("sides", []), args.out, "speed")
    return report


def _settings(args: argparse.Namespace, cores: tuple[int, ...], folder: Path) -> SpeedSettings:
    from cluster.bench.peer import PeerSettings
    from cluster.bench.speed import SpeedSettings

    if args.quick:
        args.runs, args.waves, args.min_requests = _QUICK_RUNS, 1, 2
        args.max_tokens = min(args.max_tokens, _QUICK_TOKENS)
        args.batch = args.concurrency = _QUICK_CONCURRENCIES
    parts, concurrencies = args.part or _PARTS, args.concurrency or _CONCURRENCIES
    if "formula" in parts and 1 not in concurrencies:
        raise ConfigError("--concurrency", "must have 1 among them, for the part formula")
    own = own_of(args, num_threads=len(cores))
    return SpeedSettings(
        own=own,
        peer=PeerSettings(venv=args.peer_venv, target=own.target, dtype=own.dtype, cores=cores),
        peer_modes=_peer_modes(args),
        folder=folder,
        parts=tuple(parts),
        data=args.data,
        runs=args.runs,
        batches=tuple(args.batch or _BATCHES),
        contexts=tuple(args.context_tokens or _CONTEXTS),
        steps=args.steps,
        curve_repeats=1 if args.quick else 5,
        shape=shape_of(args, concurrencies),
    )


def _peer_modes(args: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    from cluster.bench.speed import DRAFT_MODEL, NGRAM, PLAIN

    count = {"num_speculative_tokens": args.peer_num_speculative_tokens}
    modes: dict[str, dict[str, Any] | None] = {
        PLAIN: None,
        NGRAM: {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4, **count},
    }
    if args.peer_draft_model is not None:
        model = str(Path(args.peer_draft_model).resolve())
        modes[DRAFT_MODEL] = {"method": "draft_model", "model": model, **count}
    return modes


def _add_sizes(
    parser: argparse.ArgumentParser, option: str, meaning: str, default: list[int]
) -> None:
    parser.add_argument(
        option,
        action="append",
        type=positive,
        metavar="N",
        help=f"{meaning}; repeatable (default {', '.join(map(str, default))})",
    )


def _cores(text: str) -> tuple[int, ...]:
    try:
        cores = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ConfigError("--cores", f"must be numbers with commas between, got {text!r}") from None
    missing = set(cores) - os.sched_getaffinity(0)
    if missing:
        raise ConfigError("--cores", f"this process may not use core {min(missing)}")
    return cores
