"""The options of ``dspark bench load`` and ``dspark bench overhead``."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli.drafters import (
    DEFAULT_DRAFTER,
    DEFAULT_TARGET,
    drafters_of,
    note,
    positive,
    sampling_temperature,
)

if TYPE_CHECKING:
    from cluster.bench.load_shape import LoadShape
    from cluster.bench.own_serving import OwnSettings
    from cluster.bench.report import Report

_CONCURRENCIES = [1, 2, 4, 8, 16, 32]
_OVERHEAD_CONCURRENCY = 16


def add_own(parser: argparse.ArgumentParser) -> None:
    """Adds how our side serves."""
    parser.add_argument("--target", default=DEFAULT_TARGET, metavar="DIR")
    parser.add_argument(
        "--drafter",
        default=DEFAULT_DRAFTER,
        metavar="METHOD=DIR",
        help=f"also ngram, and none (default {DEFAULT_DRAFTER})",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--num-threads", type=positive, metavar="N", help="of the target (default: all cores)"
    )
    parser.add_argument("--drafter-threads", type=positive, default=1, metavar="N")
    parser.add_argument(
        "--enforce-eager", action="store_true", help="run layer by layer, as `enforce_eager`"
    )
    parser.add_argument(
        "--scheduler",
        choices=["prefix", "full"],
        default="prefix",
        help="how much of a block is verified, as `speculative.scheduler` (default prefix)",
    )
    parser.add_argument(
        "--num-speculative-tokens",
        type=positive,
        default=7,
        metavar="N",
        help="of methods whose checkpoint has no block (7)",
    )


def add_shape(parser: argparse.ArgumentParser, *, waves: int) -> None:
    """Adds what the requests are, but for how many run at once."""
    parser.add_argument(
        "--waves",
        type=positive,
        default=waves,
        metavar="N",
        help=f"requests at each concurrency, as a multiple of it (default {waves})",
    )
    parser.add_argument("--min-requests", type=positive, default=4, metavar="N")
    parser.add_argument("--prompt-tokens", type=positive, default=128, metavar="N")
    parser.add_argument("--max-tokens", type=positive, default=128, metavar="N")
    parser.add_argument("--temperature", type=sampling_temperature, default=0.0, metavar="T")
    parser.add_argument(
        "--data",
        default="stdlib-heldout",
        metavar="DATA",
        help="stdlib-heldout, or a JSONL file of prompts",
    )


def own_of(args: argparse.Namespace, num_threads: int | None = None) -> OwnSettings:
    """What ``add_own`` has read; ``num_threads`` is the target's where none are given."""
    from cluster.bench.own_serving import OwnSettings
    from cluster.engine.machine import num_cores

    drafter = None if args.drafter == "none" else drafters_of([args.drafter])[0]
    return OwnSettings(
        target=args.target,
        drafter=drafter,
        dtype=args.dtype,
        num_threads=args.num_threads or num_threads or num_cores(),
        drafter_threads=args.drafter_threads,
        scheduler=args.scheduler,
        num_speculative_tokens=args.num_speculative_tokens,
        enforce_eager=args.enforce_eager,
    )


def shape_of(args: argparse.Namespace, concurrencies: list[int]) -> LoadShape:
    """What ``add_shape`` has read."""
    from cluster.bench.load_shape import LoadShape

    return LoadShape(
        concurrencies=tuple(sorted(set(concurrencies))),
        waves=args.waves,
        min_requests=args.min_requests,
        prompt_tokens=args.prompt_tokens,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
    )


@contextmanager
def log_folder(out: Path | None) -> Iterator[Path]:
    """The folder for logs: ``--out``, else one that is gone behind the block unless it fails."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        yield out.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="dspark-bench-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def check_plots(out: Path | None) -> None:
    """Raises ConfigError where a picture is wanted and cannot be drawn; before anything long."""
    if out is not None:
        from cluster.bench import plots

        plots.check_plots()


def plot_rows(rows: Sequence[dict[str, Any]], out: Path | None, name: str) -> None:
    """Draws the frontier as ``NAME.png`` into ``--out``, where that is given."""
    if out is not None:
        from cluster.bench.frontier_plot import plot_frontier

        out.mkdir(parents=True, exist_ok=True)
        plot_frontier(rows, out / f"{name}.png")


def add_load(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``load``."""
    parser.add_argument(
        "--server",
        default="engine",
        metavar="URL",
        help="engine (in this process, the default), grpc://HOST:PORT of a router, or the "
        "http://HOST:PORT of an OpenAI-compatible server with the same tokenizer",
    )
    add_own(parser)
    parser.add_argument(
        "--concurrency",
        action="append",
        type=positive,
        metavar="N",
        help="requests at once; repeatable (default 1, 2, 4, 8, 16 and 32)",
    )
    add_shape(parser, waves=4)
    parser.add_argument(
        "--trace",
        metavar="CSV",
        help="send requests when a trace has them (columns TIMESTAMP, ContextTokens, "
        "GeneratedTokens), with its lengths scaled to --context, instead",
    )
    parser.add_argument(
        "--requests", type=positive, default=100, metavar="N", help="of the trace (default 100)"
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="requests a second, on average (default: the trace's own)",
    )
    parser.add_argument(
        "--context",
        type=positive,
        default=1000,
        metavar="N",
        help="tokens of the trace's longest request after scaling (default 1000)",
    )


def run_load(args: argparse.Namespace) -> Report:
    """Runs ``load``. Raises: cluster.errors for bad options, data and checkpoints."""
    from cluster.bench import load
    from cluster.bench.arrival_trace import read_trace, scale_lengths, scale_rate
    from cluster.errors import ConfigError

    check_plots(args.out)
    own = own_of(args)
    if args.trace is None:
        shape = shape_of(args, args.concurrency or _CONCURRENCIES)
        report = load.run_closed(args.server, own, shape=shape, data=args.data)
        plot_rows(report.figures["rows"], args.out, "load")
        return report
    if args.rate is not None and not args.rate > 0:
        raise ConfigError("--rate", f"must be more than 0, got {args.rate}")
    if args.context < 3:
        raise ConfigError("--context", f"must be 3 or more, got {args.context}")
    arrivals = scale_lengths(read_trace(args.trace, args.requests), args.context)
    if args.rate is not None:
        arrivals = scale_rate(arrivals, args.rate)
    return load.run_trace(
        args.server, own, arrivals=arrivals, data=args.data, temperature=args.temperature
    )


def add_overhead(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``overhead``."""
    add_own(parser)
    parser.add_argument(
        "--concurrency",
        type=positive,
        default=_OVERHEAD_CONCURRENCY,
        metavar="N",
        help=f"requests at once (default {_OVERHEAD_CONCURRENCY})",
    )
    add_shape(parser, waves=4)
    parser.add_argument(
        "--runs", type=positive, default=5, metavar="N", help="paired runs (default 5)"
    )


def run_overhead(args: argparse.Namespace) -> Report:
    """Runs ``overhead``. Raises: cluster.errors."""
    from cluster.bench import overhead

    with log_folder(args.out) as folder:
        return overhead.run(
            own_of(args),
            shape=shape_of(args, [args.concurrency]),
            data=args.data,
            runs=args.runs,
            folder=folder,
            note=note,
        )
