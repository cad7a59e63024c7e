"""Builds the draft engine that a configuration asks for."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from cluster.config import ClusterConfig
from cluster.engine.draft_autoregressive import AutoregressiveMethod, EntryNetwork
from cluster.engine.draft_block import BlockMethod
from cluster.engine.draft_causal_lm import CausalLMNetwork, load_causal_lm
from cluster.engine.draft_eagle3 import Eagle3Network
from cluster.engine.draft_engine import DraftEngine
from cluster.engine.draft_method import DraftMethod
from cluster.engine.draft_ngram import NgramMethod
from cluster.engine.draft_profile import measure_draft_curve
from cluster.engine.pace import draft_pace
from cluster.engine.target_config import load_text_config
from cluster.errors import ConfigError
from cluster.models.checkpoint import load_drafter
from cluster.models.drafter_check import check_drafter
from cluster.models.eagle3_checkpoint import load_eagle3
from cluster.models.hub import local_folder


def build_draft_engine(
    config: ClusterConfig,
    *,
    seed: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> DraftEngine:
    """The engine of the configured method, its checkpoint loaded.

    Args:
        config: with a ``speculative`` part.
        seed: of the drafter's own randomness; ``None`` takes a fresh one.
        clock: monotonic seconds.

    Raises:
        CheckpointError: a file is missing or broken, or was made for another target.
        ConfigError: method and checkpoint do not belong together, or memory does not suffice.
    """
    return DraftEngine(
        build_draft_method(config, seed=seed),
        config.drafter,
        clock=clock,
        pace=draft_pace(config.drafter.pace),
    )


def build_measured_draft_engine(config: ClusterConfig) -> DraftEngine:
    """``build_draft_engine`` with the curve of its passes, measured now unless a pace brings one.

    Raises: as it does.
    """
    engine = build_draft_engine(config)
    if engine.curve is None:
        engine.curve = measure_draft_curve(engine)
    return engine


def build_draft_method(config: ClusterConfig, *, seed: int | None = None) -> DraftMethod:
    """What ``build_draft_engine`` makes an engine of. Raises as it does."""
    speculative = config.speculative
    if speculative is None:
        raise ConfigError("speculative", "is unset: there is nothing to draft with")
    target = load_text_config(
        config.target.model, trust_remote_code=config.target.trust_remote_code
    )
    num_tokens = speculative.num_speculative_tokens or 0
    if speculative.method == "ngram":
        low, high = speculative.prompt_lookup
        return NgramMethod(
            config.drafter,
            num_tokens,
            vocab_size=target.vocab_size,
            max_model_len=target.max_position_embeddings,
            min_match=low,
            max_match=high,
        )
    target_folder = local_folder(config.target.model)
    folder = local_folder(speculative.checkpoint)
    check_drafter(speculative, folder, target.to_dict(), target_folder)
    dtype = getattr(torch, config.drafter.dtype)
    device = torch.device(config.drafter.device)
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    if speculative.method in ("dspark", "dflash"):
        drafter = load_drafter(folder, dtype, device)
        return BlockMethod(drafter, config.drafter, speculative.draft_top_k, generator)
    network: EntryNetwork
    if speculative.method == "eagle3":
        network = Eagle3Network(
            load_eagle3(folder, dtype, device, target_folder, target.num_hidden_layers)
        )
    else:
        network = CausalLMNetwork(load_causal_lm(str(folder), dtype, device))
    return AutoregressiveMethod(
        network, config.drafter, num_tokens, speculative.draft_top_k, generator
    )
