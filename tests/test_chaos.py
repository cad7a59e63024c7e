"""Three minutes of `dspark bench chaos`, and what a cluster does without its drafters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.netlab,
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timed,  # twenty processes on all cores: nothing can run beside them
    pytest.mark.timeout(1500),
]


def _figures(suite: str, *options: str, out: Path) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "cluster.cli", "bench", suite, "--json", *options]
    process = subprocess.run(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, text=True, check=False
    )
    assert process.stdout, f"no figures; the logs are in {out}"
    return process.returncode, json.loads(process.stdout)["figures"]


@pytest.mark.full
def test_three_minutes_of_chaos(tmp_path: Path) -> None:
    status, figures = _figures("chaos", "--seconds", "180", out=tmp_path)
    assert status == 0, figures
    assert figures["requests"] > 0
    assert figures["killed"] >= 8
    assert (figures["lost"], figures["mismatches"], figures["leaks"]) == (0, 0, 0)


@pytest.mark.full
def test_drafters_lost_and_late(tmp_path: Path) -> None:
    status, figures = _figures("drafter-loss", out=tmp_path)
    assert status == 0, figures
    assert figures["killed"]["ratio"] >= 0.97
    assert figures["late"]["ratio"] >= 0.97
    assert (figures["replica_restarts"], figures["failed"], figures["mismatches"]) == (0, 0, 0)
