"""Training of drafters that guess a block at once: DSpark and DFlash."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cluster.errors import ConfigError
from cluster.models.checkpoint import (
    build_drafter,
    check_drafter_matches_target,
    load_drafter,
    save_drafter,
)
from cluster.models.dspark import DSparkDrafter
from cluster.models.dspark_config import GEMMA4, QWEN3, DSparkConfig
from cluster.training.config import TrainConfig
from cluster.training.dataset import Batch
from cluster.training.draft_method import (
    DraftMethod,
    feature_layers,
    freeze_output,
    is_gemma4,
    layers_of,
    shape_of,
)
from cluster.training.drafter_loss import (
    BlockLoss,
    LossWeights,
    block_loss,
    sample_anchors,
    sample_answer_anchors,
)


class BlockMethod(DraftMethod):
    """DSpark, and DFlash as its special case without Markov and confidence heads.

    See ``DraftMethod``.
    """

    network: DSparkDrafter
    adamw_names = ("markov_head", "confidence_head")

    def __init__(
        self, config: TrainConfig, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.network = _build(config, target, tokenizer).to(target.device)
        self.target_layer_ids = self.network.config.target_layer_ids
        self._num_anchors = config.drafter.num_anchors
        self._block_size = self.network.config.block_size
        self._weights = LossWeights(*config.loss_weights(), config.loss.position_decay)
        parts = 2 if config.data.short_phase > 0 else 1
        room = config.data.sequence_length // parts - self._block_size
        if room < 1:
            raise ConfigError(
                "drafter.block_size",
                f"blocks of {self._block_size} do not fit sequences of "
                f"{config.data.sequence_length} tokens",
            )
        if self._num_anchors // parts > room:
            raise ConfigError(
                "drafter.num_anchors",
                f"{self._num_anchors} do not fit sequences of {config.data.sequence_length} tokens "
                f"with blocks of {self._block_size}",
            )

    def sample(self, batch: Batch, generator: torch.Generator) -> Batch:
        count = self._num_anchors // batch.num_parts
        if batch.answers is None:
            rows, length = batch.token_ids.shape
            anchors = sample_anchors(rows, length, self._block_size, count, generator)
            return replace(batch, anchors=anchors)
        anchors, counted = sample_answer_anchors(batch.answers, self._block_size, count, generator)
        return replace(batch, anchors=anchors, counted=counted)

    def loss(self, batch: Batch, features: torch.Tensor, logits: torch.Tensor) -> BlockLoss:
        if batch.anchors is None:
            raise ValueError("the batch has no anchors: call sample first")
        return block_loss(
            self.network,
            batch.token_ids,
            features,
            logits,
            batch.anchors,
            batch.counted,
            self._weights,
        )

    def save(self, folder: Path) -> None:
        save_drafter(self.network, folder)


def _build(
    config: TrainConfig, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> DSparkDrafter:
    wanted = _drafter_config(config, target, tokenizer)
    drafter = build_drafter(wanted)
    start = config.drafter.init_from
    if start is not None:
        trained = load_drafter(start)
        file = str(Path(start) / "config.json")
        check_drafter_matches_target(
            trained.config, target.config.get_text_config().to_dict(), file
        )
        theirs, ours = trained.config.to_dict(), wanted.to_dict()
        for key in ours:
            if key != "num_anchors" and theirs[key] != ours[key]:
                raise ConfigError(
                    "drafter.init_from", f"{file}: {key} is {theirs[key]!r}, not {ours[key]!r}"
                )
        drafter.load_state_dict(trained.state_dict())
    freeze_output(drafter, target)
    return drafter


def _drafter_config(
    config: TrainConfig, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> DSparkConfig:
    text = target.config.get_text_config()
    drafter = config.drafter
    is_dspark = drafter.method == "dspark"
    confidence = is_dspark and drafter.enable_confidence_head
    return DSparkConfig(
        architecture=GEMMA4 if is_gemma4(target) else QWEN3,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_hidden_layers=drafter.num_hidden_layers,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=text.rms_norm_eps,
        block_size=drafter.block_size,
        target_layer_ids=feature_layers(config, text.num_hidden_layers),
        num_target_layers=text.num_hidden_layers,
        mask_token_id=_mask_token_id(config, text.vocab_size, tokenizer),
        num_anchors=drafter.num_anchors,
        markov_rank=drafter.markov_rank if is_dspark else 0,
        markov_head_type=drafter.markov_head_type,
        enable_confidence_head=confidence,
        confidence_head_with_markov=confidence,
        **shape_of(config, target),
        **layers_of(target),
    )


def _mask_token_id(config: TrainConfig, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> int:
    key = "drafter.mask_token_id"
    mask = config.drafter.mask_token_id
    if mask is None:
        mask = tokenizer.mask_token_id
    if mask is None:
        raise ConfigError(key, "is required: the tokenizer has no mask token; name an unused id")
    if mask >= vocab_size:
        raise ConfigError(key, f"{mask} is outside the target's vocabulary of {vocab_size}")
    return int(mask)
