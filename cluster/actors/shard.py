"""One tensor-parallel rank of one pipeline stage, as a Ray actor.

Imported by the front too, which has no model: torch and the engine are imported by the methods that
run in the shard's own process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import ray

from cluster.actors.digests import read_digests
from cluster.actors.own_thread import in_own_thread
from cluster.actors.tracing import start_tracing
from cluster.config import ClusterConfig, SpeculativeConfig
from cluster.errors import CheckpointError
from cluster.garbage import preload
from cluster.rpc.cluster_status import DrafterStatus, ReplicaParts, ShardStatus

if TYPE_CHECKING:
    from cluster.engine.load import EngineLoad
    from cluster.engine.local_drafter import LocalDraftClient
    from cluster.engine.loop import EngineLoop
    from cluster.engine.worker import ShardWorker
    from cluster.rpc.drafter_client import GrpcDraftClient
    from cluster.rpc.replica_server import ReplicaServer
    from cluster.rpc.tls import InternalTls
    from cluster.speculation.calibration import Calibration

_FAILURE_POLL_S = 0.1

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardHealth:
    """What a shard says about itself; seconds on its own monotonic clock.

    Attributes:
        idle_s: since the last step ended or, without work, since the loop last looked for some.
            0.0 on the shards that follow.
        predicted_step_s: how long the longest step should take; 0.0 where that is not known.
        load: of the engine; ``None`` on the shards that follow.
    """

    idle_s: float = 0.0
    predicted_step_s: float = 0.0
    load: EngineLoad | None = None


class _StagedDrafter(NamedTuple):
    """What rank 0 goes over to: a configuration and, where it drafts, what is needed for it."""

    config: ClusterConfig
    client: GrpcDraftClient | None
    calibration: Calibration


class Shard:
    """Hosts a ``ShardWorker``; on rank 0 the engine loop and the replica's gRPC streams as well.

    Guarantees: every method answers while the model works, because the work has threads of its own;
    ``wait_ended`` returns once this shard cannot go on, with the reason. A shard is started once.
    """

    def __init__(self, config: ClusterConfig, replica_id: str, rank: int) -> None:
        self._config = config
        self._replica_id = replica_id
        self._rank = rank
        self._places: Sequence[ShardStatus] = ()
        self._digests: dict[str, str] = {}
        self._worker: ShardWorker | None = None
        self._following: asyncio.Future[None] | None = None
        self._draft_client: GrpcDraftClient | None = None
        self._local_drafter: LocalDraftClient | None = None
        self._staged: _StagedDrafter | None = None
        self._num_malformed_proposals = 0  # of clients that are used no more
        self._drafters: list[tuple[str, str]] = []
        self._loop: EngineLoop | None = None
        self._server: ReplicaServer | None = None
        self._internal_tls: InternalTls | None = None

    async def prepare(self) -> None:
        """Before any rank starts: builds what this node lacks, which may take a minute."""
        await in_own_thread(lambda: self._make_worker().prepare())

    async def open_rendezvous(self) -> tuple[str, int]:
        """Rank 0: where the shards meet, as host and port."""
        host = _node_address()
        return host, await in_own_thread(lambda: self._make_worker().open_rendezvous(host))

    async def start(self, host: str, port: int, generation: int) -> ShardStatus:
        """Joins the other ranks, which start at the same time, and loads this rank's part.

        Rank 0 reads the digests of the models meanwhile: behind this, the others wait for it no
        longer than for any step.

        Raises:
            CheckpointError: the model cannot be loaded.
            ConfigError: it cannot be cut as configured.
        """
        worker = await in_own_thread(self._make_worker)
        loading = in_own_thread(lambda: worker.start(host, port, generation))
        if self._rank == 0:
            reading = in_own_thread(lambda: read_digests(self._config))
            _, self._digests = await asyncio.gather(loading, reading)
        else:
            await loading
        stage, tensor_rank = divmod(self._rank, self._config.target.tensor_parallel_size)
        return ShardStatus(
            rank=self._rank,
            node=socket.gethostname(),
            pid=os.getpid(),
            pipeline_stage=stage,
            tensor_rank=tensor_rank,
        )

    async def follow(self) -> None:
        """Other ranks, when every shard has started: begins to do what rank 0 says."""
        worker = self._make_worker()
        self._following = asyncio.ensure_future(in_own_thread(worker.follow))

    async def serve(self, places: Sequence[ShardStatus]) -> str:
        """Rank 0, when every shard has started: begins to serve routers.

        Args:
            places: all shards, for the status report.

        Returns:
            The address (``host:port``) of this replica's ReplicaService.
        """
        from cluster.engine.loop import EngineLoop
        from cluster.rpc.replica_server import ReplicaServer

        self._places = places
        start_tracing(self._config, "replica", self._replica_id)
        worker = self._make_worker()
        if self._config.drafter.placement == "colocated":
            self._local_drafter = await in_own_thread(lambda: _make_local_drafter(self._config))
        else:
            self._draft_client = self._make_draft_client(self._config, self._digests)
        calibration = await in_own_thread(lambda: _load_calibration(self._config, self._digests))
        engine = await in_own_thread(
            lambda: worker.build_engine(
                self._draft_client or self._local_drafter,
                target_digest=self._digests["target"],
                calibration=calibration,
            )
        )
        self._server = ReplicaServer(
            self._replica_id,
            max_model_len=engine.max_model_len,
            vocab_size=engine.vocab_size,
            model_digests=self._digests,
            describe=self._describe,
            tls=self._tls().server,
        )
        self._loop = EngineLoop(engine, self._server.on_outputs)
        self._loop.start()
        host = _node_address()
        port = await self._server.start(self._loop, host)
        return f"{host}:{port}"

    def set_drafters(self, drafters: list[tuple[str, str]]) -> None:
        """Rank 0: the drafters there are now, as (id, address)."""
        self._drafters = drafters
        for client in self._draft_clients():
            client.set_drafters(drafters)

    async def stage_drafter(self, speculative: SpeculativeConfig | None) -> None:
        """Loads what this rank needs for another drafter, beside what is in use.

        Rank 0 connects to the drafters, which may not be ready for it yet.

        Raises:
            CheckpointError: the drafter cannot be read, or does not fit the target.
            ConfigError: its features cannot be taken from this target.
        """
        config = self._config.model_copy(update={"speculative": speculative})
        worker = self._make_worker()
        await in_own_thread(lambda: worker.stage_drafter(config))
        if self._rank > 0:
            return
        digests = await in_own_thread(lambda: read_digests(config))
        calibration = await in_own_thread(lambda: _load_calibration(config, digests))
        await self._leave_staged()
        client = self._make_draft_client(config, digests)
        if client is not None:
            client.set_drafters(self._drafters)
        self._staged = _StagedDrafter(config, client, calibration)

    async def use_staged_drafter(self) -> bool:
        """Rank 0: goes over to what is staged on all ranks, if some drafter is ready for it.

        Returns:
            Whether it is in use.
        """
        staged = self._staged
        if staged is None:
            return True
        if staged.config.speculative == self._config.speculative:
            await self._leave_staged()  # back to what is in use still
            return True
        if staged.client is not None and not staged.client.is_ready():
            return False
        if self._loop is None:
            raise RuntimeError("use_staged_drafter before serve")
        self._staged = None
        former, self._draft_client = self._draft_client, staged.client
        self._config = staged.config
        await asyncio.wrap_future(
            self._loop.swap_drafter(staged.config.speculative, staged.client, staged.calibration)
        )
        if former is not None:
            self._num_malformed_proposals += former.stats.num_malformed
            await asyncio.to_thread(former.close)
        return True

    async def health(self) -> ShardHealth:
        """How the shard is; that it answers at all says the most."""
        if self._loop is None:
            return ShardHealth()
        return ShardHealth(
            idle_s=time.monotonic() - self._loop.last_progress,
            predicted_step_s=self._loop.predicted_step_s(),
            load=self._loop.load(),
        )

    async def wait_ended(self) -> str:
        """Returns why this shard does no more work, once that is so."""
        if self._following is not None:
            try:
                # Shielded: who asks may go away, the work goes on.
                await asyncio.shield(self._following)
            except Exception as error:  # whatever it was, this shard is lost
                return f"{type(error).__name__}: {error}"
            return "rank 0 has stopped"
        while self._loop is None or self._loop.failure is None:
            await asyncio.sleep(_FAILURE_POLL_S)
        return f"{type(self._loop.failure).__name__}: {self._loop.failure}"

    async def drain(self, timeout_s: float) -> None:
        """Rank 0: takes no new requests and waits for the running ones, at most ``timeout_s``."""
        if self._server is not None:
            await self._server.stop(timeout_s)

    async def stop(self) -> None:
        """Ends the work and leaves the process group; rank 0 tells the others that it is over."""
        if self._loop is not None:
            await asyncio.to_thread(self._loop.stop)
        for client in self._draft_clients():
            await asyncio.to_thread(client.close)
        if self._following is not None:
            await asyncio.wait([self._following])
        if self._worker is not None:
            await in_own_thread(self._worker.close)

    def _make_worker(self) -> ShardWorker:
        if self._worker is None:
            preload("cluster.engine.worker")
            from cluster.engine.worker import ShardWorker

            self._worker = ShardWorker(self._config, self._rank)
        return self._worker

    def _draft_clients(self) -> list[GrpcDraftClient]:
        staged = None if self._staged is None else self._staged.client
        return [client for client in (self._draft_client, staged) if client is not None]

    async def _leave_staged(self) -> None:
        staged, self._staged = self._staged, None
        if staged is not None and staged.client is not None:
            await asyncio.to_thread(staged.client.close)

    def _make_draft_client(
        self, config: ClusterConfig, digests: Mapping[str, str]
    ) -> GrpcDraftClient | None:
        if config.speculative is None:
            return None
        from cluster.engine.target_config import load_text_config
        from cluster.rpc.drafter_client import GrpcDraftClient

        target = config.target
        model = load_text_config(target.model, trust_remote_code=target.trust_remote_code)
        return GrpcDraftClient(
            replica_id=self._replica_id,
            digests=digests,
            vocab_size=model.vocab_size,
            config=config.speculative,
            event_loop=asyncio.get_running_loop(),
            tls=self._tls().channel,
            host=_node_address(),
        )

    def _tls(self) -> InternalTls:
        if self._internal_tls is None:
            from cluster.rpc.tls import load_security

            self._internal_tls = load_security(self._config.security).internal
        return self._internal_tls

    def _describe(self) -> ReplicaParts:
        speculative, client = self._config.speculative, self._draft_client
        drafters: Sequence[DrafterStatus] = ()
        num_malformed = self._num_malformed_proposals
        if client is not None:
            drafters = client.status()
            num_malformed += client.stats.num_malformed
        elif self._local_drafter is not None:
            drafters = [_local_status(self._local_drafter)]
        return ReplicaParts(
            shards=self._places,
            drafters=drafters,
            num_malformed_proposals=num_malformed,
            speculation_method="" if speculative is None else speculative.method,
            speculation_model="" if speculative is None else speculative.model or "",
        )


def _make_local_drafter(config: ClusterConfig) -> LocalDraftClient | None:
    """The drafter beside the target, in this process and on its device."""
    from cluster.engine.draft_factory import build_measured_draft_engine
    from cluster.engine.local_drafter import LocalDraftClient

    if config.speculative is None:
        return None
    engine = build_measured_draft_engine(config)
    return LocalDraftClient(engine, engine.curve)


def _local_status(drafter: LocalDraftClient) -> DrafterStatus:
    return DrafterStatus(
        drafter_id="colocated",
        address="",
        state="ready",
        num_rounds={"answered": drafter.num_rounds},
        paced=drafter.paced,
    )


def _load_calibration(config: ClusterConfig, digests: Mapping[str, str]) -> Calibration:
    """The drafter's calibration. One that cannot be used must not keep a target from serving:
    confidences are then taken as they are, until online calibration has seen enough."""
    from cluster.engine.drafter_calibration import load_drafter_calibration
    from cluster.speculation.calibration import Calibration

    try:
        return load_drafter_calibration(config, digests)
    except CheckpointError as error:
        _logger.warning("confidences stay uncalibrated: %s", error)
        return Calibration()


def _node_address() -> str:
    return ray.util.get_node_ip_address()
