"""Install, upgrade, rollback, test and uninstall, by both versions of Helm against a fake server.

The server validates what it stores and merges patches, but nothing runs behind it: what KubeRay,
the kubelet, admission and defaults would do stays unproven here (docs/deploy.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml

from tests.conftest import SHARED
from tests.fake_kubernetes import FakeKubernetes
from tests.helm_tools import (
    CHART,
    Helm3,
    HelmError,
    Object,
    chart_copy,
    core_problems,
    custom_problems,
)

TWO_POOLS: Object = yaml.safe_load((CHART / "profiles" / "two-pools.yaml").read_text())


class Releases(Protocol):
    """A Helm with a cluster."""

    def install(self, chart: Path, values: Object) -> str: ...
    def upgrade(self, chart: Path, values: Object) -> str: ...
    def rollback(self, revision: int) -> None: ...
    def uninstall(self) -> None: ...
    def statuses(self) -> list[str]: ...


class Helm3Releases:
    """The program."""

    def __init__(self, url: str) -> None:
        self._helm = Helm3()
        self._cluster = ("--kube-apiserver", url, "--namespace", "space")

    def install(self, chart: Path, values: Object) -> str:
        return self._apply("install", chart, values)

    def upgrade(self, chart: Path, values: Object) -> str:
        return self._apply("upgrade", chart, values)

    def rollback(self, revision: int) -> None:
        self._helm.run("rollback", "one", str(revision), *self._cluster)

    def uninstall(self) -> None:
        self._helm.run("uninstall", "one", *self._cluster)

    def statuses(self) -> list[str]:
        text = self._helm.run("history", "one", "--output", "json", *self._cluster)
        return [revision["status"] for revision in json.loads(text)]

    def test(self) -> str:
        return self._helm.run("test", "one", *self._cluster)

    def _apply(self, command: str, chart: Path, values: Object) -> str:
        return self._helm.run(
            *(command, "one", str(chart), "--values", "-", *self._cluster),
            stdin=json.dumps(values),
        )


class Helm4Releases:
    """The library, which applies on the server."""

    def __init__(self, url: str) -> None:
        import helm_python

        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": ""}}],
            "clusters": [{"name": "fake", "cluster": {"server": url}}],
        }
        self._config = helm_python.Config(
            kubeconfig_content=json.dumps(kubeconfig), namespace="space"
        )
        self._error = helm_python.HelmError

    def install(self, chart: Path, values: Object) -> str:
        return self._apply(self._config.install, chart, values)

    def upgrade(self, chart: Path, values: Object) -> str:
        return self._apply(self._config.upgrade, chart, values)

    def rollback(self, revision: int) -> None:
        self._config.rollback("one", version=revision)

    def uninstall(self) -> None:
        self._config.uninstall("one")

    def statuses(self) -> list[str]:
        return [revision["status"] for revision in self._config.history("one")]

    def _apply(self, action: Any, chart: Path, values: Object) -> str:
        try:
            return json.dumps(action(chart, "one", values))
        except self._error as error:
            raise HelmError(str(error)) from None


@pytest.fixture
def kubernetes() -> Iterator[FakeKubernetes]:
    with FakeKubernetes(_problem) as server:
        yield server


@pytest.fixture(
    params=[
        pytest.param(Helm3Releases, marks=pytest.mark.helm, id="helm3"),
        pytest.param(Helm4Releases, id="helm4"),
    ]
)
def releases(request: pytest.FixtureRequest, kubernetes: FakeKubernetes) -> Releases:
    made: Releases = request.param(kubernetes.url)
    return made


def _problem(loaded: Object) -> str | None:
    problems = core_problems(loaded, "1.34")
    if problems is None:
        problems = custom_problems(loaded, SHARED / "k8s" / "crds")
    return "; ".join(problems) if problems else None


def test_a_release_is_installed_upgraded_and_rolled_back(
    releases: Releases, kubernetes: FakeKubernetes, tmp_path: Path
) -> None:
    said = releases.install(CHART, TWO_POOLS)
    assert "qwen3-14b" in said
    first = kubernetes.stored("RayService")["one-dspark"]
    assert first["metadata"]["generation"] == 1
    assert {*kubernetes.stored("Service")} == {"one-dspark-grpc", "one-dspark-http"}
    assert len(kubernetes.stored("NetworkPolicy")) == 6

    # A newer chart alone: other labels, and not a change of the RayService's specification.
    releases.upgrade(chart_copy(tmp_path, version="9.9.9"), TWO_POOLS)
    second = kubernetes.stored("RayService")["one-dspark"]
    assert second["metadata"]["labels"]["helm.sh/chart"] == "dspark-9.9.9"
    assert second["metadata"]["generation"] == 1

    # Another Serve configuration: that, and no pod.
    port = {"router": {"port": 50052}, "target": {"num_replicas": 6}}
    releases.upgrade(CHART, {**TWO_POOLS, "config": {"target": {"num_replicas": 6}}})
    third = kubernetes.stored("RayService")["one-dspark"]["spec"]
    assert "num_replicas: 6" in third["serveConfigV2"]
    assert third["rayClusterConfig"] == first["spec"]["rayClusterConfig"]

    # Another port, and a part that goes.
    releases.upgrade(CHART, {**TWO_POOLS, "config": port, "networkPolicy": {"enabled": False}})
    assert _ports(kubernetes) == {"grpc": 50052, "metrics": 9400}
    assert kubernetes.stored("NetworkPolicy") == {}

    releases.rollback(1)
    last = kubernetes.stored("RayService")["one-dspark"]
    assert last["spec"] == first["spec"]
    assert last["metadata"]["uid"] == first["metadata"]["uid"]
    assert _ports(kubernetes) == {"grpc": 50051, "metrics": 9400}
    assert len(kubernetes.stored("NetworkPolicy")) == 6
    assert releases.statuses() == [*["superseded"] * 4, "deployed"]

    releases.uninstall()
    assert {*kubernetes.unanswered} <= {"/openapi/v3"}  # Helm 4 can do without
    left = {key[1]: key[3] for key in kubernetes.objects}
    assert left == {"persistentvolumeclaims": "one-dspark-model-cache"}  # kept, as it says


def _ports(kubernetes: FakeKubernetes) -> dict[str, int]:
    ports = kubernetes.stored("Service")["one-dspark-grpc"]["spec"]["ports"]
    return {port["name"]: port["port"] for port in ports}


@pytest.mark.shared
def test_what_the_server_refuses_is_no_release(
    releases: Releases, kubernetes: FakeKubernetes, tmp_path: Path
) -> None:
    """The server does check: a field that no RayService has."""
    chart = chart_copy(tmp_path)
    template = chart / "templates" / "rayservice.yaml"
    template.write_text(template.read_text() + "  unheardOf: true\n")
    with pytest.raises(HelmError, match="unheardOf"):
        releases.install(chart, TWO_POOLS)
    assert kubernetes.stored("RayService") == {}


@pytest.mark.helm
def test_the_test_hook_runs_and_goes(kubernetes: FakeKubernetes) -> None:
    releases = Helm3Releases(kubernetes.url)
    notes = releases.install(CHART, {})
    assert "dns:///one-dspark-grpc.space:50051" in notes
    assert "port-forward" in notes
    said = releases.test()
    assert "Succeeded" in said
    assert kubernetes.stored("Pod") == {}
