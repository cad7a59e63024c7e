"""Training of a draft model: a small causal language model with the target's tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cluster.errors import CheckpointError
from cluster.training.config import TrainConfig
from cluster.training.dataset import Batch
from cluster.training.draft_method import DraftMethod, shape_of
from cluster.training.drafter_loss import BlockLoss

_ROPE_THETA = 10000.0  # its own: it reads nothing of the target


class DraftModelMethod(DraftMethod):
    """A Qwen3 language model learns the text, and by ``total_variation`` the target's own law.

    Acceptance is given for runs of ``block_size`` guesses along the text. See ``DraftMethod``.
    """

    network: Qwen3ForCausalLM
    target_layer_ids = ()
    adamw_names = ("embed_tokens", "lm_head")

    def __init__(
        self, config: TrainConfig, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.network = _build(config, target).to(target.device)
        self._tokenizer = tokenizer
        self._block_size = config.drafter.block_size
        self._cross_entropy, self._total_variation, _ = config.loss_weights()

    def sample(self, batch: Batch, generator: torch.Generator) -> Batch:
        return batch

    def loss(self, batch: Batch, features: torch.Tensor, logits: torch.Tensor) -> BlockLoss:
        tokens = batch.token_ids
        hidden = self.network.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        log_draft = self.network.lm_head(hidden).float().log_softmax(dim=-1)
        target = logits[:, :-1].float().softmax(dim=-1)
        distance = (log_draft.exp() - target).abs().sum(dim=-1)
        cross_entropy = F.nll_loss(
            log_draft.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        ).view_as(distance)
        learned = torch.ones_like(distance)
        if batch.answers is not None:
            learned = batch.answers[:, 1:].float()
        weight = learned.sum().clamp(min=1.0)
        loss = self._cross_entropy * cross_entropy + self._total_variation * distance
        terms = {"cross_entropy": cross_entropy, "total_variation": distance}
        acceptance = (1.0 - 0.5 * distance.detach()).clamp(0.0, 1.0)
        # A run may reach beyond the end, as a block may: what is there is not counted.
        size = self._block_size
        runs, inside = (
            F.pad(part, (0, size - 1)).unfold(1, size, 1) for part in (acceptance, learned)
        )
        return BlockLoss(
            total=(loss * learned).sum() / weight,
            weight=weight,
            terms={name: (term.detach() * learned).sum() / weight for name, term in terms.items()},
            acceptance=runs,
            counted=inside.cumprod(dim=-1).bool(),
        )

    def save(self, folder: Path) -> None:
        """A Hugging Face checkpoint with the tokenizer, bf16."""
        partial = folder / ".partial"
        copy = Qwen3ForCausalLM(self.network.config).to(torch.bfloat16)
        copy.load_state_dict(self.network.state_dict())
        copy.save_pretrained(partial)
        self._tokenizer.save_pretrained(partial)
        for path in partial.iterdir():
            os.replace(path, folder / path.name)
        partial.rmdir()


def _build(config: TrainConfig, target: PreTrainedModel) -> Qwen3ForCausalLM:
    text = target.config.get_text_config()
    start = config.drafter.init_from
    if start is None:
        return Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=text.vocab_size,
                hidden_size=config.drafter.hidden_size or text.hidden_size,
                num_hidden_layers=config.drafter.num_hidden_layers,
                max_position_embeddings=text.max_position_embeddings,
                rms_norm_eps=text.rms_norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
                tie_word_embeddings=True,
                bos_token_id=text.bos_token_id,
                eos_token_id=text.eos_token_id,
                pad_token_id=text.pad_token_id,
                **shape_of(config, target),
            )
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise CheckpointError(start, None, str(error).split("\n")[0]) from error
    file = str(Path(start) / "config.json")
    if not isinstance(model, Qwen3ForCausalLM):
        raise CheckpointError(file, "architectures", "must be ['Qwen3ForCausalLM']")
    if model.config.vocab_size != text.vocab_size:
        raise CheckpointError(
            file,
            "vocab_size",
            f"is {model.config.vocab_size}, but the target's is {text.vocab_size}",
        )
    return model
