"""The suite pipeline: its figures, a delayed link, and a short run."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from cluster.bench import pipeline
from cluster.bench.delayed_link import serve_link
from cluster.bench.pipeline import COLOCATED, FAR, FAR_UNGROUPED, NEAR, NEAR_TWO, PipelineShape
from cluster.bench.turns import Turn
from cluster.config import ClusterConfig
from cluster.engine.pace import target_pace
from cluster.errors import ConfigError
from tests.models import DRAFTER, TARGET

PROFILE = "deployments/profiles/epyc-134m.yaml"


def values(pace: bool = True) -> dict[str, Any]:
    part: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "enforce_eager": True}
    if pace:
        part["pace"] = {"profile": PROFILE, "time_scale": 2}
    return {
        "target": {"model": TARGET, "max_num_seqs": 16, "max_model_len": 256, **part},
        "drafter": part,
        "speculative": {"method": "dspark", "model": DRAFTER, "draft_top_k": 1},
    }


def turns(throughput: float, mode: str = "grouped") -> list[Turn]:
    return [
        Turn(throughput=throughput, budget=3.0, tokens_per_pass=2.0, mode=mode) for _ in range(4)
    ]


def test_figures_compare_turns_by_device_and_with_the_profiles_bound() -> None:
    shape = PipelineShape(
        concurrencies=(16,), prompt_tokens=64, max_tokens=128, drafter_devices=(1.0, 0.2)
    )
    found = pipeline.pipeline_figures(
        ClusterConfig.parse(values()),
        {
            16: {
                NEAR: turns(300.0, "speculative"),
                FAR: turns(285.0),
                FAR_UNGROUPED: turns(250.0, "speculative"),
                NEAR_TWO: turns(310.0, "speculative"),
                COLOCATED: turns(200.0, "speculative"),
            }
        },
        {16: {NEAR: 390.0, NEAR_TWO: 450.0, COLOCATED: 180.0, FAR: 1.0, FAR_UNGROUPED: 1.0}},
        shape,
    )
    assert found["delay_ratio"] == pytest.approx(0.95)
    assert found["grouping_ratio"] == pytest.approx(1.14)
    assert found["grouped_at"] == [16]
    # Two groups of 32 tokens and 1,024 of context: 2 x (20.5 + 1.536) ms, a prompt's 64 tokens more
    # once for every 128 tokens, and time x 2.
    paced = target_pace(ClusterConfig.parse(values()).target.pace, 1)
    assert paced is not None
    prompt_s = float(paced.curve.seconds(96, 1024) - paced.curve.seconds(32, 1024))
    token_s = 2 * 2 * 0.022036 / 32 + prompt_s / 128
    assert found["bound_ratio"] == pytest.approx(285.0 * token_s, rel=1e-3)
    one, shared, two, _ = found["per_device"]
    assert (one["drafters"], one["remote"], one["colocated"]) == (1, 150.0, 200.0)
    assert one["chosen"] == "remote"  # 195 against 180 promised, and it was wrong
    assert one["chosen_share"] == pytest.approx(0.75)
    assert (shared["drafter_devices"], shared["remote"]) == (0.2, 250.0)
    assert two["chosen"] == COLOCATED
    assert two["chosen_share"] == 1.0


def test_bounds_need_a_profile() -> None:
    with pytest.raises(ConfigError, match=r"target\.pace"):
        pipeline.run(values(pace=False), PipelineShape(), print)


def test_a_delayed_link_keeps_order_and_delays_both_ways() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(data)
        writer.close()

    async def measure() -> float:
        there = await asyncio.start_server(echo, "127.0.0.1", 0)
        link = await serve_link(f"127.0.0.1:{there.sockets[0].getsockname()[1]}", 0.05)
        port = link.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        start = time.monotonic()
        for number in range(100):
            writer.write(b"%03d" % number)
            await asyncio.sleep(0)
        received = await reader.readexactly(300)
        seconds = time.monotonic() - start
        assert received == b"".join(b"%03d" % number for number in range(100))
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        for server in (link, there):
            server.close()
        return seconds

    assert asyncio.run(measure()) >= 0.1


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.timeout(300)
def test_the_suite_runs() -> None:
    shape = PipelineShape(
        concurrencies=(2,),
        compared_at=2,
        turns=1,
        seconds=0.5,
        warm_up_s=0.1,
        prompt_tokens=32,
        max_tokens=32,
    )
    found = pipeline.run(values(), shape, print).figures
    assert found["paced"] == f"{PROFILE} x2" or found["paced"].endswith(" x2")
    (row,) = found["rows"]
    assert all(row[side] > 0 for side in (NEAR, FAR, FAR_UNGROUPED, NEAR_TWO, COLOCATED))
    # Ten milliseconds of the profile are twenty here; without two groups nothing hides them.
    assert row[FAR_UNGROUPED] < row[NEAR]
    assert {entry["drafters"] for entry in found["per_device"]} == {1, 2}
