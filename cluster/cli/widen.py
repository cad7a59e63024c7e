"""The options of ``dspark bench widen``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cluster.cli.drafters import DEFAULT_DRAFTER, DEFAULT_TARGET, note, positive

if TYPE_CHECKING:
    from cluster.bench.report import Report

# Fields of ``cluster.bench.widen_shape.Shape``: 135M parameters with stdlib-7m's vocabulary, and
# factors that are powers of two.
_SIZES = {
    "hidden_size": (768, "width of the residual stream, of target and drafter"),
    "intermediate_size": (2560, "width inside the MLPs, of both"),
    "num_layers": (16, "layers of the target"),
    "num_heads": (8, "query heads, of both"),
    "num_kv_heads": (4, "key and value heads, of both"),
    "head_dim": (128, "size of a head, of both: a multiple of what it is"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the suite's options; ``--out``, which every suite has, is required here."""
    parser.add_argument("--target", default=DEFAULT_TARGET, metavar="DIR")
    drafter = parser.add_mutually_exclusive_group()
    drafter.add_argument("--drafter", default=DEFAULT_DRAFTER.partition("=")[2], metavar="DIR")
    drafter.add_argument("--no-drafter", action="store_true", help="widen the target alone")
    for name, (size, text) in _SIZES.items():
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=positive,
            default=size,
            metavar="N",
            help=f"{text} (default {size})",
        )
    parser.add_argument(
        "--drafter-layers", type=positive, metavar="N", help="default: as many as it has"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--prompts", type=positive, default=4, metavar="N", help="to compare the pairs on (4)"
    )


def run(args: argparse.Namespace) -> Report:
    """Runs the suite. Raises: cluster.errors for sizes that cannot be, and checkpoints."""
    import torch

    from cluster.bench import widen
    from cluster.bench.widen_shape import Shape
    from cluster.errors import ConfigError

    if args.out is None:
        raise ConfigError("--out", "is missing: the folder for the checkpoints")
    return widen.run(
        target=args.target,
        drafter=None if args.no_drafter else args.drafter,
        shape=Shape(**{name: getattr(args, name) for name in _SIZES}),
        drafter_layers=args.drafter_layers,
        out=args.out,
        dtype=getattr(torch, args.dtype),
        num_prompts=args.prompts,
        note=note,
    )
