"""Suite ``widen``: a small trained pair in models of a larger shape, of the same function.

The target and its DSpark drafter are embedded in networks of any larger shape
(``cluster.bench.widen_shape`` has the algebra) and written as ordinary checkpoints. Both pairs are
then loaded from their files and compared on held-out code: what the target says, and what the
drafter says from the target's features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.bench.prompt_sets import HELDOUT_CODE, load_prompt_set
from cluster.bench.report import Report
from cluster.bench.widen_checkpoint import carry_calibration, write_drafter, write_target
from cluster.bench.widen_shape import Shape
from cluster.engine.target_model import load_model
from cluster.engine.worker import load_tokenizer
from cluster.errors import ConfigError
from cluster.models.checkpoint import load_drafter
from cluster.models.hub import local_folder
from cluster.models.tensor_headers import read_headers
from cluster.training.features import FeatureTarget

# 135M parameters with a vocabulary of 4096; every factor is a power of two from stdlib-7m.
DEFAULT_SHAPE = Shape(
    hidden_size=768,
    intermediate_size=2560,
    num_layers=16,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
)
MAX_LOGIT_DIFFERENCE = 1e-4

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

    It passes where in fp32 no logit of target or drafter and no logit of a confidence differs by
    more than ``MAX_LOGIT_DIFFERENCE``. Where the shape makes factors that are no powers of two,
    rounding the weights to ``dtype`` is part of the difference, and the bar is for fp32 weights.

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
    for source in (narrow.target, narrow.drafter):
        if source is not None and source.resolve().is_relative_to(out.resolve()):
            raise ConfigError("--out", f"{out} holds {source}, which would be written over")
    widening = write_target(narrow.target, wide.target, shape, dtype)
    figures: dict[str, Any] = {
        "target": str(wide.target),
        "shape": asdict(shape),
        "layers": list(widening.layers),
        "is_exact": widening.is_exact,
    }
    if narrow.drafter is not None and wide.drafter is not None:
        own = write_drafter(narrow.drafter, wide.drafter, widening, drafter_layers, dtype)
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
        figures["is_exact"] &= own.is_exact
    figures["parameters"] = {
        name: _count_parameters(folder)
        for name, folder in asdict(wide).items()
        if folder is not None
    }
    note(f"wrote {out}")
    prompts = load_prompt_set(
        HELDOUT_CODE,
        load_tokenizer(target),
        count=num_prompts,
        num_tokens=_PROMPT_TOKENS,
        max_tokens=_PROMPT_TOKENS,
    ).prompts
    figures["equality"] = rows = [
        compare(narrow, wide, prompts, kind) for kind in dict.fromkeys([torch.float32, dtype])
    ]
    worst = max(v for k, v in rows[0].items() if k.endswith("difference"))
    must_hold = figures["is_exact"] or dtype == torch.float32
    return Report("widen", figures, passed=not must_hold or worst <= MAX_LOGIT_DIFFERENCE)


@torch.inference_mode()
def compare(
    narrow: Pair, wide: Pair, prompts: Sequence[Sequence[int]], dtype: torch.dtype
) -> dict[str, Any]:
    """How far two pairs are apart, teacher-forced on the same text.

    Args:
        prompts: token ids, each longer than the drafter's block.
        dtype: of weights and arithmetic.

    Returns:
        Largest differences of logits, and shares of positions with the same best token; for the
        drafter over all slots of blocks behind every eighth position.
    """
    ours, theirs = (_outputs(pair, prompts, dtype) for pair in (narrow, wide))
    figures: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
    for name in ours:
        first, second = ours[name], theirs[name]
        figures[f"{name}_difference"] = float((first - second).abs().max())
        if first.dim() > 1:
            same = (first.argmax(-1) == second.argmax(-1)).float()
            figures[f"{name}_same_best"] = float(same.mean())
    return figures


def _outputs(
    pair: Pair, prompts: Sequence[Sequence[int]], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What a pair says of the prompts: ``logits [N, V]``; with a drafter ``draft_logits [M, V]``
    and, if it has them, ``confidence_logits [M]``; fp32."""
    drafter = None if pair.drafter is None else load_drafter(pair.drafter, dtype)
    layers = () if drafter is None else drafter.config.target_layer_ids
    target = FeatureTarget(load_model(str(pair.target), dtype, "sdpa"), layers)
    found: dict[str, list[torch.Tensor]] = {}
    for prompt in prompts:
        token_ids = torch.tensor([prompt])
        features, logits = target.run(token_ids)
        outputs = {"logits": logits}
        if drafter is not None:
            block = drafter.config.block_size
            anchors = torch.arange(0, len(prompt) - block, _ANCHOR_STRIDE)[None]
            hidden = drafter.packed_hidden(token_ids, drafter.project_features(features), anchors)
            before = token_ids[0, anchors[..., None] + torch.arange(block)]
            outputs["draft_logits"] = drafter.block_logits(hidden, before)
            if drafter.confidence_head is not None:
                outputs["confidence_logits"] = drafter.confidence_logit(hidden, before)
        for name, value in outputs.items():
            width = value.shape[-1:] if name != "confidence_logits" else ()
            found.setdefault(name, []).append(value.float().reshape(-1, *width))
    return {name: torch.cat(values) for name, values in found.items()}


def _count_parameters(folder: Path) -> int:
    return sum(math.prod(entry.shape) for entry in read_headers(folder).values())
