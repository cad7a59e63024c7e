"""The options of ``dspark bench widen``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cluster.cli.drafters import DEFAULT_DRAFTER, DEFAULT_TARGET, note, positive

if TYPE_CHECKING:
    from cluster.bench.report import Report

# Fields of ``cluster.bench.widen_shape.Shape``.
_SIZES = {
    "hidden_size": "width of the residual stream, of target and drafter",
    "intermediate_size": "width inside the MLPs, of both",
    "num_layers": "layers of the target",
    "num_heads": "query heads, of both",
    "num_kv_heads": "key and value heads, of both",
    "head_dim": "size of a head, of both: a multiple of what it is",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the suite's options; ``--out``, which every suite has, is required here."""
    parser.add_argument("--target", default=DEFAULT_TARGET, metavar="DIR")
    drafter = parser.add_mutually_exclusive_group()
    drafter.add_argument("--drafter", default=DEFAULT_DRAFTER.partition("=")[2], metavar="DIR")
    drafter.add_argument("--no-drafter", action="store_true", help="widen the target alone")
    for name, text in _SIZES.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=positive, metavar="N", help=f"{text} (default: 135M)")
    parser.add_argument(
        "--drafter-layers", type=positive, metavar="N", help="default: as many as it has"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--prompts", type=positive, default=4, metavar="N", help="to compare the pairs on (4)"
    )


def run(args: argparse.Namespace) -> Report:
    """Runs the suite. Raises: cluster.errors for sizes that cannot be, and checkpoints."""
    from dataclasses import replace

    import torch

    from cluster.bench import widen
    from cluster.errors import ConfigError

    if args.out is None:
        raise ConfigError("--out", "is missing: the folder for the checkpoints")
    given = {name: value for name in _SIZES if (value := getattr(args, name)) is not None}
    return widen.run(
        target=args.target,
        drafter=None if args.no_drafter else args.drafter,
        shape=replace(widen.DEFAULT_SHAPE, **given),
        drafter_layers=args.drafter_layers,
        out=args.out,
        dtype=getattr(torch, args.dtype),
        num_prompts=args.prompts,
        note=note,
    )
