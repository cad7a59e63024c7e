"""``dspark profile``: what a target's steps cost here, as a table for scheduler and simulator."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cluster.cli.configuration import check_checkpoints
from cluster.cli.running import report_to_stderr
from cluster.config import ClusterConfig
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.engine.profile import CurveProfiler, StepProbe
    from cluster.speculation.verify_curve import VerifyCurve

# Of drafters whose checkpoint has no block, and of what is sampled on the wire.
_NUM_SPECULATIVE_TOKENS = 7
_DRAFT_TOP_K = 64
# Options that are the target's own configuration, by their key there.
_TARGET_OPTIONS: dict[str, tuple[type, str]] = {
    "tensor_parallel_size": (int, "shards of each layer"),
    "pipeline_parallel_size": (int, "stages of layers"),
    "dtype": (str, "float32, bfloat16 or float16"),
    "device": (str, "cpu or cuda"),
    "num_threads": (int, "CPU threads of each shard"),
    "max_model_len": (int, "longest context"),
    "max_num_seqs": (int, "requests in one batch"),
    "max_num_batched_tokens": (int, "tokens in one pass"),
    "page_size": (int, "tokens of one KV page"),
    "kv_cache_memory_mb": (int, "KV memory of each shard"),
}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds ``profile`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "profile",
        help="measure a target's verify curve",
        description="Measures whole steps of a target here, over batch tokens and context tokens "
        "(cached tokens, summed over the batch), and prints milliseconds. `target.verify_curve` "
        "takes the saved table. Options that are not given have the configuration's defaults.",
    )
    parser.add_argument("target", metavar="TARGET", help="checkpoint folder or hub id")
    for key, (kind, meaning) in _TARGET_OPTIONS.items():
        option = "--" + key.replace("_", "-")
        metavar = "N" if kind is int else "NAME"
        parser.add_argument(option, type=kind, metavar=metavar, help=meaning)
    parser.add_argument(
        "--deterministic", action="store_true", help="measure `deterministic: true`"
    )
    parser.add_argument(
        "--enforce-eager", action="store_true", help="measure `enforce_eager: true`"
    )
    parser.add_argument("--tokens", metavar="N,N,...", help="batch tokens; default: powers of two")
    parser.add_argument(
        "--contexts", metavar="N,N,...", help="context tokens; default: 0 and up to what fits"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="counted runs of each point (default 5)"
    )
    parser.add_argument("--out", metavar="FILE", help="save the table as JSON")
    parser.add_argument(
        "--drafter",
        metavar="METHOD=DIR",
        help="of --device-profile: its rounds are measured too, on one CPU thread",
    )
    parser.add_argument(
        "--device-profile",
        metavar="FILE",
        help="save both curves as a device profile (JSON), for paced runs and the simulator",
    )
    parser.add_argument("--plot", metavar="FILE", help="save a plot (PNG, PDF or SVG)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ConfigError: a value is wrong, before anything is loaded, or no batch can have a size that
            was asked for.
        CheckpointError: the target cannot be loaded.
    """
    values = {key: value for key in _TARGET_OPTIONS if (value := getattr(args, key)) is not None}
    values |= {"deterministic": args.deterministic, "enforce_eager": args.enforce_eager}
    config = ClusterConfig.parse({"target": {"model": args.target, **values}, **_drafter(args)})
    check_checkpoints(config)
    tokens = _sizes("--tokens", args.tokens, lowest=1)
    contexts = _sizes("--contexts", args.contexts, lowest=0)
    if contexts is not None:
        contexts = sorted({0, *contexts})
    if args.repeats < 1:
        raise ConfigError("--repeats", f"must be at least 1, got {args.repeats}")
    _check_files(args)
    from cluster.engine.machine import check_device, curve_origin

    check_device("target.device", config.target.device)
    from cluster.engine.local_shards import local_shards
    from cluster.engine.pages import PagePool
    from cluster.engine.profile import CurveProfiler, StepProbe
    from cluster.models.checkpoint import target_digest

    report_to_stderr(f"loading {args.target}")
    with local_shards(config) as runner:
        shard = runner.shard
        max_model_len = min(config.target.max_model_len or shard.max_model_len, shard.max_model_len)
        pages = PagePool(shard.num_pages, shard.page_size, shard.cache.release)
        probe = StepProbe(runner, pages, config.target, max_model_len)
        _check_sizes(probe, tokens, contexts)
        origin = curve_origin(config.target, target_digest(args.target), shard.execution)
        profiler = CurveProfiler(probe, origin, tokens=tokens, contexts=contexts)
        report_to_stderr(f"measuring {profiler.num_points} points {args.repeats} times")
        started = time.perf_counter()
        curve = profiler.profile_all(args.repeats)
        seconds = time.perf_counter() - started
    _write(args, curve)
    if args.device_profile is not None:
        _write_device_profile(args, config, curve)
    if args.json:
        result = {"target": args.target, "seconds": round(seconds, 3), "curve": curve.to_dict()}
        print(json.dumps(result))
    else:
        _print(curve, profiler)
    return 0


def _drafter(args: argparse.Namespace) -> dict[str, Any]:
    """Sections of the drafter to measure, if one is named."""
    if args.drafter is None:
        return {}
    if args.device_profile is None:
        raise ConfigError("--drafter", "is measured for --device-profile, which is not given")
    from cluster.bench.drafter_choice import DrafterChoice

    choice = DrafterChoice.parse(args.drafter)
    shape = {key: getattr(args, key) for key in ("dtype", "device") if getattr(args, key)}
    return {
        "speculative": choice.speculative(_NUM_SPECULATIVE_TOKENS, _DRAFT_TOP_K),
        "drafter": {**shape, "enforce_eager": args.enforce_eager},
    }


def _write_device_profile(
    args: argparse.Namespace, config: ClusterConfig, curve: VerifyCurve
) -> None:
    import torch

    from cluster.engine.draft_factory import build_draft_engine
    from cluster.engine.draft_profile import measure_draft_curve
    from cluster.engine.machine import accelerator_name, num_cores, processor_name
    from cluster.engine.profile_files import write_profile
    from cluster.speculation.device_profile import DeviceProfile

    draft_curve = None
    if config.speculative is not None:
        torch.set_num_threads(config.drafter.num_threads)
        draft_curve = measure_draft_curve(build_draft_engine(config))
    drafter = f", drafter {Path(args.drafter.partition('=')[2]).name}" if args.drafter else ""
    path = Path(args.device_profile)
    profile = DeviceProfile(
        name=path.stem,
        source=f"measured by `dspark profile` on {accelerator_name() or processor_name()}, "
        f"{num_cores()} cores: target {Path(args.target).name}{drafter}, {config.target.dtype}",
        target=curve,
        drafter=draft_curve,
    )
    write_profile(path, profile)
    report_to_stderr(f"saved {path}")


def _sizes(option: str, text: str | None, *, lowest: int) -> list[int] | None:
    if text is None:
        return None
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ConfigError(option, f"must be numbers with commas between, got '{text}'") from None
    if sizes[0] < lowest:
        raise ConfigError(option, f"must be at least {lowest}, got {sizes[0]}")
    return sizes


def _check_sizes(probe: StepProbe, tokens: list[int] | None, contexts: list[int] | None) -> None:
    """Refuses what would be left out of the table without a word."""
    limits = "raise --max-num-seqs, --max-model-len or --kv-cache-memory-mb"
    for size in tokens or ():
        if probe.shape(size, 0) is None:
            raise ConfigError("--tokens", f"no batch has {size} tokens; {limits}")
    sizes = tokens or probe.token_sizes()
    for context in contexts or ():
        if all(probe.shape(size, context) is None for size in sizes):
            raise ConfigError("--contexts", f"no batch has {context} context tokens; {limits}")


def _check_files(args: argparse.Namespace) -> None:
    """Refuses files that could not be written, before anything long."""
    files = (
        ("--out", args.out),
        ("--plot", args.plot),
        ("--device-profile", args.device_profile),
    )
    for option, name in files:
        if name is not None and not Path(name).resolve().parent.is_dir():
            raise ConfigError(option, f"no such folder: {Path(name).resolve().parent}")
    if args.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ConfigError("--plot", "needs matplotlib: pip install 'dspark-cluster[train]'")
        if Path(args.plot).suffix not in (".png", ".pdf", ".svg"):
            raise ConfigError("--plot", f"must end in .png, .pdf or .svg, got '{args.plot}'")


def _write(args: argparse.Namespace, curve: VerifyCurve) -> None:
    from cluster.engine.curve_files import write_curve

    if args.out is not None:
        write_curve(args.out, curve)
        report_to_stderr(f"saved {args.out}")
    if args.plot is not None:
        _plot(curve, Path(args.plot))
        report_to_stderr(f"saved {args.plot}")


def _print(curve: VerifyCurve, profiler: CurveProfiler) -> None:
    console = Console(highlight=False, soft_wrap=True)
    origin = curve.origin
    if origin is not None:
        console.print(
            f"milliseconds a step: tensor {origin.tensor_parallel_size} x pipeline "
            f"{origin.pipeline_parallel_size} shards, {origin.dtype}, {origin.num_threads} threads "
            f"on {origin.accelerator or origin.processor}"
        )
    table = Table(box=None, pad_edge=False)
    table.add_column("batch tokens", justify="right")
    for context in curve.context_tokens:
        table.add_column(f"context {context:.0f}", justify="right")
    for row, size in enumerate(curve.tokens):
        cells = [
            f"{1e3 * seconds:.2f}" if profiler.is_measured(row, column) else f"~{1e3 * seconds:.2f}"
            for column, seconds in enumerate(curve.table[row])
        ]
        table.add_row(f"{size:.0f}", *cells)
    console.print(table)
    console.print("~ no batch is so; taken to add what the nearest size adds")


def _plot(curve: VerifyCurve, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for column, context in enumerate(curve.context_tokens):
        label = f"{context:.0f} context tokens"
        axes.plot(curve.tokens, 1e3 * curve.table[:, column], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("batch tokens")
    axes.set_ylabel("milliseconds a step")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
