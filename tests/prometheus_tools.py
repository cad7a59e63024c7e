"""Prometheus and its promtool for tests: this machine's own, or Debian's package unpacked."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.metrics_tools import free_port

_PROGRAMS = ("prometheus", "promtool")


@functools.cache
def install_prometheus() -> Path | str:
    """The folder of both programs, unpacked into the virtual environment once; or why it is not
    there."""
    found = [shutil.which(program) for program in _PROGRAMS]
    if found[0] and found[1]:
        return Path(found[0]).parent
    place = Path(sys.prefix) / "debian-prometheus"
    programs = place / "usr" / "bin"
    if programs.exists():
        return programs
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return "no Prometheus here, and no apt-get to download it with"
    try:
        with tempfile.TemporaryDirectory(dir=sys.prefix) as folder:
            done = subprocess.run(
                ["apt-get", "download", "prometheus"],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=100,
            )
            packages = list(Path(folder).glob("prometheus*.deb"))
            if done.returncode or not packages:
                return f"apt-get cannot download prometheus: {done.stderr.strip()[-300:]}"
            unpacked = Path(folder) / "unpacked"
            subprocess.run(["dpkg-deb", "-x", packages[0], unpacked], check=True)
            os.rename(unpacked, place)
    except (OSError, subprocess.SubprocessError) as error:
        if not programs.exists():  # else another process was faster
            return f"Prometheus cannot be unpacked: {error}"
    return programs


def promtool(*arguments: str) -> str:
    """What it printed; an error is an assertion's."""
    folder = install_prometheus()
    assert isinstance(folder, Path), folder
    done = subprocess.run(
        [folder / "promtool", *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Prometheus:
    """A running server."""

    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, path: str) -> Any:
        """The ``data`` of an answer of its API."""
        with urllib.request.urlopen(f"{self._url}/api/v1/{path}", timeout=10) as answer:
            return json.load(answer)["data"]

    def num_up(self) -> int:
        """Targets that have been scraped."""
        found = self.query("targets")["activeTargets"]
        return sum(target["health"] == "up" for target in found)

    def firing(self) -> set[str]:
        """Names of alerts that fire now."""
        found = self.query("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in found if alert["state"] == "firing"}


@contextmanager
def running_prometheus(
    targets: list[str], rules: dict[str, Any], folder: Path, *, interval: str = "500ms"
) -> Iterator[Prometheus]:
    """Scrapes ``targets`` (``host:port``) and evaluates ``rules`` until left."""
    programs = install_prometheus()
    assert isinstance(programs, Path), programs
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    configuration = {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "dspark", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{free_port()}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                programs / "prometheus",
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://{address}/-/ready", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, "Prometheus does not become ready"
                time.sleep(0.05)
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(20)
