"""The Serve configuration that the chart renders, served here: it answers a request."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.certificates import Authority
from tests.helm_tools import CHART, Helm4, objects, one, pods
from tests.metrics_tools import free_port
from tests.models import MODELS

# The name in the certificate, as no certificate has an address of a test.
NAME = "door.example"


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_the_laptop_profile_serves(tmp_path: Path, tls: bool) -> None:
    """As rendered, but for where pods have models and Secrets, and ports that are free here."""
    values = yaml.safe_load((CHART / "profiles" / "laptop.yaml").read_text())
    environment = os.environ | {"DSPARK_STATE_DIR": str(tmp_path / "state")}
    if tls:
        values["tls"] = {"client": {"existingSecret": "certificate"}}
        environment |= _certificate(tmp_path)
    found = objects(Helm4().render(values))
    text: str = one(found, "RayService")["spec"]["serveConfigV2"]
    http_port, metrics_port = free_port(), free_port()
    for told, here in (
        ("/opt/dspark/deployments/models/", f"{MODELS}/"),
        ("port: 50051", "port: 0"),
        ("port: 8000", f"port: {http_port}"),
        ("metrics_port: 9400", f"metrics_port: {metrics_port}"),
        *([("/etc/dspark/client-tls/", f"{tmp_path}/")] if tls else []),
    ):
        assert told in text
        text = text.replace(told, here)
    extracted = tmp_path / "serve.yaml"
    extracted.write_text(text)

    def dspark(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "cluster.cli", *arguments, "--json"]
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
        # What the chart asks of it: `helm test`, and with TLS the kubelet.
        containers = one(found, "Pod")["spec"]["containers"]
        (hook,) = (c["command"] for c in containers if c["name"] == "http")
        url = hook[-1].replace("test-dspark-http:80", f"127.0.0.1:{http_port}")
        assert url == f"{'https' if tls else 'http'}://127.0.0.1:{http_port}/ready"
        if shutil.which("wget"):
            asked = subprocess.run([*hook[:-1], url], capture_output=True, text=True, timeout=60)
            assert (asked.returncode, asked.stdout) == (0, '{"status":"ready"}'), asked.stderr
        probe = pods(found)["router"]["spec"]["containers"][0]["readinessProbe"]
        path = probe["httpGet"]["path"] if tls else "/ready"
        assert "grpc" in probe or tls
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}{path}", timeout=10) as said:
            assert said.read() == b"ready\n"
        if tls:
            with socket.create_connection(("127.0.0.1", http_port), timeout=10) as plaintext:
                plaintext.sendall(b"GET /ready HTTP/1.1\r\nHost: here\r\n\r\n")
                assert b"200" not in plaintext.recv(100)
        else:
            with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/console/state") as state:
                assert json.load(state)["replicas"][0]["state"] == "ready"
    finally:
        dspark("down")


def _certificate(folder: Path) -> dict[str, str]:
    """Puts the keys of a Secret there, and returns what a client needs to know them."""
    authority = Authority(folder, "edge")
    signed = authority.sign(NAME)
    Path(signed.cert_file).rename(folder / "tls.crt")
    Path(signed.key_file).rename(folder / "tls.key")
    return {"DSPARK_TLS_CA_FILE": authority.ca_file, "DSPARK_TLS_SERVER_NAME": NAME}
