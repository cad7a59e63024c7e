"""What one shard actor does, without the actor: join the group, load its part, work.

Order of calls, on all ranks at once: ``start``; then ``build_engine`` on rank 0 while every other
rank runs ``follow``.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from cluster.config import ClusterConfig
from cluster.engine.draft_client import DraftClient
from cluster.engine.engine import Engine
from cluster.engine.kernels import has_kernels
from cluster.engine.mesh import Mesh, open_store
from cluster.engine.pace import target_pace
from cluster.engine.runner import Runner, follow
from cluster.engine.target import TargetShard
from cluster.engine.target_config import eos_token_ids, load_text_config, load_tokenizer
from cluster.models.checkpoint import Projection, load_projection
from cluster.models.drafter_check import check_drafter
from cluster.models.hub import local_folder
from cluster.speculation.calibration import Calibration


class ShardWorker:
    """One rank of a replica. Collectives have one caller at a time: first whoever calls ``start``
    and ``build_engine``, then the engine's thread on rank 0 and ``follow`` on the others.

    Args:
        config: the cluster's configuration.
        rank: 0 .. ``config.target.num_shards - 1``; rank 0 runs the engine.
    """

    def __init__(self, config: ClusterConfig, rank: int) -> None:
        self.config = config
        self.rank = rank
        self._store: dist.Store | None = None
        self._mesh: Mesh | None = None
        self._shard: TargetShard | None = None
        target = config.target
        is_paced = rank == 0 and target.pace is not None
        self._pace = target_pace(target.pace, target.pipeline_parallel_size) if is_paced else None

    def prepare(self) -> None:
        """Before any rank starts: builds what this machine lacks, for which no other rank waits."""
        target = self.config.target
        if not target.deterministic:
            has_kernels(torch.device(target.device), getattr(torch, target.dtype))

    def open_rendezvous(self, host: str) -> int:
        """Rank 0: binds the rendezvous on a free port of ``host`` and returns the port."""
        target = self.config.target
        store = open_store(host, target.num_shards, target.collective_timeout_s)
        self._store = store
        return int(store.port)

    def start(self, host: str, port: int, generation: int) -> None:
        """Joins the replica's process group and loads this rank's part of the model (blocking).

        Args:
            host: of the rendezvous; ``port``: what ``open_rendezvous`` returned.
            generation: distinguishes this group from earlier ones at the same place.

        Raises:
            CheckpointError: the model or the drafter's projection cannot be loaded.
            ConfigError: the model cannot be cut as configured.
        """
        target = self.config.target
        cores = os.cpu_count() or 1
        torch.set_num_threads(target.num_threads or max(1, cores // target.num_shards))
        device = torch.device(target.device)
        if target.num_shards > 1:
            timeout_s = target.collective_timeout_s
            store = self._store or dist.TCPStore(
                host, port, target.num_shards, timeout=timedelta(seconds=timeout_s)
            )
            self._mesh = Mesh(
                dist.PrefixStore(f"generation-{generation}", store),
                rank=self.rank,
                tensor_parallel_size=target.tensor_parallel_size,
                pipeline_parallel_size=target.pipeline_parallel_size,
                device=device,
                timeout_s=timeout_s,
            )
        self._shard = TargetShard(target, self._mesh, _load_projection(self.config))

    def make_runner(self) -> Runner:
        """Rank 0: what runs passes through all shards, while all other ranks follow."""
        if self._shard is None:
            raise RuntimeError("make_runner before start")
        return Runner(self._shard, self._pace)

    def build_engine(
        self,
        draft_client: DraftClient | None,
        *,
        target_digest: str | None = None,
        calibration: Calibration | None = None,
        seed: int | None = None,
    ) -> Engine:
        """Rank 0: makes the engine; profiles the target, for which all other ranks must follow.

        Args:
            draft_client: the drafters, or ``None`` to decode plainly.
            target_digest: with it the verify curve of an earlier start is used, and one is kept.
            calibration: of the drafter's confidences; unset: they are taken as they are.
            seed: of the engine's random streams; unset: from the operating system.
        """
        model = self.config.target.model
        trust = self.config.target.trust_remote_code
        return Engine(
            self.config,
            self.make_runner(),
            eos_token_ids=eos_token_ids(model, trust_remote_code=trust),
            tokenizer=load_tokenizer(model, trust_remote_code=trust),
            draft_client=draft_client,
            target_digest=target_digest,
            calibration=calibration,
            seed=seed,
        )

    def stage_drafter(self, config: ClusterConfig) -> None:
        """Loads what this rank needs for another drafter, for ``Engine.swap_drafter`` to use.

        May be called in another thread than the one that works.

        Args:
            config: differs from this worker's in nothing but ``speculative``.

        Raises:
            CheckpointError: the drafter cannot be read, or does not fit the target.
            ConfigError: its features cannot be taken from this target.
        """
        if self._shard is None:
            raise RuntimeError("stage_drafter before start")
        self._shard.stage_features(_load_projection(config))

    def follow(self) -> None:
        """Other ranks: does what rank 0 says until it stops or the group breaks (blocking).

        Raises:
            RuntimeError: the group is broken.
        """
        if self._shard is None or self._mesh is None:
            raise RuntimeError("follow before start, or on a replica of one shard")
        follow(self._shard, self._mesh)

    def close(self) -> None:
        """Leaves the process group."""
        if self._mesh is not None:
            self._mesh.close()


def _load_projection(config: ClusterConfig) -> Projection | None:
    speculative = config.speculative
    if speculative is None or speculative.model is None:
        return None
    target = load_text_config(
        config.target.model, trust_remote_code=config.target.trust_remote_code
    )
    folder = local_folder(speculative.checkpoint)
    check_drafter(speculative, folder, target.to_dict(), local_folder(config.target.model))
    if not speculative.uses_features:
        return None
    return load_projection(folder, num_target_layers=target.num_hidden_layers)
