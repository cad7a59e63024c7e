"""``dspark simulate``: what a fleet that is not here would do."""

from __future__ import annotations

import argparse
import functools
import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table

from cluster.cli.drafters import note, positive, wide_console

if TYPE_CHECKING:
    from cluster.bench.simulate import Workload
    from cluster.simulation.simulation import Detail
    from cluster.simulation.workload import ClosedLoop

_PICTURE_ROWS = 400


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds ``simulate`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "simulate",
        help="what a fleet that is not here would do, by the policies that serve",
        description="Runs a workload on the fleet that FLEET (YAML) describes: devices by their "
        "profiles, the policies that serve. docs/simulate.md has the file and worked examples.",
    )
    parser.add_argument("fleet", type=Path, metavar="FLEET")
    load = parser.add_argument_group("workload (one of the three)")
    load.add_argument("--trace", metavar="CSV", help="TIMESTAMP,ContextTokens,GeneratedTokens")
    load.add_argument(
        "--concurrency",
        action="append",
        type=positive,
        metavar="N",
        help="a closed loop; repeatable: the frontier, with plain decoding and every fixed number",
    )
    load.add_argument(
        "--step",
        action="append",
        type=_step,
        metavar="SECONDS:RATE",
        help="so many seconds of so many requests a second, at random; repeatable, in order",
    )
    shape = parser.add_argument_group("its shape")
    shape.add_argument("--requests", type=positive, metavar="N", help="of the trace; default all")
    shape.add_argument(
        "--repeat",
        type=positive,
        default=1,
        metavar="N",
        help="the trace N times, from the second on with a minute's jitter",
    )
    shape.add_argument("--rate-scale", type=_above_zero, default=1.0, metavar="X", help="faster")
    shape.add_argument("--prompt-tokens", type=positive, default=128, metavar="N")
    shape.add_argument("--output-tokens", type=positive, default=256, metavar="N")
    shape.add_argument("--duration", type=_above_zero, default=120.0, metavar="S", help="of a loop")
    shape.add_argument("--warm-up", type=_above_zero, default=10.0, metavar="S", help="before it")
    parser.add_argument("--replicas", type=positive, metavar="N", help="instead of the file's")
    parser.add_argument(
        "--drafters",
        action="append",
        type=int,
        metavar="N",
        help="a pool of this size instead of the file's; repeatable: they are compared",
    )
    parser.add_argument(
        "--stretch",
        type=float,
        default=0.0,
        metavar="S",
        help="compute passes that do not differ together, up to so many seconds; for large fleets",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="simulate.json and a picture")
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command. Raises: cluster.errors for bad files and options."""
    from cluster.bench.fleet_files import read_fleet
    from cluster.bench.simulate import drafter_rows, fleet_of_size, frontier_rows, simulate
    from cluster.simulation.simulation import Detail

    _check(args)
    fleet = read_fleet(args.fleet)
    if args.replicas is not None:
        fleet = fleet_of_size(fleet, args.replicas)
    detail = Detail(stretch_s=args.stretch)
    if args.concurrency and len(args.concurrency) > 1:
        rows = frontier_rows(fleet, [_loop(args, n) for n in args.concurrency], note)
        return _show(args, {"rows": rows})
    workload, detail = _workload(args, fleet.config.seed, detail)
    if args.drafters:
        rows = drafter_rows(fleet, args.drafters, workload, detail, note)
        return _show(args, {"rows": rows})
    return _show(args, simulate(fleet, workload, detail))


def _check(args: argparse.Namespace) -> None:
    from cluster.errors import ConfigError

    given = [name for name in ("trace", "concurrency", "step") if getattr(args, name)]
    if len(given) != 1:
        raise ConfigError("workload", "give one of --trace, --concurrency and --step")
    if args.stretch < 0:
        raise ConfigError("--stretch", "must not be negative")
    if args.drafters and min(args.drafters) < 0:
        raise ConfigError("--drafters", "must not be negative")
    if args.drafters and args.concurrency and len(args.concurrency) > 1:
        raise ConfigError("--drafters", "compare pools at one --concurrency")
    if args.out is not None:
        from cluster.bench.plots import check_plots

        check_plots()
        args.out.mkdir(parents=True, exist_ok=True)


def _loop(args: argparse.Namespace, concurrency: int) -> ClosedLoop:
    from cluster.simulation.workload import ClosedLoop

    return ClosedLoop(
        concurrency, args.prompt_tokens, args.output_tokens, args.duration, args.warm_up
    )


def _workload(args: argparse.Namespace, seed: int, detail: Detail) -> tuple[Workload, Detail]:
    """The workload, and a detail whose timeline has few enough rows for a picture."""
    from dataclasses import replace

    from cluster.bench.arrival_trace import read_trace
    from cluster.simulation.workload import LoadStep, step_jobs, trace_jobs

    if args.concurrency:
        loop = _loop(args, args.concurrency[0])
        span_s = loop.duration_s + loop.warm_up_s
        return loop, replace(detail, sample_s=max(span_s / _PICTURE_ROWS, 0.1))
    if args.step:
        steps = [LoadStep(*step) for step in args.step]
        span_s = sum(step.duration_s for step in steps)
        jobs = functools.partial(
            step_jobs,
            steps,
            num_prompt_tokens=args.prompt_tokens,
            num_output_tokens=args.output_tokens,
            seed=seed,
        )
        return jobs, replace(detail, sample_s=max(span_s / _PICTURE_ROWS, 0.1))
    trace = read_trace(args.trace, args.requests or sys.maxsize)
    span_s = trace[-1].arrival_s * args.repeat / args.rate_scale
    jobs = functools.partial(
        trace_jobs, trace, repeat=args.repeat, rate_scale=args.rate_scale, seed=seed
    )
    return jobs, replace(detail, sample_s=max(span_s / _PICTURE_ROWS, 0.1))


def _show(args: argparse.Namespace, figures: dict[str, Any]) -> int:
    fleet = args.fleet.read_text(encoding="utf-8")
    command = shlex.join(["dspark", *sys.argv[1:]])
    document = json.dumps({"command": command, "fleet": fleet, "figures": figures})
    if args.out is not None:
        from cluster.bench.simulation_plot import plot_rows, plot_timeline

        (args.out / "simulate.json").write_text(document + "\n", encoding="utf-8")
        if "rows" in figures:
            plot_rows(figures["rows"], args.out / "simulate.png")
        elif figures["timeline"]:
            plot_timeline(figures, args.out / "simulate.png")
    if args.json:
        print(document)
    elif "rows" in figures:
        wide_console().print(_rows_table(figures["rows"]))
    else:
        wide_console().print(_figures_table(figures))
    return 0


def _rows_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE)
    flat = [_flat(row) for row in rows]
    for name in flat[0]:
        table.add_column(name, justify="right")
    for row in flat:
        table.add_row(*(_cell(row.get(name)) for name in flat[0]))
    return table


def _figures_table(figures: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE, show_header=False)
    for name, value in figures.items():
        if name == "timeline":
            continue
        if name == "drafter_changes":
            value = "; ".join(f"{c['time_s']:g} s: {c['wanted']}" for c in value)
        elif isinstance(value, dict):
            value = ", ".join(f"{key} {_cell(entry)}" for key, entry in value.items())
        table.add_row(name.replace("_", " "), _cell(value))
    return table


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """With the fixed numbers as columns of their own."""
    flat = {name: value for name, value in row.items() if not isinstance(value, dict)}
    flat |= {f"fixed {n}": v for n, v in row.get("fixed", {}).items() if n != "plain"}
    return flat


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _step(text: str) -> tuple[float, float]:
    seconds, _, rate = text.partition(":")
    step = float(seconds), float(rate)
    if not (0 < step[0] < math.inf and 0 <= step[1] < math.inf):
        raise argparse.ArgumentTypeError(f"must be SECONDS:RATE, got {text}")
    return step


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value
