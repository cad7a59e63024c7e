"""Configuration of a DSpark drafter, read strictly from DeepSpec's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.errors import CheckpointError
from cluster.models.config_reader import DEFAULT_ROPE_THETA, ConfigReader
from cluster.models.config_writer import gemma4_keys, network_keys, qwen3_keys

QWEN3 = "Qwen3DSparkModel"
GEMMA4 = "Gemma4DSparkModel"
MARKOV_HEAD_TYPES = ("vanilla", "gated", "rnn")

# What Gemma 4 targets may have and no drafter: it would change the layers' mathematics.
_UNKNOWN_VARIANTS = (
    "enable_moe_block",
    "hidden_size_per_layer_input",
    "num_kv_shared_layers",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class DSparkConfig:
    """A DSpark drafter's shape; the names are those of DeepSpec's and Qwen3's ``config.json``.

    ``markov_rank`` 0 is DFlash: no Markov head, and every slot is predicted independently.
    ``target_layer_ids`` i is the target's residual stream after layer i, -1 its embedding.
    ``head_dim`` and ``num_key_value_heads`` are those that the drafter's layers use (for Gemma 4
    the *global* ones); ``attention_k_eq_v`` and ``final_logit_softcapping`` are Gemma 4's.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    block_size: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    mask_token_id: int
    num_anchors: int
    markov_rank: int
    architecture: str = QWEN3
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = False
    confidence_head_with_markov: bool = False
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    hidden_act: str = "silu"
    rope_parameters: Mapping[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": DEFAULT_ROPE_THETA}
    )
    attention_k_eq_v: bool = False
    final_logit_softcapping: float | None = None

    @property
    def context_window(self) -> int | None:
        """How many context entries, counted back from the anchor, are attended; ``None``: all."""
        return None

    @property
    def min_speculative_tokens(self) -> int:
        """Fewest draft tokens a round that the drafter may be asked for."""
        return 1

    @property
    def projection_key(self) -> str:
        """The tensor of the checkpoint that projects the target's features."""
        return "fc.weight"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], file: str = "config.json") -> DSparkConfig:
        """Reads a ``config.json``; ``file`` is the name that errors carry.

        Keys that describe nothing of the network (``dtype``, ``transformers_version``, token ids
        of the target, …) are ignored.

        Raises:
            CheckpointError: names the key that is missing, of the wrong type, out of range, or
                that asks for something this code does not do.
        """
        reader = _Reader(data, file)
        architecture = reader.architecture()
        gemma = architecture == GEMMA4
        k_eq_v = reader.boolean("attention_k_eq_v", default=False) if gemma else False
        hidden_size = reader.integer("hidden_size", 1)
        heads = reader.integer("num_attention_heads", 1)
        markov_rank = reader.integer("markov_rank", 0)
        confidence = reader.boolean("enable_confidence_head")
        config = cls(
            vocab_size=reader.integer("vocab_size", 1),
            hidden_size=hidden_size,
            intermediate_size=reader.integer("intermediate_size", 1),
            num_hidden_layers=reader.integer("num_hidden_layers", 1),
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
            block_size=reader.integer("block_size", 1),
            target_layer_ids=reader.layer_ids("target_layer_ids", minimum=-1),
            num_target_layers=reader.integer("num_target_layers", 1),
            mask_token_id=reader.integer("mask_token_id", 0),
            num_anchors=reader.integer("num_anchors", 1),
            markov_rank=markov_rank,
            markov_head_type=reader.markov_head_type(required=markov_rank > 0),
            enable_confidence_head=confidence,
            confidence_head_with_markov=(
                reader.boolean("confidence_head_with_markov") if confidence else False
            ),
            rms_norm_eps=reader.number("rms_norm_eps", default=1e-6),
            attention_bias=reader.boolean("attention_bias", default=False),
            architecture=architecture,
            hidden_act=reader.gemma4_activation() if gemma else reader.hidden_act(),
            rope_parameters=reader.gemma4_rope_parameters() if gemma else reader.rope_parameters(),
            attention_k_eq_v=k_eq_v,
            final_logit_softcapping=reader.final_logit_softcapping() if gemma else None,
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
        self.check_tokens_and_layers(
            reader, "mask_token_id", "target_layer_ids", "num_target_layers"
        )
        if self.confidence_head_with_markov and self.markov_rank == 0:
            raise reader.error("confidence_head_with_markov", "true needs markov_rank above 0")

    def check_tokens_and_layers(
        self, reader: ConfigReader, mask_token_key: str, layers_key: str, depth_key: str
    ) -> None:
        """Checks the mask token against the vocabulary and the layers against the target's depth;
        the keys are the file's names for them.

        Raises:
            CheckpointError: one is out of range.
        """
        if self.mask_token_id >= self.vocab_size:
            raise reader.error(
                mask_token_key, f"{self.mask_token_id} is outside vocab_size {self.vocab_size}"
            )
        last = self.target_layer_ids[-1]
        if last >= self.num_target_layers:
            raise reader.error(
                layers_key, f"{last} is out of range for {depth_key} {self.num_target_layers}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The ``config.json`` of this drafter, as ``from_dict`` reads it."""
        data = network_keys(self) | {
            "layer_types": ["full_attention"] * self.num_hidden_layers,
            "block_size": self.block_size,
            "target_layer_ids": list(self.target_layer_ids),
            "num_target_layers": self.num_target_layers,
            "mask_token_id": self.mask_token_id,
            "num_anchors": self.num_anchors,
            "markov_rank": self.markov_rank,
            "markov_head_type": self.markov_head_type,
            "enable_confidence_head": self.enable_confidence_head,
            "confidence_head_with_markov": self.confidence_head_with_markov,
        }
        if self.architecture == QWEN3:
            return data | qwen3_keys(self)
        no_variants = {
            "enable_moe_block": False,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        }
        return data | gemma4_keys(self) | no_variants


class _Reader(ConfigReader):
    """The keys that only a DSpark drafter has."""

    def architecture(self) -> str:
        """``QWEN3`` or ``GEMMA4``; refuses what would load and be wrong."""
        self.refuse_speculators()
        names = self.get("architectures")
        if names not in ([QWEN3], [GEMMA4]):
            raise self.error("architectures", f"must be ['{QWEN3}'] or ['{GEMMA4}'], not {names!r}")
        for key in _UNKNOWN_VARIANTS:
            if self.get(key, None):
                raise self.error(key, "no DSpark drafter of this kind is known")
        self.refuse_partial_attention()
        return str(names[0])

    def markov_head_type(self, required: bool) -> str:
        value = self.get("markov_head_type", *(() if required else (MARKOV_HEAD_TYPES[0],)))
        if value not in MARKOV_HEAD_TYPES:
            raise self.error(
                "markov_head_type", f"must be one of {list(MARKOV_HEAD_TYPES)}, not {value!r}"
            )
        return str(value)


class DrafterShape(Protocol):
    """What every drafter that reads a target's features says about that target."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def target_layer_ids(self) -> tuple[int, ...]: ...

    @property
    def num_target_layers(self) -> int | None: ...


def check_drafter_matches_target(
    drafter: DrafterShape, target: Mapping[str, Any], file: str = "config.json"
) -> None:
    """Checks that a drafter was made for a target of this shape.

    Args:
        drafter: the drafter's configuration.
        target: the target's ``config.json`` as a dictionary (``config.to_dict()``).
        file: the drafter's file, for the message.

    Raises:
        CheckpointError: names the drafter's key that does not fit.
    """
    for key in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(drafter, key), target[key]
        if ours != theirs:
            raise CheckpointError(file, key, f"is {ours}, but the target's is {theirs}")
    layers = int(target["num_hidden_layers"])
    if drafter.num_target_layers not in (None, layers):
        raise CheckpointError(
            file,
            "num_target_layers",
            f"is {drafter.num_target_layers}, but the target has {layers} layers",
        )
    if drafter.target_layer_ids[-1] >= layers:
        raise CheckpointError(
            file,
            "target_layer_ids",
            f"{drafter.target_layer_ids[-1]} is out of range for a target of {layers} layers",
        )
