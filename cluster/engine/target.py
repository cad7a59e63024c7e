"""One shard of the target model: its weights, its part of the KV cache, its forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from cluster.config import TargetConfig
from cluster.engine.attention import ATTENTION_NAME, KVCache, PagedBatch
from cluster.engine.capture import FeatureCapture
from cluster.engine.compiled import CompiledLayers
from cluster.engine.compressed_attention import COMPRESSED_ATTENTION_NAME, attend_per_sequence
from cluster.engine.compressed_cache import CompressedCaches
from cluster.engine.cuda.graphed_layers import GraphedHead, GraphedLayers
from cluster.engine.cuda.pass_buffers import PassBuffers
from cluster.engine.graph import try_to_compile
from cluster.engine.kernels import has_kernels, pack_linears, packed
from cluster.engine.latent_attention import LATENT_ATTENTION_NAME, LatentStore
from cluster.engine.layout import UNSPLIT_MODEL_TYPES, check_split, key_sources, stage_layers
from cluster.engine.mesh import Mesh
from cluster.engine.sharding import (
    cut_output_head,
    cut_stage,
    cut_tensor_parallel,
)
from cluster.engine.step_input import StepInput
from cluster.engine.target_config import load_text_config
from cluster.engine.target_features import TargetFeatures, feature_size, projection_digest
from cluster.engine.target_model import LATENT_MODEL_TYPES, check_servable, load_model
from cluster.errors import ConfigError
from cluster.models.checkpoint import Projection


class TargetShard:
    """The layers of one pipeline stage, cut for one tensor-parallel rank.

    Of a model with other inputs than text, only the text decoder is kept. A model is served only if
    every layer of it attends through the cache, which one token shows before anything else runs.

    ``forward`` writes this pass's keys and values into the cache, in place of rejected tokens', and
    where a drafter reads hidden states it stores each token's context features in
    ``features`` under the same slots (on rank 0 only).

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: it cannot be served, or not split like this; names what is in the way.
    """

    def __init__(
        self, config: TargetConfig, mesh: Mesh | None, projection: Projection | None
    ) -> None:
        self.mesh = mesh
        self.device = torch.device(config.device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self._deterministic = config.deterministic
        num_stages = mesh.num_stages if mesh else 1
        num_ranks = mesh.tensor_parallel_size if mesh else 1
        model_type = load_text_config(
            config.model, trust_remote_code=config.trust_remote_code
        ).model_type
        self._is_compressed = model_type in UNSPLIT_MODEL_TYPES
        self._is_latent = model_type in LATENT_MODEL_TYPES
        attention = ATTENTION_NAME
        if self._is_compressed:
            attention = COMPRESSED_ATTENTION_NAME
        elif self._is_latent:
            attention = LATENT_ATTENTION_NAME
        model = load_model(
            config.model, self.dtype, attention, trust_remote_code=config.trust_remote_code
        )
        self._base = model.get_decoder()
        text_config = self._base.config
        check_servable(model, is_compressed=self._is_compressed)
        check_split(
            text_config.to_dict(),
            tensor_parallel_size=num_ranks,
            pipeline_parallel_size=num_stages,
        )
        self.vocab_size: int = text_config.vocab_size
        self.hidden_size: int = text_config.hidden_size
        self.max_model_len: int = text_config.max_position_embeddings
        self._soft_cap: float | None = getattr(text_config, "final_logit_softcapping", None)
        num_layers = text_config.num_hidden_layers
        self.layers = stage_layers(num_layers, num_stages, mesh.stage if mesh else 0)
        sources = key_sources(text_config.to_dict())
        if self._is_compressed:
            attend_per_sequence(self._base)
        cut_stage(self._base, self.layers)
        self._gather_head = False
        if mesh is not None and num_ranks > 1:
            cut = {"tensor_rank": mesh.tensor_rank, "tensor_parallel_size": num_ranks}
            cut_tensor_parallel(model, all_reduce=mesh.all_reduce, **cut)
            self._gather_head = cut_output_head(model, **cut)
        self._norm = self._base.norm
        self._base.norm = nn.Identity()
        self._head = model.get_output_embeddings()
        self._has_kernels = (
            attention == ATTENTION_NAME
            and not config.deterministic
            and has_kernels(self.device, self.dtype)
        )
        # Graphs begin with tokens and end with hidden states: stages have neither.
        is_whole = num_ranks == 1 and (num_stages == 1 or self.device.type == "cpu")
        self._compiles = self._has_kernels and is_whole and not config.enforce_eager
        if self._has_kernels:
            pack_linears(self._base, self.device)
            self._head = packed(self._head, self.device)
        for module in (self._base, self._norm, self._head):
            module.to(self.device).eval()
        self._num_layers = num_layers
        self._features = TargetFeatures()
        self._staged: TargetFeatures | None = None
        self.page_size = config.page_size
        self.cache: KVCache | CompressedCaches
        if self._is_compressed:
            self.cache = CompressedCaches(text_config, self.dtype)
        else:
            self.cache = KVCache(
                1,
                self.page_size,
                sources,
                in_place=self._has_kernels,
                buffers=self._make_buffers(config),
            )
        self._try_one_token(type(model).__name__)
        self.num_pages = config.num_pages or self._pages_for_memory(
            config, feature_size(projection)
        )
        if mesh is not None:
            self.num_pages = mesh.minimum(self.num_pages)
        self.cache.resize(self.num_pages)
        self._features = self._make_features(projection)
        self._attach()
        self._graphed_head: GraphedHead | None = None
        if isinstance(self._features.compiled, GraphedLayers):
            self._graphed_head = self._warm_up_graphs(self._features.compiled)

    @property
    def execution(self) -> str:
        """How passes run: ``compiled``; ``graphs``: compiled, and replayed on a CUDA device;
        ``kernels``: layer by layer, with kernels of our own; or ``eager``: by PyTorch's operators
        alone."""
        if self._features.compiled is not None:
            return "compiled" if self.device.type == "cpu" else "graphs"
        return "kernels" if self._has_kernels else "eager"

    @torch.inference_mode()
    def forward(self, step: StepInput) -> torch.Tensor:
        """Runs this stage and passes the result on.

        With one stage this is the whole pass.

        Returns:
            ``[R, hidden_size]`` hidden states of ``step.logit_rows`` on the last stage; elsewhere
            whatever was sent on.
        """
        self.cache.begin(step)
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
            own = _joined(partial_parts)
            features = own if partial_in is None else own + partial_in
        return self._pass_on(step, _joined(hidden_parts), features)

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
        if self._graphed_head is not None:
            return self._graphed_head(hidden)
        return self._logits(hidden)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
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
        if self._features.size and self.mesh.tensor_rank == 0:
            shape = (step.num_tokens, self._features.size)
            self._store_features(step, self.mesh.receive_previous(shape, torch.float32))
        return hidden

    def stage_features(self, projection: Projection | None) -> None:
        """Prepares to take another drafter's features; nothing changes before it is used.

        May be called in another thread than the one that runs the passes.

        Args:
            projection: of the drafter; ``None`` where it reads no features.

        Raises:
            ConfigError: the drafter reads a layer that the target does not have.
        """
        is_same = projection_digest(projection) == self._features.digest
        self._staged = self._features if is_same else self._make_features(projection)

    def use_staged_features(self) -> bool:
        """Goes over to what is staged; between passes, and on every shard between the same two.

        Returns:
            Whether the features that are cached stay valid.
        """
        if self._staged is None:
            raise RuntimeError("no features are staged")
        former, self._features, self._staged = self._features, self._staged, None
        if former is self._features:
            return True
        if former.capture is not None:
            former.capture.detach()
        self._attach()
        return False

    def _attach(self) -> None:
        """Has layers that run one by one give what the drafter reads of them."""
        if self._features.capture is not None and self._features.compiled is None:
            self._features.capture.attach()

    def gather_features(self, slots: torch.Tensor) -> torch.Tensor:
        """Features ``[len(slots), d]`` of cached tokens, on the CPU."""
        return self._features.cached.index_select(0, slots.to(self.device)).cpu()

    def _receive(self, step: StepInput) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.mesh is None or self.mesh.is_first_stage:
            return None, None
        hidden = self.mesh.receive_previous((step.num_tokens, self.hidden_size), self.dtype)
        if not self._features.size or self.mesh.tensor_rank != 0:
            return hidden, None
        shape = (step.num_tokens, self._features.size)
        return hidden, self.mesh.receive_previous(shape, torch.float32)

    def _run_layers(
        self, step: StepInput, hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This stage's layers over (a part of) a pass: hidden states, partial features."""
        capture, compiled = self._features.capture, self._features.compiled
        if isinstance(compiled, GraphedLayers):
            return self._replay_layers(step, compiled)
        paged = self.cache.batch(step, self.device)
        try:
            inputs = self._on_device(step.token_ids) if hidden is None else hidden
            positions = self._on_device(step.positions)
            if compiled is not None:
                return compiled(inputs, positions)
            output = self._call_layers(inputs, positions, paged)
            return output, capture.project(capture.take()) if capture is not None else None
        finally:
            self.cache.end()

    def _replay_layers(
        self, step: StepInput, layers: GraphedLayers
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not isinstance(self.cache, KVCache):
            raise RuntimeError("graphs need a paged cache")
        self.cache.batch(step, self.device, layers.padded_size(step.num_tokens))
        try:
            return layers(step.num_tokens)
        finally:
            self.cache.end()

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def _call_layers(
        self, inputs: torch.Tensor, positions: torch.Tensor, paged: object
    ) -> torch.Tensor:
        """The model's own forward pass. ``inputs``: ``[N]`` ids, or ``[N, hidden_size]``."""
        arguments: dict[str, Any] = {"paged": paged}
        arguments["input_ids" if inputs.dim() == 1 else "inputs_embeds"] = inputs.unsqueeze(0)
        if self._is_latent and isinstance(paged, PagedBatch):
            arguments["past_key_values"] = LatentStore(paged)
        output = self._base(
            **arguments,
            position_ids=positions.unsqueeze(0),
            use_cache=False,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

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
        if self._features.size and self.mesh.tensor_rank == 0:
            if partial is None:
                partial = torch.zeros(step.num_tokens, self._features.size, device=self.device)
            self.mesh.send_next(partial)
        return hidden

    def _rows(self, step: StepInput, hidden: torch.Tensor) -> torch.Tensor:
        if len(step.logit_rows) == step.num_tokens:
            return hidden
        return hidden.index_select(0, self._on_device(step.logit_rows))

    def _store_features(self, step: StepInput, features: torch.Tensor) -> None:
        cached = self._features.cached
        if cached.numel():
            cached.index_copy_(0, self._on_device(step.slots), features.to(self.dtype))

    def _make_features(self, projection: Projection | None) -> TargetFeatures:
        size, mesh = feature_size(projection), self.mesh
        embeds = mesh is None or mesh.is_first_stage
        capture, num_slots = None, 0
        if projection is not None and (mesh is None or mesh.tensor_rank == 0):
            capture = FeatureCapture(
                projection,
                self._base,
                layers=self.layers,
                num_layers=self._num_layers,
                embeds=embeds,
                packs=self._has_kernels,
            )
            num_slots = self.num_pages * self.page_size if mesh is None or mesh.rank == 0 else 0
        cached = torch.zeros((num_slots, size), dtype=self.dtype, device=self.device)
        return TargetFeatures(
            projection_digest(projection),
            size,
            capture,
            cached,
            self._compile(capture, embeds=embeds),
        )

    def _compile(
        self, capture: FeatureCapture | None, *, embeds: bool
    ) -> CompiledLayers | GraphedLayers | None:
        if not self._compiles or not isinstance(self.cache, KVCache):
            return None
        cache = self.cache

        def compile() -> CompiledLayers:
            with cache.rehearsal(self.device):
                layers = cache.in_place_layers
                return CompiledLayers(self._base, capture, layers, embeds=embeds)

        compiled = try_to_compile("target", compile)
        self._compiles = compiled is not None
        if compiled is None or cache.buffers is None:
            return compiled
        return GraphedLayers(compiled, cache.buffers)

    def _make_buffers(self, config: TargetConfig) -> PassBuffers | None:
        """Where passes are loaded on a CUDA device, for kernels of our own."""
        if not self._has_kernels or self.device.type == "cpu":
            return None
        context = min(config.max_model_len or self.max_model_len, self.max_model_len)
        num_pages = -(-context // config.page_size)
        return PassBuffers(
            config.max_num_batched_tokens, config.max_num_seqs, num_pages, self.device
        )

    @torch.inference_mode()
    def _warm_up_graphs(self, layers: GraphedLayers) -> GraphedHead:
        """Captures the layers' graphs, and the output head's, before anybody waits for them."""
        for size in reversed(layers.sizes):  # smaller ones find memory that larger ones used
            self.forward(StepInput.idle(size))
        head = GraphedHead(self._logits, self.hidden_size, self.dtype, self.device)
        for size in reversed(head.sizes):
            head(torch.zeros(size, self.hidden_size, dtype=self.dtype, device=self.device))
        return head

    @torch.inference_mode()
    def _try_one_token(self, architecture: str) -> None:
        """Runs a token on page 0, so that the cache knows what a token takes.

        Raises:
            ConfigError: a layer did not attend through the cache.
        """
        hidden = None
        if self.mesh is not None and not self.mesh.is_first_stage:
            hidden = torch.zeros(1, self.hidden_size, dtype=self.dtype, device=self.device)
        self._run_layers(StepInput.idle(1), hidden)
        missing = [layer for layer in self.layers if not self.cache.serves(layer)]
        if missing:
            raise ConfigError(
                "target.model",
                f"{architecture} cannot be served: its layers {missing} do not attend through "
                "transformers' AttentionInterface",
            )

    def _pages_for_memory(self, config: TargetConfig, feature_size: int) -> int:
        """Pages that fit the configured memory, and no more than can be used at once.

        Features of a drafter that comes later are not counted.
        """
        feature_bytes = feature_size * torch.empty(0, dtype=self.dtype).element_size()
        page_bytes = (self.cache.bytes_per_token + feature_bytes) * config.page_size
        sequence_bytes = config.max_num_seqs * self.cache.bytes_per_sequence
        fitting = int((config.kv_cache_memory_mb * 2**20 - sequence_bytes) / page_bytes)
        context = config.max_model_len or self.max_model_len
        useful = config.max_num_seqs * -(-context // config.page_size) + 1
        return max(2, min(fitting, useful))


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
