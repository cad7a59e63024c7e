"""What runs where, and how busy it is, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.engine.load import EngineLoad, PrefixCacheStats
from cluster.engine.pace import PaceStats
from cluster.histogram import Histogram
from cluster.request import SpeculationStats
from cluster.rpc.convert import pace_from_proto, pace_to_proto, stats_from_proto
from cluster.v1 import common_pb2, inference_pb2


@dataclass(frozen=True, kw_only=True)
class ShardStatus:
    """One shard of a replica: its rank, where it runs, and its part of the model."""

    rank: int
    node: str
    pid: int
    pipeline_stage: int = 0
    tensor_rank: int = 0


@dataclass(frozen=True, kw_only=True)
class DrafterStatus:
    """One drafter as a replica sees it.

    Attributes:
        state: connecting, ready, open (too slow or lost too often, left alone for a while),
            half-open (one round is tried), quarantined (it broke the protocol), mismatched or lost.
        reason: why it is not ready, else empty.
        round_trip_ms: moving average over rounds.
        num_rounds: by what became of them: answered, late, dropped, lost.
        round_trip_s: of all answers.
        paced: how well its rounds keep a device profile's time; ``None``: they take what they take.
    """

    drafter_id: str
    address: str
    state: str
    reason: str = ""
    round_trip_ms: float = 0.0
    num_rounds: Mapping[str, int] = field(default_factory=dict)
    round_trip_s: Histogram | None = None
    paced: PaceStats | None = None


@dataclass(frozen=True, kw_only=True)
class ReplicaParts:
    """What a replica's load report says beside the engine's load.

    Attributes:
        num_malformed_proposals: answers of drafters that broke the protocol, since the start.
        speculation_method: of the drafter in use; empty without one.
        speculation_model: its checkpoint; empty where the method has none.
    """

    shards: Sequence[ShardStatus] = ()
    drafters: Sequence[DrafterStatus] = ()
    num_malformed_proposals: int = 0
    speculation_method: str = ""
    speculation_model: str = ""


@dataclass(frozen=True, kw_only=True)
class SwitchStatus:
    """Which mode a replica speculates in, and what it expects of that.

    Attributes:
        mode: plain, speculative or grouped; empty before the first report.
        reason_code: why, as one of few words (``SwitchReason``).
        num_flips: times that speculation went off or on.
        seconds_in_state: since the mode in force was entered.
        seconds_in_mode: in each mode since the start.
        drafter_demand: drafters that its rounds keep busy.
        goodput: tokens per second expected with speculation, at the load of the last step;
            ``goodput_plain``: the same without.
    """

    mode: str = ""
    reason_code: str = ""
    num_flips: int = 0
    seconds_in_state: float = 0.0
    seconds_in_mode: Mapping[str, float] = field(default_factory=dict)
    drafter_demand: float = 0.0
    goodput: float = 0.0
    goodput_plain: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ReplicaStatus:
    """One target replica as a router sees it.

    Attributes:
        state: connecting, ready, draining, mismatched or lost; all but ``replica_id``, ``address``
            and ``reason`` are as of its last report.
        reason: why it is mismatched, else empty.
        kv_cache_usage: share of pages that requests hold, 0..1.
        speculation_state: on or off; ``speculation_reason`` says why, and ``switch`` more.
        speculation: sums since the replica started.
        speculation_method, speculation_model: as in ``ReplicaParts``.
        calibration_error: 0..1, by how much confidences as served are off; ``None``: not known yet.
        calibration_drift: largest factor of a temperature in force, or of odds, over its fit.
        paced: how well steps keep a device profile's time; ``None``: they take what they take.
    """

    replica_id: str
    address: str
    state: str
    reason: str = ""
    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_output_tokens: int = 0
    prefix_cache: PrefixCacheStats = field(default_factory=PrefixCacheStats)
    speculation_state: str = ""
    speculation_reason: str = ""
    switch: SwitchStatus = field(default_factory=SwitchStatus)
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    speculation_method: str = ""
    speculation_model: str = ""
    calibration_error: float | None = None
    calibration_drift: float = 1.0
    paced: PaceStats | None = None
    shards: tuple[ShardStatus, ...] = ()
    drafters: tuple[DrafterStatus, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RouterStatus:
    """A router and where its gRPC server listens (``host:port``)."""

    router_id: str
    address: str


@dataclass(frozen=True, kw_only=True)
class ClusterStatus:
    """The cluster as one router, ``router_id``, sees it.

    Attributes:
        num_active_requests: calls that this router has under way.
        routers: all that run; empty where the router was not told.
    """

    model: str
    router_id: str
    version: str
    num_active_requests: int
    replicas: tuple[ReplicaStatus, ...]
    routers: tuple[RouterStatus, ...] = ()


def cluster_status_from_proto(message: inference_pb2.GetStatusResponse) -> ClusterStatus:
    """Reads a router's answer."""
    return ClusterStatus(
        model=message.model,
        router_id=message.router_id,
        version=message.version,
        num_active_requests=message.num_active_requests,
        replicas=tuple(map(_replica_from_proto, message.replicas)),
        routers=tuple(
            RouterStatus(router_id=router.router_id, address=router.address)
            for router in message.routers
        ),
    )


def shard_to_proto(shard: ShardStatus) -> inference_pb2.ShardStatus:
    """Writes one shard."""
    return inference_pb2.ShardStatus(**vars(shard))


def drafter_to_proto(drafter: DrafterStatus) -> inference_pb2.DrafterStatus:
    """Writes one drafter."""
    round_trip = drafter.round_trip_s
    return inference_pb2.DrafterStatus(
        drafter_id=drafter.drafter_id,
        address=drafter.address,
        state=drafter.state,
        reason=drafter.reason,
        round_trip_ms=drafter.round_trip_ms,
        paced=None if drafter.paced is None else pace_to_proto(drafter.paced),
        num_rounds=drafter.num_rounds,
        round_trip_seconds=None if round_trip is None else _histogram_to_proto(round_trip),
    )


def load_to_metrics(load: EngineLoad) -> inference_pb2.ReplicaMetrics:
    """Writes what of an engine's load nothing but metrics is made of."""
    speculation = load.speculation
    return inference_pb2.ReplicaMetrics(
        num_prompt_tokens=load.num_prompt_tokens,
        num_preemptions=load.num_preemptions,
        num_requests_by_budget=load.num_requests_by_budget,
        speculation_mode=speculation.mode,
        speculation_reason_code=speculation.reason_code,
        num_flips=speculation.num_flips,
        seconds_in_mode=speculation.seconds_in_mode,
        drafter_demand=speculation.draft_seconds_per_second,
        draft_queue_seconds=speculation.draft_queue_seconds,
        draft_network_seconds=speculation.draft_network_seconds,
        goodput=speculation.goodput,
        goodput_plain=speculation.goodput_plain,
        seconds_in_state=speculation.seconds_in_state,
    )


def _histogram_to_proto(histogram: Histogram) -> common_pb2.Histogram:
    return common_pb2.Histogram(bounds=histogram.bounds, counts=histogram.counts, sum=histogram.sum)


def _replica_from_proto(message: inference_pb2.ReplicaStatus) -> ReplicaStatus:
    return ReplicaStatus(
        replica_id=message.replica_id,
        address=message.address,
        state=message.state,
        reason=message.reason,
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        kv_cache_usage=message.kv_cache_usage,
        num_output_tokens=message.num_output_tokens,
        prefix_cache=PrefixCacheStats(
            num_queried_tokens=message.prefix_cache.num_queried_tokens,
            num_hit_tokens=message.prefix_cache.num_hit_tokens,
            num_cached_pages=message.prefix_cache.num_cached_pages,
            num_evicted_pages=message.prefix_cache.num_evicted_pages,
        ),
        speculation_state=message.speculation_state,
        speculation_reason=message.speculation_reason,
        switch=SwitchStatus(
            mode=message.metrics.speculation_mode,
            reason_code=message.metrics.speculation_reason_code,
            num_flips=message.metrics.num_flips,
            seconds_in_state=message.metrics.seconds_in_state,
            seconds_in_mode=dict(message.metrics.seconds_in_mode),
            drafter_demand=message.metrics.drafter_demand,
            goodput=message.metrics.goodput,
            goodput_plain=message.metrics.goodput_plain,
        ),
        speculation=stats_from_proto(message.speculation),
        speculation_method=message.speculation_method,
        speculation_model=message.speculation_model,
        calibration_error=(
            message.calibration_error if message.HasField("calibration_error") else None
        ),
        calibration_drift=(
            message.calibration_drift if message.HasField("calibration_drift") else 1.0
        ),
        paced=pace_from_proto(message),
        shards=tuple(
            ShardStatus(
                rank=shard.rank,
                node=shard.node,
                pid=shard.pid,
                pipeline_stage=shard.pipeline_stage,
                tensor_rank=shard.tensor_rank,
            )
            for shard in message.shards
        ),
        drafters=tuple(
            DrafterStatus(
                drafter_id=drafter.drafter_id,
                address=drafter.address,
                state=drafter.state,
                reason=drafter.reason,
                round_trip_ms=drafter.round_trip_ms,
                paced=pace_from_proto(drafter),
            )
            for drafter in message.drafters
        ),
    )
