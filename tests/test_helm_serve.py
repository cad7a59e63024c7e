"""The Serve configuration that the chart renders, served here: it answers a request."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm_tools import CHART, Helm4, objects, one
from tests.models import MODELS


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_laptop_profile_serves(tmp_path: Path) -> None:
    """As rendered, but for the models' place in the image, and ports that are free here."""
    profile = yaml.safe_load((CHART / "profiles" / "laptop.yaml").read_text())
    text: str = one(objects(Helm4().render(profile)), "RayService")["spec"]["serveConfigV2"]
    assert text.count("/opt/dspark/deployments/models/") == 2
    assert text.count("port: 50051") == text.count("port: 8000") == 1
    text = text.replace("/opt/dspark/deployments/models", str(MODELS))
    extracted = tmp_path / "serve.yaml"
    with socket.socket() as probe:
        probe.bind(("", 0))
        http_port = probe.getsockname()[1]
    text = text.replace("port: 50051", "port: 0").replace("port: 8000", f"port: {http_port}")
    extracted.write_text(text)

    def dspark(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "cluster.cli", *arguments, "--json"]
        environment = os.environ | {"DSPARK_STATE_DIR": str(tmp_path / "state")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        values: dict[str, Any] = json.loads(done.stdout)
        return values

    try:
        ready = dspark("up", str(extracted), "--detach")
        assert (ready["shards"], ready["drafters"], ready["routers"]) == (1, 1, 1)
        answer = dspark(
            "generate", "def read_json(path):", "--max-tokens", "16", "--temperature", "0"
        )
        assert answer["usage"]["completion_tokens"] == 16
        with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/console/state") as state:
            assert json.load(state)["replicas"][0]["state"] == "ready"
    finally:
        dspark("down")
