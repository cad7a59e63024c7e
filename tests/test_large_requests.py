"""Requests that are larger than the queues of the replicas."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any

import httpx2 as httpx
import pytest

from cluster.api.app import create_app
from cluster.errors import QueueFullError
from cluster.request import Request
from tests.rpc_tools import Cluster, expected, gather_chunks, running_cluster, until


async def test_choices_beyond_the_queue_wait_for_the_others() -> None:
    async with running_cluster(2, max_num_seqs=3, step_s=0.002) as cluster:
        chunks = await gather_chunks(cluster.client, [5], n=16, max_tokens=8)
        for index in range(16):
            tokens = [t for c in chunks if c.choice_index == index for t in c.token_ids]
            assert tokens == expected([5], 8, index)
        assert (
            len(cluster.replicas[0].loop.submitted) + len(cluster.replicas[1].loop.submitted) > 16
        )


async def test_a_request_is_refused_at_once_before_anything_of_it_has_begun() -> None:
    async with running_cluster(max_num_seqs=1, step_s=0.01) as cluster:
        first = asyncio.create_task(gather_chunks(cluster.client, [1], max_tokens=100))
        await until(lambda: cluster.replicas[0].loop.num_active == 1)
        started_at = time.monotonic()
        with pytest.raises(QueueFullError):
            await gather_chunks(cluster.client, [2], n=4)
        assert time.monotonic() - started_at < 0.5
        assert not first.done()
        await first


async def test_one_that_has_begun_outlasts_what_others_take() -> None:
    """Between two of its choices another client's request takes the one place."""
    async with running_cluster(max_num_seqs=1, step_s=0.002) as cluster:
        loop = cluster.replicas[0].loop
        ours = asyncio.create_task(gather_chunks(cluster.client, [1], n=2, max_tokens=4))
        await until(lambda: len(loop.submitted) >= 2)
        loop.max_num_seqs = 0
        await until(lambda: len(loop.submitted) >= 4)  # the second, refused again by itself
        assert not ours.done()
        loop.max_num_seqs = 1
        chunks = await ours
        for index in range(2):
            tokens = [t for c in chunks if c.choice_index == index for t in c.token_ids]
            assert tokens == expected([1], 4, index)


async def test_a_deadline_passes_for_what_waits_too() -> None:
    async with running_cluster(max_num_seqs=1, step_s=0.002) as cluster:
        loop = cluster.replicas[0].loop
        body = {"prompt": ["a"] * 2, "max_tokens": 40, "timeout_seconds": 0.8}
        ours = asyncio.create_task(complete(cluster, **body))
        await until(lambda: len(loop.submitted) >= 2)
        loop.max_num_seqs = 0
        answer = await ours
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout_error")


async def test_a_client_that_leaves_takes_along_what_waits() -> None:
    async with running_cluster(max_num_seqs=2, step_s=0.01) as cluster:
        loop = cluster.replicas[0].loop
        async with aclosing(cluster.client.generate([1], n=16, max_tokens=400)) as chunks:
            await anext(chunks)
        await until(lambda: loop.num_active == 0)
        num_submitted = len(loop.submitted)
        await asyncio.sleep(1.0)
        assert len(loop.submitted) == num_submitted


async def complete(cluster: Cluster, **body: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app=create_app(cluster.router))
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
        return await client.post("/v1/completions", json=body)


async def test_many_prompts_over_http_go_through_piece_by_piece() -> None:
    async with running_cluster(max_num_seqs=20, step_s=0.001) as cluster:
        answer = await complete(cluster, prompt=["a"] * 100, n=3, max_tokens=1)
        assert answer.status_code == 200, answer.json()
        choices = answer.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(300))
        assert {choice["finish_reason"] for choice in choices} == {"length"}
        assert answer.json()["usage"]["completion_tokens"] == 300


async def test_a_large_request_leaves_room_in_the_queues() -> None:
    """What has a place in the queue waits there for one of the two in the batch."""
    async with running_cluster(max_num_seqs=42, step_s=0.002) as cluster:
        loop = cluster.replicas[0].loop
        running: set[str] = set()

        def is_queued(request: Request) -> bool:
            running.intersection_update(loop.active_ids)
            if request.request_id not in running and len(running) < 2:
                running.add(request.request_id)
            return request.request_id not in running

        loop.is_queued = is_queued
        ours = asyncio.create_task(complete(cluster, prompt=["a"] * 20, n=8, max_tokens=4))
        await until(lambda: len(loop.submitted) > 100)
        await until(lambda: loop.num_active <= 24)
        await gather_chunks(cluster.client, [7], max_tokens=1)
        assert loop.num_active <= 24
        assert not ours.done()
        assert (await ours).status_code == 200


async def test_what_the_router_never_queues_is_no_matter_of_waiting() -> None:
    async with running_cluster(router={"max_queued_tokens": 1000}) as cluster:
        answer = await complete(cluster, prompt=["a"] * 10, n=3, max_tokens=40)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "prompt")
        assert "900 that this router queues" in error["message"]
        assert (await complete(cluster, prompt=["a"] * 10, n=3, max_tokens=20)).status_code == 200
