"""Configuration of an EAGLE-3 drafter, read strictly from the ``config.json`` of either format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.models.config_reader import DEFAULT_ROPE_THETA, ConfigReader
from cluster.models.config_writer import gemma4_keys, network_keys, qwen3_keys

QWEN3 = "Qwen3Eagle3Model"
GEMMA4 = "Gemma4Eagle3Model"
LLAMA = "LlamaForCausalLMEagle3"

# vLLM's name for the same network.
_LLAMA_ALIASES = (LLAMA, "Eagle3LlamaForCausalLM")
_AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"
# Variants of the network whose weights would load and whose output would be wrong.
_UNKNOWN_VARIANTS = (
    "fc_norm",
    "fc_norm_perslice",
    "use_aux_norm",
    "norm_output",
    "norm_before_fc",
    "norm_before_residual",
    "enable_moe_block",
    "hidden_size_per_layer_input",
)


def is_eagle3(data: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` describes an EAGLE-3 drafter.

    SafeAILab's own checkpoints call themselves ``LlamaForCausalLM``; ``draft_vocab_size`` tells
    them from a language model.
    """
    architectures = data.get("architectures")
    if architectures == ["LlamaForCausalLM"]:
        return "draft_vocab_size" in data
    return any(architectures == [name] for name in (QWEN3, GEMMA4, *_LLAMA_ALIASES))


@dataclass(frozen=True)
class Eagle3Config:
    """An EAGLE-3 drafter's shape, the same for the three published architectures.

    ``target_layer_ids`` i is the target's residual stream after layer i (0-based), whatever the
    checkpoint's own numbering. ``num_target_layers`` is ``None`` where the checkpoint does not
    say. ``head_dim`` and ``num_key_value_heads`` are those that the drafter's layer uses (for
    Gemma 4 the *global* ones). ``draft_vocab_size`` below ``vocab_size`` means that the head
    knows only some of the target's tokens. ``ttt_length`` and ``step_loss_decay`` are for
    training alone.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    target_layer_ids: tuple[int, ...]
    draft_vocab_size: int
    num_target_layers: int | None = None
    architecture: str = QWEN3
    ttt_length: int = 7
    step_loss_decay: float = 0.8
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    attention_k_eq_v: bool = False
    final_logit_softcapping: float | None = None
    rope_parameters: Mapping[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": DEFAULT_ROPE_THETA}
    )

    @property
    def num_hidden_layers(self) -> int:
        """Always 1: a fed-back hidden state stands for the whole drafter's depth."""
        return 1

    @property
    def projection_key(self) -> str:
        """The tensor of the checkpoint that projects the target's features."""
        return "fc.weight"

    @property
    def has_vocabulary_map(self) -> bool:
        """Whether checkpoints of this format carry ``d2t`` and ``t2d``."""
        return self.architecture == LLAMA

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        file: str = "config.json",
        num_target_layers: int | None = None,
    ) -> Eagle3Config:
        """Reads a ``config.json``.

        Args:
            data: the file's content.
            file: the name that errors carry.
            num_target_layers: the target's depth, for checkpoints that name neither it nor the
                layers that they read; these read what SafeAILab's training reads.

        Raises:
            CheckpointError: names the key that is missing, of the wrong type, out of range, or
                that asks for something this code does not do.
        """
        reader = _Reader(data, file)
        architecture = reader.architecture()
        gemma = architecture == GEMMA4
        hidden_size = reader.integer("hidden_size", 1)
        heads = reader.integer("num_attention_heads", 1)
        vocab_size = reader.integer("vocab_size", 1)
        k_eq_v = reader.boolean("attention_k_eq_v", default=False) if gemma else False
        if architecture != LLAMA:
            num_target_layers = reader.integer("num_target_layers", 1)
        config = cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=reader.integer("intermediate_size", 1),
            num_attention_heads=heads,
            num_key_value_heads=reader.integer(
                "num_global_key_value_heads" if k_eq_v else "num_key_value_heads", 1
            ),
            head_dim=(
                reader.integer("global_head_dim", 2)
                if gemma
                else reader.integer("head_dim", 2, default=hidden_size // heads)
            ),
            max_position_embeddings=reader.integer("max_position_embeddings", 1),
            target_layer_ids=(
                reader.aux_layer_ids(num_target_layers)
                if architecture == LLAMA
                else reader.layer_ids("target_layer_ids", minimum=0)
            ),
            draft_vocab_size=reader.draft_vocab_size(vocab_size, architecture),
            num_target_layers=num_target_layers,
            ttt_length=reader.integer("ttt_length", 1, default=7),
            step_loss_decay=reader.number("step_loss_decay", default=0.8),
            rms_norm_eps=reader.number("rms_norm_eps", default=1e-6),
            attention_bias=reader.boolean("attention_bias", default=False),
            mlp_bias=reader.boolean("mlp_bias", default=False) if architecture == LLAMA else False,
            hidden_act=reader.gemma4_activation() if gemma else reader.hidden_act(),
            attention_k_eq_v=k_eq_v,
            final_logit_softcapping=reader.final_logit_softcapping() if gemma else None,
            rope_parameters=reader.gemma4_rope_parameters() if gemma else reader.rope_parameters(),
        )
        config._check_together(reader)
        return config

    def _check_together(self, reader: _Reader) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise reader.error(
                "num_key_value_heads",
                f"{self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}",
            )
        if self.head_dim % 2:
            raise reader.error("head_dim", f"must be even, not {self.head_dim}")
        layers = self.num_target_layers
        if layers is not None and self.target_layer_ids[-1] >= layers:
            raise reader.error(
                _AUX_LAYERS if self.architecture == LLAMA else "target_layer_ids",
                f"layer {self.target_layer_ids[-1]} (0-based) is out of range for a target of "
                f"{layers} layers",
            )

    def to_dict(self) -> dict[str, Any]:
        """The ``config.json`` of this drafter in its own format, as ``from_dict`` reads it."""
        data = network_keys(self) | {
            "ttt_length": self.ttt_length,
            "step_loss_decay": self.step_loss_decay,
        }
        if self.architecture == LLAMA:
            return data | {
                "model_type": "llama",
                "hidden_act": self.hidden_act,
                "mlp_bias": self.mlp_bias,
                "rope_parameters": dict(self.rope_parameters),
                "draft_vocab_size": self.draft_vocab_size,
                "eagle_config": {_AUX_LAYERS: list(self.target_layer_ids)},
            }
        data |= {
            "target_layer_ids": list(self.target_layer_ids),
            "num_target_layers": self.num_target_layers,
            "draft_num_hidden_layers": self.num_hidden_layers,
            "layer_types": ["full_attention"],
        }
        return data | (qwen3_keys(self) if self.architecture == QWEN3 else gemma4_keys(self))


class _Reader(ConfigReader):
    """The keys that only an EAGLE-3 drafter has."""

    def architecture(self) -> str:
        """One of ``QWEN3``, ``GEMMA4``, ``LLAMA``; refuses what would load and be wrong."""
        self.refuse_speculators()
        if not is_eagle3(self._data):
            known = [QWEN3, GEMMA4, *_LLAMA_ALIASES]
            raise self.error(
                "architectures",
                f"must be one of {known}, not {self.get('architectures', None)!r}",
            )
        for key in _UNKNOWN_VARIANTS:
            if self.get(key, None):
                raise self.error(key, "this variant of EAGLE-3 is not supported")
        if self.get("tie_word_embeddings", False):
            raise self.error("tie_word_embeddings", "must be false: the head has its own weight")
        layers = self.integer("num_hidden_layers", 1)
        if layers != 1:
            raise self.error("num_hidden_layers", f"an EAGLE-3 drafter has 1 layer, not {layers}")
        self.refuse_partial_attention()
        hidden, target_hidden = self.get("hidden_size"), self.get("target_hidden_size", None)
        if target_hidden not in (None, hidden):
            raise self.error(
                "target_hidden_size",
                f"{target_hidden} differs from hidden_size {hidden}; a drafter narrower than its "
                "target is not supported",
            )
        name = self.get("architectures")[0]
        return name if name in (QWEN3, GEMMA4) else LLAMA

    def aux_layer_ids(self, num_target_layers: int | None) -> tuple[int, ...]:
        """The layers that a ``LLAMA`` checkpoint reads, in our numbering.

        Inside ``eagle_config`` (SpecForge, SGLang) i is the output of layer i; at the top level
        (vLLM) i is the input of layer i, which is the output of layer i - 1. Where neither is
        given, SafeAILab's training captured the inputs of layers 2, n // 2 and n - 3.
        """
        nested = self.get("eagle_config", None) or {}
        if not isinstance(nested, Mapping):
            raise self.error("eagle_config", f"must be an object, not {nested!r}")
        if nested.get(_AUX_LAYERS):
            return ConfigReader(nested, self._file).layer_ids(_AUX_LAYERS, minimum=0)
        if self.get(_AUX_LAYERS, None):
            return tuple(i - 1 for i in self.layer_ids(_AUX_LAYERS, minimum=0))
        if num_target_layers is None:
            raise self.error(
                _AUX_LAYERS,
                "is missing, and the number of the target's layers n, which would give the usual "
                "[1, n // 2 - 1, n - 4], is not known; add it inside eagle_config",
            )
        usual = (1, num_target_layers // 2 - 1, num_target_layers - 4)
        if not usual[0] < usual[1] < usual[2]:
            raise self.error(
                _AUX_LAYERS,
                f"is missing, and a target of {num_target_layers} layers is too shallow for the "
                "usual choice; add it inside eagle_config",
            )
        return usual

    def draft_vocab_size(self, vocab_size: int, architecture: str) -> int:
        if architecture != LLAMA or self.get("draft_vocab_size", None) is None:
            return vocab_size
        value = self.integer("draft_vocab_size", 1)
        if value > vocab_size:
            raise self.error("draft_vocab_size", f"{value} is above vocab_size {vocab_size}")
        return value
