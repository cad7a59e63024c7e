"""``dspark status``: what runs where, how busy it is, and whether it speculates."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cluster.cli.generate import add_address
from cluster.cli.state import default_address

if TYPE_CHECKING:
    from cluster.engine.pace import PaceStats
    from cluster.rpc.cluster_status import ClusterStatus, ReplicaStatus


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds ``status`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "status",
        help="replicas, shards, drafters, load, speculation mode and why",
        description="Shows replicas, shards, drafters, load, and the speculation mode with its "
        "reason, as one router sees them.",
    )
    add_address(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command. Raises: ReplicaLostError: no router answers."""
    from cluster.rpc.client import Client

    address = args.address or default_address()
    with Client(address) as client:
        status = client.status()
    if args.json:
        print(json.dumps({"address": address, **dataclasses.asdict(status)}))
    else:
        _print(address, status)
    return 0


def _print(address: str, status: ClusterStatus) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{status.model} at {address}, router {status.router_id}, version {status.version}, "
        f"{status.num_active_requests} active requests"
    )
    for replica in status.replicas:
        why = f" ({replica.reason})" if replica.reason else ""
        console.print(f"\nReplica {replica.replica_id} at {replica.address}: {replica.state}{why}")
        console.print(
            f"  load: {replica.num_running} running, {replica.num_waiting} waiting, "
            f"KV cache {replica.kv_cache_usage:.0%} full, {replica.num_output_tokens} tokens so far"
        )
        if replica.paced is not None:
            console.print(f"  {_pace(replica.paced)}")
        cache = replica.prefix_cache
        if cache.num_queried_tokens:
            console.print(
                f"  prefix cache: {cache.hit_rate:.0%} of prompt tokens found, "
                f"{cache.num_cached_pages} pages, {cache.num_evicted_pages} evicted so far"
            )
        stats = replica.speculation
        console.print(
            f"  speculation: {replica.speculation_state} ({replica.speculation_reason}), "
            f"acceptance length {stats.acceptance_length:.2f} over {stats.num_drafts} rounds"
        )
        switch = replica.switch
        console.print(
            f"  mode: {switch.mode} for {switch.seconds_in_state:.0f} s, "
            f"{switch.num_flips} flips so far, {switch.drafter_demand:.2f} drafters kept busy"
        )
        if replica.speculation_method:
            console.print(f"  method: {replica.speculation_method} {replica.speculation_model}")
        if replica.calibration_error is not None:
            console.print(
                f"  confidence: {replica.calibration_error:.1%} off, temperatures and odds within "
                f"a factor of {replica.calibration_drift:.2f} of their offline fit"
            )
        console.print(_parts_table(replica))


def _pace(paced: PaceStats) -> str:
    return (
        f"PACED as {paced.profile}, time x {paced.time_scale:g}: {paced.num_overruns} of "
        f"{paced.num_passes} passes took longer, the worst {paced.worst_overrun:.2f} times as long"
    )


def _parts_table(replica: ReplicaStatus) -> Table:
    table = Table(box=None, pad_edge=True)
    for heading in ("part", "where", "state", "detail"):
        table.add_column(heading)
    for shard in replica.shards:
        table.add_row(
            f"shard {shard.rank}",
            f"{shard.node}, process {shard.pid}",
            replica.state,
            f"pipeline stage {shard.pipeline_stage}, tensor rank {shard.tensor_rank}",
        )
    for drafter in replica.drafters:
        detail = drafter.reason or f"round trip {drafter.round_trip_ms:.1f} ms"
        if drafter.paced is not None:
            detail += f"; {_pace(drafter.paced)}"
        table.add_row(f"drafter {drafter.drafter_id}", drafter.address, drafter.state, detail)
    return table
