"""``dspark bench``: measurements that stand behind the project's claims."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.cli.calibrate import add_plan, plan_of
from cluster.cli.chaos import add_chaos, add_drafter_loss, run_chaos, run_drafter_loss
from cluster.cli.drafters import (
    DEFAULT_DRAFTER,
    DEFAULT_TARGET,
    drafters_of,
    note,
    positive,
    settings_of,
)
from cluster.cli.eval import add_comparison, comparison_of
from cluster.cli.frontier import (
    add_burst,
    add_frontier,
    add_pipeline,
    run_burst,
    run_frontier,
    run_pipeline,
)
from cluster.cli.fuzz import add_arguments as add_fuzz
from cluster.cli.fuzz import run as run_fuzz
from cluster.cli.load import add_load, add_overhead, run_load, run_overhead
from cluster.cli.pool import add_arguments as add_pool
from cluster.cli.pool import run as run_pool
from cluster.cli.router import add_arguments as add_router
from cluster.cli.router import run as run_router
from cluster.cli.simulator import add_arguments as add_simulator
from cluster.cli.simulator import run as run_simulator
from cluster.cli.speed import add_arguments as add_speed
from cluster.cli.speed import run as run_speed
from cluster.cli.widen import add_arguments as add_widen
from cluster.cli.widen import run as run_widen

if TYPE_CHECKING:
    from cluster.bench.report import Report


class _Suite(NamedTuple):
    """A suite: its line of help, its options, and what runs it (``cluster.bench`` has the rest)."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Report]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds ``bench`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure: " + ", ".join(_SUITES),
        description="Runs a suite, prints its figures, and fails where the suite's own bar does "
        "not hold.",
    )
    suites = parser.add_subparsers(metavar="SUITE", required=True)
    for name, suite in _SUITES.items():
        suite_parser = suites.add_parser(name, help=suite.help, description=suite.help)
        suite.add_arguments(suite_parser)
        suite_parser.add_argument(
            "--out", type=Path, metavar="DIR", help="write the report there, as SUITE.json"
        )
        suite_parser.add_argument(
            "--json",
            action="store_true",
            default=argparse.SUPPRESS,  # else it would undo a --json before the suite's name
            help="print exactly one JSON object on standard output",
        )
        suite_parser.set_defaults(run_suite=suite.run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the suite. Returns 1 where its own bar does not hold."""
    report = args.run_suite(args)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"{report.suite}.json"
        path.write_text(report.to_json() + "\n", encoding="utf-8")
    print(report.to_json() if args.json else report.to_text())
    return 0 if report.passed else 1


def _add_parity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", default=DEFAULT_TARGET, metavar="DIR")
    parser.add_argument("--drafter", default=DEFAULT_DRAFTER.partition("=")[2], metavar="DIR")
    parser.add_argument("--prompts", type=positive, default=100, metavar="N")
    parser.add_argument("--max-tokens", type=positive, default=48, metavar="N")
    parser.add_argument("--address", help="running cluster; unset: an engine in this process")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of that engine")


def _run_parity(args: argparse.Namespace) -> Report:
    from cluster.bench import parity

    return parity.run(
        target=args.target,
        drafter=args.drafter,
        num_prompts=args.prompts,
        max_tokens=args.max_tokens,
        address=args.address,
        device=args.device,
    )


def _add_drafters(parser: argparse.ArgumentParser) -> None:
    add_comparison(parser)
    parser.add_argument(
        "--baseline",
        action="append",
        metavar="NAME",
        help="one of the drafters, that the others are compared with prompt by prompt; repeatable",
    )


def _run_drafters(args: argparse.Namespace) -> Report:
    from cluster.bench import drafters, plots

    if args.out is not None:
        plots.check_plots()
    report = drafters.run(
        drafters=drafters_of(args.drafter),
        baselines=args.baseline or [],
        comparison=comparison_of(args),
        settings=settings_of(args),
        note=note,
    )
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        plots.plot_positions(report.figures["rows"], args.out)
    return report


def _run_calibration(args: argparse.Namespace) -> Report:
    from cluster.bench import calibration

    (drafter,) = drafters_of([args.drafter])
    return calibration.run(
        drafter=drafter, plan=plan_of(args), settings=settings_of(args), note=note
    )


def _add_verify_curve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", default=DEFAULT_TARGET, metavar="DIR")
    parser.add_argument("--batches", type=positive, default=60, metavar="N")


def _run_verify_curve(args: argparse.Namespace) -> Report:
    from cluster.bench import verify_curve

    return verify_curve.run(target=args.target, num_batches=args.batches)


def _add_gpu_steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-layers", type=positive, default=36, metavar="N")
    parser.add_argument("--repeats", type=positive, default=15, metavar="N", help="of each size")


def _run_gpu_steps(args: argparse.Namespace) -> Report:
    from cluster.bench import gpu_steps

    return gpu_steps.run(num_layers=args.num_layers, repeats=args.repeats, note=note)


_SUITES = {
    "parity": _Suite(
        "held-out prompts, greedy and seeded, all at once, judged position by position against "
        "plain transformers on the same checkpoint",
        _add_parity,
        _run_parity,
    ),
    "drafters": _Suite(
        "acceptance of several drafters by position, on the same prompts, as `dspark eval`",
        _add_drafters,
        _run_drafters,
    ),
    "calibration": _Suite(
        "a drafter's confidences fitted on training prompts, their error before and after on "
        "held-out ones, as `dspark calibrate` without writing a file",
        add_plan,
        _run_calibration,
    ),
    "verify_curve": _Suite(
        "times of mixed batches, predicted from batch tokens alone and with their context, against "
        "measured ones",
        _add_verify_curve,
        _run_verify_curve,
    ),
    "gpu-steps": _Suite(
        "steps of a target of Qwen3-8B's shape, with random weights, on a CUDA device, against the "
        "time to read the weights once",
        _add_gpu_steps,
        _run_gpu_steps,
    ),
    "load": _Suite(
        "throughput, latencies, acceptance and budget of an engine in this process, of a cluster "
        "over gRPC or of an OpenAI-compatible server, at fixed concurrencies or from a trace",
        add_load,
        run_load,
    ),
    "speed": _Suite(
        "our plain steps and our cluster's throughput against vLLM's on the same cores, and the "
        "time per token against its formula",
        add_speed,
        run_speed,
    ),
    "overhead": _Suite(
        "the whole cluster over gRPC against the engine in this process: throughput, first token",
        add_overhead,
        run_overhead,
    ),
    "router": _Suite(
        "choosing among many replicas, and conversations over four of them with prefixes followed, "
        "without regard to them, and at random, on a clock of their own",
        add_router,
        run_router,
    ),
    "frontier": _Suite(
        "throughput over load: adaptive speculation against every fixed number of draft tokens and "
        "against none, in turn",
        add_frontier,
        run_frontier,
    ),
    "pipeline": _Suite(
        "whether a delayed drafter is hidden behind verifying, what two groups bring, and tokens "
        "per second and device with remote drafters and with one on the target's device",
        add_pipeline,
        run_pipeline,
    ),
    "burst": _Suite(
        "load that rises from light to three times saturation and falls again, with adaptive "
        "speculation and without any",
        add_burst,
        run_burst,
    ),
    "fuzz": _Suite(
        "broken messages against what clients, replicas and drafters send, and against the "
        "configuration: by functions, guided by their branches, and through live sockets",
        add_fuzz,
        run_fuzz,
    ),
    "pool": _Suite(
        "drafters that come with the load, go to zero when speculation is off and come back, on a "
        "cluster that is paced as GPUs",
        add_pool,
        run_pool,
    ),
    "chaos": _Suite(
        "a paced cluster on four hosts of this machine (root, Linux) whose parts are killed or "
        "stopped and whose links are cut or slow, under load: what is lost, changed or left",
        add_chaos,
        run_chaos,
    ),
    "drafter-loss": _Suite(
        "throughput of a paced cluster on two hosts of this machine (root, Linux) without its "
        "drafters, and with drafters that answer after 2 s, against no speculation",
        add_drafter_loss,
        run_drafter_loss,
    ),
    "simulator": _Suite(
        "predictions of `dspark simulate`, from profiles alone, against a measured frontier, and "
        "the time that a day of a trace takes it",
        add_simulator,
        run_simulator,
    ),
    "widen": _Suite(
        "a small trained target and its drafter in models of a larger shape whose outputs are the "
        "same, written to the folders target and drafter in --out and compared",
        add_widen,
        run_widen,
    ),
}
