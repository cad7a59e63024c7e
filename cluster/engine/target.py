"""One shard of the target model: its weights, its part of the KV cache, its forward pass."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cluster.config import TargetConfig
from cluster.engine.attention import ATTENTION_NAME, KVCache, PagedBatch
from cluster.engine.layout import stage_layers
from cluster.engine.mesh import Mesh
from cluster.engine.sharding import (
    cut_output_head,
    cut_stage,
    cut_tensor_parallel,
)
from cluster.engine.step_input import StepInput
from cluster.errors import CheckpointError, ConfigError
from cluster.models.checkpoint import Projection


def load_text_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's (text) configuration.

    Raises:
        CheckpointError: the folder has none, or it cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(model, "config.json", str(error).split("\n")[0]) from error
    return config.get_text_config()


class TargetShard:
    """The layers of one pipeline stage, cut for one tensor-parallel rank.

    ``forward`` writes this pass's keys and values into the cache (rejected tokens are simply
    overwritten later) and, where a drafter is configured, stores each token's context features in
    ``features`` under the same slots (on rank 0 only).
    """

    def __init__(
        self, config: TargetConfig, mesh: Mesh | None, projection: Projection | None
    ) -> None:
        self.mesh = mesh
        self.device = torch.device(config.device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self._deterministic = config.deterministic
        model = _load_model(config, self.dtype)
        text_config = model.base_model.config
        self.vocab_size: int = text_config.vocab_size
        self.hidden_size: int = text_config.hidden_size
        self.max_model_len: int = text_config.max_position_embeddings
        self._soft_cap: float | None = getattr(text_config, "final_logit_softcapping", None)
        num_stages = mesh.num_stages if mesh else 1
        stage = mesh.stage if mesh else 0
        layers = stage_layers(text_config.num_hidden_layers, num_stages, stage)
        num_layers = text_config.num_hidden_layers
        self.layers = layers
        cut_stage(model, layers)
        self._gather_head = False
        if mesh is not None and mesh.tensor_parallel_size > 1:
            cut = {
                "tensor_rank": mesh.tensor_rank,
                "tensor_parallel_size": mesh.tensor_parallel_size,
            }
            cut_tensor_parallel(model, all_reduce=mesh.all_reduce, **cut)
            self._gather_head = cut_output_head(model, **cut)
        self._base = model.base_model
        self._norm = self._base.norm
        self._base.norm = nn.Identity()
        self._head = model.get_output_embeddings()
        self._capture: dict[int, torch.Tensor] = {}
        self._projections = self._hook_features(projection, num_layers)
        self._feature_size = projection.weight.shape[0] if projection else 0
        model.to(self.device).eval()
        self.page_size = config.page_size
        self.num_pages = config.num_pages or self._pages_for_memory(config, text_config)
        if mesh is not None:
            self.num_pages = mesh.minimum(self.num_pages)
        self.cache = KVCache(self.num_pages, self.page_size)
        self.features = torch.zeros(0)
        if projection is not None and (mesh is None or mesh.rank == 0):
            shape = (self.num_pages * self.page_size, self._feature_size)
            self.features = torch.zeros(shape, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def forward(self, step: StepInput) -> torch.Tensor:
        """Runs this stage and passes the result on.

        With one stage this is the whole pass.

        Returns:
            ``[R, hidden_size]`` hidden states of ``step.logit_rows`` on the last stage; elsewhere
            whatever was sent on.
        """
        parts = step.split_tokens() if self._deterministic else [step]
        hidden_in, partial_in = self._receive(step)
        hidden_parts: list[torch.Tensor] = []
        partial_parts: list[torch.Tensor] = []
        start = 0
        for part in parts:
            end = start + part.num_tokens
            hidden, partial = self._run_layers(
                part, None if hidden_in is None else hidden_in[start:end]
            )
            hidden_parts.append(hidden)
            if partial is not None:
                partial_parts.append(partial)
            start = end
        features = partial_in
        if partial_parts:
            own = torch.cat(partial_parts)
            features = own if partial_in is None else own + partial_in
        return self._pass_on(step, torch.cat(hidden_parts), features)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and output head (first stage, all its tensor ranks together).

        Args:
            hidden: ``[R, hidden_size]``.

        Returns:
            ``[R, vocab_size]`` float32.
        """
        if self._deterministic and len(hidden) > 1:
            return torch.cat([self.logits(row.unsqueeze(0)) for row in hidden])
        logits = self._head(self._norm(hidden))
        if self._gather_head and self.mesh is not None:
            logits = self.mesh.gather_columns(logits)
        logits = logits.float()
        if self._soft_cap:
            logits = torch.tanh(logits / self._soft_cap) * self._soft_cap
        return logits

    @torch.inference_mode()
    def receive_rows(self, step: StepInput) -> torch.Tensor:
        """First stage of several: what the last one sends back for ``step``.

        Returns:
            ``[R, hidden_size]``; features are stored on the way.
        """
        if self.mesh is None:
            raise RuntimeError("one stage alone has nothing to receive")
        hidden = torch.zeros(0, self.hidden_size, dtype=self.dtype, device=self.device)
        if len(step.logit_rows):
            shape = (len(step.logit_rows), self.hidden_size)
            hidden = self.mesh.receive_previous(shape, self.dtype)
        if self._feature_size and self.mesh.tensor_rank == 0:
            shape = (step.num_tokens, self._feature_size)
            self._store_features(step, self.mesh.receive_previous(shape, torch.float32))
        return hidden

    def gather_features(self, slots: torch.Tensor) -> torch.Tensor:
        """Features ``[len(slots), d]`` of cached tokens, on the CPU."""
        return self.features.index_select(0, slots.to(self.features.device)).cpu()

    def _receive(self, step: StepInput) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.mesh is None or self.mesh.is_first_stage:
            return None, None
        hidden = self.mesh.receive_previous((step.num_tokens, self.hidden_size), self.dtype)
        if not self._feature_size or self.mesh.tensor_rank != 0:
            return hidden, None
        shape = (step.num_tokens, self._feature_size)
        return hidden, self.mesh.receive_previous(shape, torch.float32)

    def _run_layers(
        self, step: StepInput, hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This stage's layers over (a part of) a pass: hidden states, partial features."""
        paged = PagedBatch.build(step, self.cache, self.device)
        self._capture.clear()
        inputs: dict[str, torch.Tensor]
        if hidden is None:
            token_ids = torch.as_tensor(step.token_ids, device=self.device)
            inputs = {"input_ids": token_ids.unsqueeze(0)}
        else:
            inputs = {"inputs_embeds": hidden.unsqueeze(0)}
        output = self._base(
            **inputs,
            position_ids=torch.as_tensor(step.positions, device=self.device).unsqueeze(0),
            use_cache=False,
            paged=paged,
        )
        partial: torch.Tensor | None = None
        for layer_id, weight in self._projections:
            product = nn.functional.linear(self._capture[layer_id], weight).float()
            partial = product if partial is None else partial + product
        return output.last_hidden_state[0], partial

    def _pass_on(
        self, step: StepInput, hidden: torch.Tensor, partial: torch.Tensor | None
    ) -> torch.Tensor:
        if self.mesh is None or self.mesh.num_stages == 1:
            if partial is not None:
                self._store_features(step, partial)
            return self._rows(step, hidden)
        if self.mesh.is_last_stage:
            hidden = self._rows(step, hidden)
        self.mesh.send_next(hidden)
        if self._feature_size and self.mesh.tensor_rank == 0:
            if partial is None:
                partial = torch.zeros(step.num_tokens, self._feature_size, device=self.device)
            self.mesh.send_next(partial)
        return hidden

    def _rows(self, step: StepInput, hidden: torch.Tensor) -> torch.Tensor:
        if len(step.logit_rows) == step.num_tokens:
            return hidden
        return hidden.index_select(0, torch.as_tensor(step.logit_rows, device=self.device))

    def _store_features(self, step: StepInput, features: torch.Tensor) -> None:
        if self.features.numel():
            slots = torch.as_tensor(step.slots, device=self.device)
            self.features.index_copy_(0, slots, features.to(self.dtype))

    def _hook_features(
        self, projection: Projection | None, num_layers: int
    ) -> list[tuple[int, torch.Tensor]]:
        """Captures this stage's target layers; returns each with its slice of ``fc``."""
        if projection is None or (self.mesh is not None and self.mesh.tensor_rank != 0):
            return []
        hooked = []
        for index, layer_id in enumerate(projection.target_layer_ids):
            if not -1 <= layer_id < num_layers:
                raise ConfigError(
                    "speculative.model",
                    f"its target_layer_ids has {layer_id}, the target has {num_layers} layers",
                )
            is_embedding = layer_id == -1
            if is_embedding and self.mesh is not None and not self.mesh.is_first_stage:
                continue
            if not is_embedding and layer_id not in self.layers:
                continue
            module = (
                self._base.embed_tokens
                if is_embedding
                else self._base.layers[layer_id - self.layers.start]
            )
            columns = slice(index * self.hidden_size, (index + 1) * self.hidden_size)
            weight = projection.weight[:, columns].to(self.device, self.dtype).contiguous()
            module.register_forward_hook(self._make_capture(layer_id))
            hooked.append((layer_id, weight))
        return hooked

    def _make_capture(self, layer_id: int) -> Any:
        def capture(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            self._capture[layer_id] = hidden[0]

        return capture

    def _pages_for_memory(self, config: TargetConfig, text_config: Any) -> int:
        """Pages that fit the configured memory, and no more than can be used at once."""
        heads = text_config.num_attention_heads
        kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
        head_dim = getattr(text_config, "head_dim", None) or self.hidden_size // heads
        kv_size = 2 * len(self.layers) * kv_heads * head_dim // config.tensor_parallel_size
        element_bytes = torch.empty(0, dtype=self.dtype).element_size()
        page_bytes = (kv_size + self._feature_size) * element_bytes * config.page_size
        fitting = config.kv_cache_memory_mb * 2**20 // page_bytes
        context = config.max_model_len or self.max_model_len
        useful = config.max_num_seqs * -(-context // config.page_size) + 1
        return max(2, min(fitting, useful))


def _load_model(config: TargetConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            config.model,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(config.model, None, str(error).split("\n")[0]) from error
    for kind in ("missing_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(kind, ()))
        if keys:
            raise CheckpointError(config.model, keys[0], kind.replace("_", " "))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model
