"""Training of EAGLE-3 drafters."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from cluster.errors import ConfigError
from cluster.models.checkpoint import check_drafter_matches_target
from cluster.models.eagle3 import Eagle3Config, Eagle3Drafter
from cluster.models.eagle3_checkpoint import load_eagle3, save_eagle3
from cluster.models.eagle3_config import GEMMA4, LLAMA, QWEN3
from cluster.training.config import TrainConfig
from cluster.training.dataset import Batch, Dataset
from cluster.training.draft_method import (
    DraftMethod,
    feature_layers,
    is_gemma4,
    layers_of,
    shape_of,
)
from cluster.training.drafter_loss import BlockLoss, sample_anchors, sample_answer_anchors
from cluster.training.eagle3_loss import eagle3_loss

# Of how many sequences tokens are counted to choose a reduced vocabulary.
_COUNTED_SEQUENCES = 2048


class Eagle3Method(DraftMethod):
    """EAGLE-3 by training-time test, unrolled ``block_size`` steps behind sampled anchors.

    Embedding and head are the target's and stay as they are. With ``draft_vocab_size`` the head
    keeps the rows of the training data's most frequent tokens. Saved in DeepSpec's format, or in
    SafeAILab's where the vocabulary is reduced. See ``DraftMethod``.
    """

    network: Eagle3Drafter
    adamw_names = ()

    def __init__(self, config: TrainConfig, target: PreTrainedModel) -> None:
        self.network = _build(config, target)
        self.target_layer_ids = self.network.config.target_layer_ids
        self._num_anchors = config.drafter.num_anchors
        self._steps = config.drafter.block_size
        self._target = target
        self._starts_anew = config.drafter.init_from is None
        parts = 2 if config.data.short_phase > 0 else 1
        room = config.data.sequence_length // parts - 1 - self._steps
        if room < 1:
            raise ConfigError(
                "drafter.block_size",
                f"{self._steps} steps do not fit sequences of {config.data.sequence_length} tokens",
            )
        if self._num_anchors // parts > room:
            raise ConfigError(
                "drafter.num_anchors",
                f"{self._num_anchors} do not fit sequences of {config.data.sequence_length} tokens "
                f"with {self._steps} steps",
            )

    def prepare(self, dataset: Dataset) -> None:
        shape = self.network.config
        if shape.draft_vocab_size == shape.vocab_size or not self._starts_anew:
            return
        counts = torch.zeros(shape.vocab_size, dtype=torch.int64)
        for index in range(min(dataset.num_sequences, _COUNTED_SEQUENCES)):
            batch = dataset.sequence(index)
            tokens = batch.token_ids if batch.answers is None else batch.token_ids[batch.answers]
            counts += torch.bincount(tokens.flatten(), minlength=shape.vocab_size)
        # Stable, so that every worker breaks ties alike.
        order = counts.argsort(descending=True, stable=True)
        chosen = order[: shape.draft_vocab_size].sort().values
        self.network.set_draft_token_ids(chosen)
        _copy_output(self.network, self._target)

    def sample(self, batch: Batch, generator: torch.Generator) -> Batch:
        # The first anchor is 1: a draft needs the features of one position at least.
        count = self._num_anchors // batch.num_parts
        if batch.answers is None:
            rows, length = batch.token_ids.shape
            anchors = 1 + sample_anchors(rows, length - 1, self._steps, count, generator)
            return replace(batch, anchors=anchors)
        anchors, counted = sample_answer_anchors(
            batch.answers[:, 1:], self._steps, count, generator
        )
        return replace(batch, anchors=1 + anchors, counted=counted)

    def loss(self, batch: Batch, features: torch.Tensor, logits: torch.Tensor) -> BlockLoss:
        if batch.anchors is None:
            raise ValueError("the batch has no anchors: call sample first")
        return eagle3_loss(
            self.network, batch.token_ids, features, logits, batch.anchors, batch.counted
        )

    def save(self, folder: Path) -> None:
        save_eagle3(self.network, folder)


def _build(config: TrainConfig, target: PreTrainedModel) -> Eagle3Drafter:
    text = target.config.get_text_config()
    given = config.drafter
    size = given.draft_vocab_size or text.vocab_size
    if size > text.vocab_size:
        raise ConfigError(
            "drafter.draft_vocab_size", f"{size} is above the target's vocabulary {text.vocab_size}"
        )
    wanted = Eagle3Config(
        architecture=_architecture(config, target),
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=text.rms_norm_eps,
        target_layer_ids=feature_layers(config, text.num_hidden_layers, minimum=0),
        num_target_layers=text.num_hidden_layers if given.draft_vocab_size is None else None,
        draft_vocab_size=size,
        ttt_length=given.block_size,
        step_loss_decay=_step_loss_decay(config),
        **shape_of(config, target),
        **layers_of(target),
    )
    drafter = Eagle3Drafter(wanted).to(target.device)
    if given.init_from is not None:
        _start_from(given.init_from, drafter, target)
    _copy_output(drafter, target)
    drafter.embed_tokens.requires_grad_(False)
    drafter.lm_head.requires_grad_(False)
    return drafter


def _architecture(config: TrainConfig, target: PreTrainedModel) -> str:
    """Only SafeAILab's format has a reduced vocabulary."""
    if config.drafter.draft_vocab_size is None:
        return GEMMA4 if is_gemma4(target) else QWEN3
    if is_gemma4(target):
        raise ConfigError(
            "drafter.draft_vocab_size", "must be unset: Gemma 4 drafters know every token"
        )
    return LLAMA


def _step_loss_decay(config: TrainConfig) -> float:
    """DeepSpec's, unless the configuration says something else."""
    if "position_decay" not in config.loss.model_fields_set:
        return 0.8
    return math.exp(-1.0 / config.loss.position_decay)


def _start_from(folder: str, drafter: Eagle3Drafter, target: PreTrainedModel) -> None:
    """Takes over the weights of a drafter of the same shape."""
    text = target.config.get_text_config()
    trained = load_eagle3(
        folder, target=target.name_or_path, num_target_layers=text.num_hidden_layers
    )
    file = str(Path(folder) / "config.json")
    check_drafter_matches_target(trained.config, text.to_dict(), file)
    theirs, ours = trained.config.to_dict(), drafter.config.to_dict()
    for key in ours:
        if key not in ("ttt_length", "step_loss_decay") and theirs.get(key) != ours[key]:
            raise ConfigError(
                "drafter.init_from", f"{file}: {key} is {theirs.get(key)!r}, not {ours[key]!r}"
            )
    drafter.load_state_dict(trained.state_dict())


def _copy_output(drafter: Eagle3Drafter, target: PreTrainedModel) -> None:
    """Gives the drafter the target's embedding, and of its head the rows that it has."""
    embedding, head = target.get_input_embeddings(), target.get_output_embeddings()
    with torch.no_grad():
        drafter.embed_tokens.weight.copy_(embedding.weight)
        drafter.lm_head.weight.copy_(head.weight[drafter.draft_token_ids()])
