"""A tiny drafter with random weights, and rounds for it."""

from __future__ import annotations

from typing import Any

import torch

from cluster.config import DrafterConfig
from cluster.engine.draft_block import BlockMethod
from cluster.engine.draft_client import DraftClient, DraftRound, DraftSequence, SessionKey
from cluster.engine.draft_engine import DraftEngine
from cluster.models.checkpoint import build_drafter
from cluster.models.dspark import DSparkConfig, DSparkDrafter

VOCAB = 50
D = 32
BLOCK = 5


def make_drafter(*, head: str = "vanilla", max_positions: int = 128) -> DSparkDrafter:
    """A drafter whose weights are the same each time, large enough that contexts matter."""
    generator = torch.Generator().manual_seed(3)
    drafter = build_drafter(
        DSparkConfig(
            vocab_size=VOCAB,
            hidden_size=D,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=max_positions,
            block_size=BLOCK,
            target_layer_ids=(0, 1),
            num_target_layers=2,
            mask_token_id=VOCAB - 1,
            num_anchors=4,
            markov_rank=8,
            markov_head_type=head,
            enable_confidence_head=True,
            confidence_head_with_markov=True,
        )
    )
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return drafter.eval().requires_grad_(False)


def make_engine(
    drafter: DSparkDrafter, *, draft_top_k: int = 16, seed: int = 1, **options: Any
) -> DraftEngine:
    """A block engine with one MiB of pages; ``clock``, ``pace``, keys of DrafterConfig as options.

    The drafter is the engine's from then on.
    """
    extra = {name: options.pop(name) for name in ("clock", "pace") if name in options}
    config = DrafterConfig(
        **{"kv_cache_memory_mb": 1, "page_size": 4, "enforce_eager": True, **options}
    )
    generator = torch.Generator().manual_seed(seed)
    return DraftEngine(BlockMethod(drafter, config, draft_top_k, generator), config, **extra)


def append(
    engine: DraftEngine, replica: str, key: SessionKey, start: int, rows: torch.Tensor
) -> int | None:
    """Appends features with tokens that a block drafter does not look at."""
    return engine.append(replica, key, start, rows, (0,) * (len(rows) + 1))


def feed(client: DraftClient, key: SessionKey, start: int, rows: torch.Tensor) -> int:
    """The same through a client."""
    return client.feed(key, start, rows, (0,) * (len(rows) + 1))


def sequence(
    key: SessionKey,
    length: int,
    *,
    features: torch.Tensor | None = None,
    anchor: int = 3,
    count: int = BLOCK,
) -> tuple[DraftSequence, torch.Tensor]:
    """A sequence of a round and its feature rows (none by default)."""
    rows = torch.empty(0, D) if features is None else features
    return (
        DraftSequence(
            session=key,
            committed_length=length,
            num_features=len(rows),
            new_token_ids=(0,) * len(rows) + (anchor,),
            num_speculative_tokens=count,
        ),
        rows,
    )


def round_of(*parts: tuple[DraftSequence, torch.Tensor]) -> DraftRound:
    """A round of what ``sequence`` made."""
    return DraftRound(tuple(part for part, _ in parts), torch.cat([rows for _, rows in parts]))
