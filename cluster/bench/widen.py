"""Suite ``widen``: a small trained pair in models of a larger shape, of the same function.

The target and its DSpark drafter are embedded in networks of any larger shape
(``cluster.bench.widen_shape`` has the algebra) and written as ordinary checkpoints. Both pairs are
then loaded from their files and compared on held-out code: what the target says, and what the
drafter says from the target's features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.bench.prompt_sets import HELDOUT_CODE, load_prompt_set
from cluster.bench.report import Report
from cluster.bench.widen_checkpoint import (
    carry_calibration,
    drafter_widening,
    target_widening,
    write_drafter,
    write_target,
)
from cluster.bench.widen_shape import Shape
from cluster.engine.target_config import load_tokenizer
from cluster.engine.target_model import load_model
from cluster.errors import ConfigError
from cluster.models.checkpoint import load_drafter
from cluster.models.hub import local_folder
from cluster.models.tensor_headers import read_headers
from cluster.training.features import FeatureTarget

MAX_LOGIT_DIFFERENCE = 1e-4

_HEADER_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16"}
_PROMPT_TOKENS = 160
_ANCHOR_STRIDE = 8


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Folders of a target and of its drafter, ``None`` for no drafter."""

    target: Path
    drafter: Path | None


def run(
    *,
    target: str,
    drafter: str | None,
    shape: Shape,
    drafter_layers: int | None,
    out: Path,
    dtype: torch.dtype = torch.bfloat16,
    num_prompts: int = 4,
    note: Callable[[str], None] = lambda text: None,
) -> Report:
    """The suite: writes ``out/target`` and ``out/drafter`` and compares the pairs.

    It passes where in fp32 no logit of target, drafter or confidence is further from the narrow
    pair's than ``MAX_LOGIT_DIFFERENCE``; this is not asked of weights that ``dtype`` has rounded
    (``is_rounded`` in the figures).

    Args:
        target: a Qwen3 checkpoint.
        drafter: its DSpark or DFlash drafter with Qwen3 layers; ``None``: the target alone.
        shape: of the wide target, and but for its layers of the wide drafter.
        drafter_layers: of the wide drafter; ``None``: as many as the narrow one has.
        dtype: of the written weights.
        num_prompts: windows of held-out code to compare on.

    Raises:
        CheckpointError: a checkpoint cannot be read, or is of another architecture.
        ConfigError: names the option of a size that cannot be.
    """
    narrow = Pair(target=local_folder(target), drafter=local_folder(drafter) if drafter else None)
    wide = Pair(target=out / "target", drafter=out / "drafter" if drafter else None)
    figures = write_pair(narrow, wide, shape, drafter_layers, dtype)
    note(f"wrote {out}")
    prompts = load_prompt_set(
        HELDOUT_CODE,
        load_tokenizer(target),
        count=num_prompts,
        num_tokens=_PROMPT_TOKENS,
        max_tokens=_PROMPT_TOKENS,
    ).prompts
    runs = [("wide", wide, torch.float32)]
    if dtype != torch.float32:
        # What rounding does to the narrow pair is what there is to be expected of the wide one.
        runs += [("narrow", narrow, dtype), ("wide", wide, dtype)]
    reference = outputs(narrow, prompts, torch.float32)
    rows = [differences(reference, outputs(pair, prompts, kind)) for _, pair, kind in runs]
    figures["equality"] = [
        {"model": name, "dtype": _name(kind), **row}
        for (name, _, kind), row in zip(runs, rows, strict=True)
    ]
    worst = max(value for name, value in rows[0].items() if name.endswith("difference"))
    passed = worst <= MAX_LOGIT_DIFFERENCE or figures["is_rounded"]
    return Report("widen", figures, passed)


def write_pair(
    narrow: Pair, wide: Pair, shape: Shape, drafter_layers: int | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Writes the wide pair; arguments and errors as ``run``. Everything is checked but the weights
    before anything is written.

    Returns:
        What was written; not ``is_rounded`` where every weight is exactly what it should be.
    """
    for source in (narrow.target, narrow.drafter):
        if source is not None and source.resolve() in (path.resolve() for path in _folders(wide)):
            raise ConfigError("--out", f"{source} would be written over")
    widening = target_widening(narrow.target, shape)
    is_exact = widening.is_exact
    figures: dict[str, Any] = {"target": str(wide.target), "shape": asdict(shape)}
    if narrow.drafter is None or wide.drafter is None:
        write_target(narrow.target, wide.target, widening, dtype)
    else:
        own = drafter_widening(narrow.drafter, narrow.target, widening, drafter_layers)
        is_exact &= own.is_exact
        write_target(narrow.target, wide.target, widening, dtype)
        write_drafter(narrow.drafter, wide.drafter, widening, own, dtype)
        figures |= {
            "drafter": str(wide.drafter),
            "drafter_layers": own.wide.num_layers,
            "is_calibrated": carry_calibration(
                drafter=narrow.drafter,
                target=narrow.target,
                wide_drafter=wide.drafter,
                wide_target=wide.target,
            ),
        }
    dtypes = {entry.dtype for folder in _folders(narrow) for entry in read_headers(folder).values()}
    return figures | {
        "layers": list(widening.layers),
        "is_rounded": dtype != torch.float32
        and not (is_exact and dtypes == {_HEADER_NAMES[dtype]}),
        "parameters": {folder.name: _count_parameters(folder) for folder in _folders(wide)},
    }


def differences(reference: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, float]:
    """How far outputs are from a reference's: by name the largest difference, and the share of
    positions with the same best token."""
    figures: dict[str, float] = {}
    for name, expected in reference.items():
        figures[f"{name}_difference"] = float((found[name] - expected).abs().max())
        if expected.dim() > 1:
            is_same = found[name].argmax(-1) == expected.argmax(-1)
            figures[f"{name}_same_best"] = float(is_same.double().mean())
    return figures


@torch.inference_mode()
def outputs(pair: Pair, prompts: Sequence[Sequence[int]], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a pair says, teacher-forced on the prompts.

    Args:
        prompts: token ids, each longer than the drafter's block.
        dtype: of weights and arithmetic.

    Returns:
        ``logits [N, V]`` of every position; with a drafter ``draft_logits [M, V]`` of every slot
        of the blocks behind every eighth position and, if it has them, ``confidence_logits [M]``;
        all fp32.
    """
    drafter = None if pair.drafter is None else load_drafter(pair.drafter, dtype)
    layers = () if drafter is None else drafter.config.target_layer_ids
    target = FeatureTarget(load_model(str(pair.target), dtype, "sdpa"), layers)
    found: dict[str, list[Tensor]] = {}
    for prompt in prompts:
        token_ids = torch.tensor([prompt])
        features, logits = target.run(token_ids)
        said = {"logits": logits}
        if drafter is not None:
            block = drafter.config.block_size
            anchors = torch.arange(0, len(prompt) - block, _ANCHOR_STRIDE)[None]
            hidden = drafter.packed_hidden(token_ids, drafter.project_features(features), anchors)
            before = token_ids[0, anchors[..., None] + torch.arange(block)]
            said["draft_logits"] = drafter.block_logits(hidden, before)
            if drafter.confidence_head is not None:
                said["confidence_logits"] = drafter.confidence_logit(hidden, before)
        for name, value in said.items():
            width = value.shape[-1:] if name != "confidence_logits" else ()
            found.setdefault(name, []).append(value.float().reshape(-1, *width))
    return {name: torch.cat(values) for name, values in found.items()}


def _folders(pair: Pair) -> list[Path]:
    return [pair.target] if pair.drafter is None else [pair.target, pair.drafter]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count_parameters(folder: Path) -> int:
    return sum(math.prod(entry.shape) for entry in read_headers(folder).values())
