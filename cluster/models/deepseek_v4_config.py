"""Configuration of the DSpark draft module that DeepSeek-V4 checkpoints carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.models.config_reader import DEFAULT_ROPE_THETA, ConfigReader
from cluster.models.dspark_config import DSparkConfig

DEEPSEEK_V4 = "DeepseekV4ForCausalLM"

# How a file's tensors are stored, which is not the same in the file that we write.
_STORAGE = ("dtype", "torch_dtype", "expert_dtype", "quantization_config")


@dataclass(frozen=True)
class DeepSeekV4DSparkConfig(DSparkConfig):
    """The draft module's shape, in the words of ``DSparkConfig``; ``target`` is the target's own
    ``config.json``, less how tensors are stored, and holds everything else.

    The module is one decoder layer ("stage") after another; ``num_hidden_layers`` counts them.
    Experts are ``intermediate_size`` wide.
    """

    num_routed_experts: int = 1
    num_experts_per_tok: int = 1
    target: Mapping[str, Any] = field(default_factory=dict)

    @property
    def context_window(self) -> int | None:
        """Context entries that are attended, counted back from the anchor."""
        window: int = self.target["sliding_window"]
        return window

    @property
    def min_speculative_tokens(self) -> int:
        """The whole block: its slots were trained together and only together."""
        return self.block_size

    @property
    def projection_key(self) -> str:
        """The tensor of the checkpoint that projects the target's features."""
        return "mtp.0.main_proj.weight"

    @classmethod
    def from_target(
        cls, data: Mapping[str, Any], num_stages: int, file: str = "config.json"
    ) -> DeepSeekV4DSparkConfig:
        """Reads the target's ``config.json``.

        Args:
            data: the file's content.
            num_stages: how many ``mtp.*`` layers the weights have; the configuration's
                ``num_nextn_predict_layers`` counts something else in published checkpoints.
            file: the name that errors carry.

        Raises:
            CheckpointError: names the key that is missing, of the wrong type, out of range, or
                that asks for something this code does not do.
        """
        reader = _Reader(data, file)
        reader.check_network()
        routed = reader.integer("n_routed_experts", 1)
        per_token = reader.integer("num_experts_per_tok", 1)
        config = cls(
            architecture=DEEPSEEK_V4,
            vocab_size=reader.integer("vocab_size", 1),
            hidden_size=reader.integer("hidden_size", 1),
            intermediate_size=reader.integer("moe_intermediate_size", 1),
            num_hidden_layers=num_stages,
            num_attention_heads=reader.integer("num_attention_heads", 1),
            num_key_value_heads=1,
            head_dim=reader.integer("head_dim", 2),
            max_position_embeddings=reader.integer("max_position_embeddings", 1),
            block_size=reader.integer("dspark_block_size", 1),
            target_layer_ids=reader.layer_ids("dspark_target_layer_ids", minimum=0),
            num_target_layers=reader.integer("num_hidden_layers", 1),
            mask_token_id=reader.integer("dspark_noise_token_id", 0),
            num_anchors=1,
            markov_rank=reader.integer("dspark_markov_rank", 1),
            enable_confidence_head=True,
            confidence_head_with_markov=True,
            rms_norm_eps=reader.number("rms_norm_eps", default=1e-6),
            rope_parameters={"rope_type": "default", "rope_theta": reader.rope_theta()},
            # Zero or missing: as many as the target's layers have.
            num_routed_experts=reader.integer("dspark_n_routed_experts", 0, default=0) or routed,
            num_experts_per_tok=(
                reader.integer("dspark_num_experts_per_tok", 0, default=0)
                or reader.integer("dspark_n_activated_experts", 0, default=0)
                or per_token
            ),
            target={key: value for key, value in data.items() if key not in _STORAGE},
        )
        config.check_tokens_and_layers(
            reader,
            mask_token_key="dspark_noise_token_id",
            layers_key="dspark_target_layer_ids",
            depth_key="num_hidden_layers",
        )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The target's ``config.json``, as ``from_target`` reads it."""
        return dict(self.target)


class _Reader(ConfigReader):
    """The keys of DeepSeek-V4 that its draft module needs."""

    def check_network(self) -> None:
        """Refuses what would load and be wrong, and sizes that do not fit together."""
        self.refuse_speculators()
        model_type = self.get("model_type", None)
        if model_type != "deepseek_v4":
            # DeepSeek-V4.1 mixes its residual streams one sublayer later, among other things.
            raise self.error(
                "model_type", f"only draft modules of 'deepseek_v4' are known, not {model_type!r}"
            )
        for key in ("hc_mult", "hc_sinkhorn_iters", "q_lora_rank", "o_lora_rank", "sliding_window"):
            self.integer(key, 1)
        for key in ("hc_eps", "routed_scaling_factor", "swiglu_limit"):
            self.get(key)
            self.number(key, default=1.0)
        known = {
            "hidden_act": "silu",
            "scoring_func": "sqrtsoftplus",
            "norm_topk_prob": True,
            "n_shared_experts": 1,
            "attention_bias": False,
        }
        for key, value in known.items():
            if self.get(key, value) != value:
                raise self.error(key, f"must be {value!r}, not {self.get(key)!r}")
        width = self.integer("num_attention_heads", 1) * self.integer("head_dim", 2)
        groups = self.integer("o_groups", 1)
        if width % groups:
            raise self.error("o_groups", f"{groups} does not divide heads × head_dim = {width}")
        rotary = self.integer("qk_rope_head_dim", 2)
        if rotary % 2 or rotary > self.integer("head_dim", 2):
            raise self.error("qk_rope_head_dim", f"must be even and at most head_dim, not {rotary}")

    def rope_theta(self) -> float:
        """Base of the rotary positions of layers without compression."""
        nested = self.get("rope_parameters", None)
        if isinstance(nested, Mapping) and isinstance(nested.get("main"), Mapping):
            return ConfigReader(nested["main"], self._file).number("rope_theta", DEFAULT_ROPE_THETA)
        return self.number("rope_theta", default=DEFAULT_ROPE_THETA)
