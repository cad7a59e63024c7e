"""The Helm chart as Helm 3 and Helm 4 render it: valid, strict, and what its parts promise."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _generate_available_node_types_from_ray_cr_spec as node_types,
)
from ray.serve.schema import ServeDeploySchema

from cluster.config import ClusterConfig
from cluster.serve_config import load_serve_config
from tests.helm_tools import (
    CHART,
    PROFILES,
    ROOT,
    Helm,
    Helm3,
    Helm4,
    HelmError,
    Object,
    chart_copy,
    core_problems,
    custom_problems,
    objects,
    one,
    pods,
    selects,
)

# The oldest Kubernetes that Chart.yaml allows, and the newest that the schemas know.
KUBERNETES_VERSIONS = ("1.25", "1.37")
OF_A_POD: Object = {
    "runtimeClassName": "nvidia",
    "priorityClassName": "high",
    "podLabels": {"team": "llm"},
    "podAnnotations": {"note": "mine"},
    "extraVolumes": [{"name": "data", "hostPath": {"path": "/mnt/nvme"}}],
    "extraVolumeMounts": [{"name": "data", "mountPath": "/data"}],
}
# Everything that is off by default.
ALL_ON: Object = {
    "gateway": {"enabled": True, "parentRefs": [{"name": "edge", "namespace": "gateways"}]},
    "gcsFaultTolerance": {"enabled": True, "redisAddress": "redis:6379", "existingSecret": "redis"},
    "huggingFace": {"existingSecret": "hub"},
    "imagePullSecrets": [{"name": "registry"}],
    "modelCache": {"enabled": True, "storageClassName": "fast"},
    "monitoring": {
        "podMonitor": {"enabled": True},
        "serviceMonitor": {"enabled": True},
        "rules": {"enabled": True, "runbookBase": "https://git.example/dspark/blob/main"},
        "dashboards": {"enabled": True},
    },
    "networkPolicy": {"clients": [{"podSelector": {"matchLabels": {"app": "client"}}}]},
    "ray": {"tokenAuth": True},
    "serviceAccountName": "dspark",
    "test": {"env": [{"name": "DSPARK_API_KEY", "value": "k"}], "existingSecret": "client"},
    "extraEnv": [{"name": "NCCL_DEBUG", "value": "WARN"}],
    **dict.fromkeys(("head", "router", "target", "drafter"), OF_A_POD),
}
ALL_ON["router"] = {**OF_A_POD, "minAvailable": 1}
CUSTOM_GROUPS = ("ray.io", "monitoring.coreos.com", "gateway.networking.k8s.io")
# Kinds whose schema is nowhere to be had here, with the reason.
WITHOUT_SCHEMA = {
    "GRPCRoute": "Gateway API's definitions are in no package; its fields are tested by name",
    "HTTPRoute": "the same",
    "BackendTLSPolicy": "the same",
}

ENGINES = [pytest.param(Helm3, marks=pytest.mark.helm, id="helm3"), pytest.param(Helm4, id="helm4")]
VALUES = [
    *(pytest.param(yaml.safe_load(path.read_text()), id=path.stem) for path in PROFILES),
    pytest.param(ALL_ON, id="all-on"),
]


def _profile(name: str) -> Object:
    values: Object = yaml.safe_load((CHART / "profiles" / f"{name}.yaml").read_text())
    return values


def _over(values: Object, others: Object) -> Object:
    """As Helm puts one file of values over another."""
    merged = {**values}
    for key, value in others.items():
        both = isinstance(value, dict) and isinstance(values.get(key), dict)
        merged[key] = _over(values[key], value) if both else value
    return merged


@pytest.fixture(params=ENGINES)
def helm(request: pytest.FixtureRequest) -> Helm:
    made: Helm = request.param()
    return made


@pytest.fixture
def rendered(request: pytest.FixtureRequest) -> list[Object]:
    """The objects of ``request.param``, a mapping of values."""
    return render(request.param)


def render(values: Object, chart: Path = CHART) -> list[Object]:
    """The objects of the chart, by Helm 4."""
    return objects(
        _text(json.dumps(values), chart) if chart == CHART else Helm4().render(values, chart)
    )


@functools.cache
def _text(values: str, chart: Path) -> str:
    return Helm4().render(json.loads(values), chart)


@pytest.mark.parametrize("values", VALUES)
def test_helm_4_lints_it(values: Object) -> None:
    assert Helm4().lint(values) == []
    assert render(values)


@pytest.mark.helm
@pytest.mark.parametrize("values", VALUES)
def test_helm_3_lints_it_and_renders_the_same(values: Object) -> None:
    helm = Helm3()
    assert helm.lint(values) == []
    assert _by_name(objects(helm.render(values))) == _by_name(render(values))


@pytest.mark.parametrize("rendered", VALUES, indirect=True)
def test_objects_of_kubernetes_are_valid(rendered: list[Object]) -> None:
    """And no object is of a kind that nobody has checked."""
    for loaded in rendered:
        for version in KUBERNETES_VERSIONS:
            if loaded["apiVersion"].split("/")[0] not in CUSTOM_GROUPS:
                assert core_problems(loaded, version) == []


@pytest.mark.shared
@pytest.mark.parametrize("rendered", VALUES, indirect=True)
def test_custom_resources_are_valid(rendered: list[Object], shared_dir: Path) -> None:
    for loaded in rendered:
        if loaded["apiVersion"].split("/")[0] in CUSTOM_GROUPS:
            problems = custom_problems(loaded, shared_dir / "k8s" / "crds")
            if problems is None:
                assert loaded["kind"] in WITHOUT_SCHEMA
            else:
                assert problems == []


@pytest.mark.shared
def test_the_checks_find_what_is_wrong(shared_dir: Path) -> None:
    found = render(ALL_ON)
    service = one(found, "RayService")
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["tolerance"] = 1
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["numOfHosts"] = "two"
    problems = custom_problems(service, shared_dir / "k8s" / "crds")
    assert problems is not None
    assert len(problems) == 2
    assert "workerGroupSpecs.1.numOfHosts" in "".join(problems)
    budget = one(found, "PodDisruptionBudget", "router")
    budget["spec"]["minAvailabel"] = 1
    assert "minAvailabel" in "".join(core_problems(budget, "1.37") or [])
    assert core_problems({**budget, "kind": "Unknown"}, "1.37") is None
    policy = one(found, "NetworkPolicy", "-drafter")
    first, second = policy["spec"]["ingress"]
    first["ports"][0]["endPort"] = 65593
    second["ports"][0]["endPort"] = 0
    said = "".join(core_problems(policy, "1.37") or [])
    assert "spec.ingress.0.ports.0.endPort: 65593 is no port" in said
    assert "spec.ingress.1.ports.0: ends at 0 before it begins" in said
    ports = one(found, "Service", "-grpc")
    ports["spec"]["ports"][0]["port"] = 0
    assert "spec.ports.0.port: 0" in "".join(core_problems(ports, "1.37") or [])
    assert set(WITHOUT_SCHEMA) & {loaded["kind"] for loaded in found}


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"router": {"replica": 2}}, "router"),
        ({"target": {"replicas": "two"}}, "target.replicas"),
        ({"target": {"resources": {"limit": {}}}}, "target.resources"),
        ({"drafter": {"tolerations": [{"effect": 1}]}}, "drafter.tolerations.0.effect"),
        ({"upgradeStrategy": {"type": "Rolling"}}, "upgradeStrategy.type"),
        ({"config": {"target": {"tensor_paralel_size": 2}}}, "config.target"),
        ({"config": {"speculative": {"method": "medusa"}}}, "config.speculative.method"),
        ({"config": {"drafter": {"port": 70000}}}, "config.drafter.port"),
        ({"config": {"drafter": {"port": 0}}}, "config.drafter.port"),
        ({"config": {"router": {"port": 0}}}, "config.router.port"),
        (
            {
                "tls": {"client": {"existingSecret": "door"}},
                "config": {"router": {"metrics_port": None}},
            },
            "config.router.metrics_port",
        ),
        # More than pods offer: four shards for one CPU, three replicas for one pod, and so on.
        ({"config": {"target": {"tensor_parallel_size": 4}}}, "config.target"),
        ({"config": {"target": {"device": "cuda", "num_gpus": 1}}}, "config.target"),
        ({"config": {"drafter": {"num_cpus": 2}}}, "config.drafter"),
        ({"config": {"router": {"num_cpus": 1, "num_replicas": 3}}}, "config.router.num_replicas"),
        (
            _over(_profile("one-node"), {"target": {"replicas": 2}}),
            "config.target.num_replicas",
        ),
        ({"serveConfig": "none"}, "serveConfig"),
        ({"gcsFaultTolerance": {"enabled": True}}, "gcsFaultTolerance.redisAddress"),
        ({"gateway": {"enabled": True}}, "gateway.parentRefs"),
        ({"modelCache": {"size": "much"}}, "modelCache.size"),
        ({"fullnameOverride": "7b"}, "fullnameOverride"),
        ({"router": {"minReplicas": 9}}, "router.minReplicas"),
        ({"router": {"replicas": 5}}, "router.replicas"),
        ({"target": {"replicas": 0}}, "target.replicas"),
        ({"target": {"replicas": 0}, "autoscaler": {"enabled": False}}, "target.replicas"),
        ({"router": {"minAvailable": 10}}, "router.minAvailable"),
        (
            {"target": {"minAvailable": 2, "numOfHosts": 2}, "autoscaler": {"enabled": False}},
            "target.minAvailable",
        ),
        (
            {"router": {"podLabels": {"app.kubernetes.io/component": "mine"}}},
            "router.podLabels",
        ),
        ({"head": {"podLabels": {"ray.io/node-type": "worker"}}}, "head.podLabels"),
        ({"target": {"extraVolumes": [{"name": "data", "emptyDirs": {}}]}}, "target.extraVolumes"),
        ({"target": {"extraVolumes": [{"name": "cache"}]}}, "target.extraVolumes"),
        (
            {"target": {"extraVolumeMounts": [{"name": "data", "mountPath": "/data"}]}},
            "target.extraVolumeMounts",
        ),
        ({"monitoring": {"rules": {"runbookBase": "docs"}}}, "monitoring.rules.runbookBase"),
        ({"config": {"drafter": {"port": 65530}}}, "config.drafter.num_ports"),
        ({"config": {"drafter": {"port": 1}}}, "config.drafter.port"),
        ({"config": {"drafter": {"port": 7950}}}, "config.drafter.port"),  # 8000 is in the range
        ({"config": {"router": {"port": 8000}}}, "config.router.port"),
        ({"config": {"router": {"port": 443}}}, "config.router.port"),
        ({"config": {"router": {"metrics_port": 8080}}}, "config.router.metrics_port"),
        ({"config": {"router": {"metrics_port": 50051}}}, "config.router.port"),
        ({"config": {"drain_timeout_s": 900}}, "config.drain_timeout_s"),
        ({"terminationGracePeriodSeconds": 39}, "config.drain_timeout_s"),
        (
            {"tls": {"client": {"requireClientCertificate": True}}},
            "tls.client.existingSecret",
        ),
        (
            {
                "gateway": {
                    "enabled": True,
                    "parentRefs": [{"name": "edge"}],
                    "grpc": {"enabled": False},
                },
                "service": {"http": {"enabled": False}},
            },
            "gateway.enabled",
        ),
        (
            {
                "gateway": {"enabled": True, "parentRefs": [{"name": "edge"}]},
                "tls": {"client": {"existingSecret": "door"}},
            },
            "gateway.backendTLS.hostname",
        ),
        (
            {"upgradeStrategy": {"type": "NewClusterWithIncrementalUpgrade"}},
            "upgradeStrategy.type",
        ),
    ],
)
def test_a_wrong_value_is_named(helm: Helm, values: Object, path: str) -> None:
    with pytest.raises(HelmError) as caught:
        helm.render(values)
    said = str(caught.value)
    # Helm 4 names paths as /target/replicas.
    assert path in said or f"/{path.replace('.', '/')}" in said


def test_a_range_of_ports_may_end_with_the_last_one() -> None:
    found = render({"config": {"drafter": {"port": 65500, "num_ports": 36}}})
    policy = one(found, "NetworkPolicy", "-drafter")
    assert core_problems(policy, "1.37") == []
    drafts, others = (rule["ports"] for rule in policy["spec"]["ingress"])
    assert drafts == [{"protocol": "TCP", "port": 65500, "endPort": 65535}]
    assert others == [{"protocol": "TCP", "port": 1, "endPort": 65499}]


def test_the_number_of_pods_is_fixed_without_the_autoscaler() -> None:
    values = {"autoscaler": {"enabled": False}, "router": {"replicas": 5}}
    groups = one(render(values), "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    router = groups[0]
    assert (router["minReplicas"], router["replicas"], router["maxReplicas"]) == (5, 5, 5)


def test_no_part_of_the_values_is_unchecked() -> None:
    """Every object of the schema either names all its keys or types its values."""
    schema = json.loads((CHART / "values.schema.json").read_text())

    def visit(node: Any, path: str) -> None:
        if isinstance(node, list):
            for index, item in enumerate(node):
                visit(item, f"{path}.{index}")
        if not isinstance(node, dict):
            return
        types = node.get("type", ())
        if "object" in ([types] if isinstance(types, str) else types):
            extra = node.get("additionalProperties", True)
            assert extra is False or (isinstance(extra, dict) and extra), path
        for key, item in node.items():
            visit(item, f"{path}.{key}")

    visit(schema, "schema")


def test_every_value_is_described() -> None:
    table = (CHART / "README.md").read_text()
    described = set(re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE))

    def visit(values: Object, path: str) -> None:
        for key, value in values.items():
            name = f"{path}{key}"
            if name not in described:
                assert isinstance(value, dict), f"{name} has no comment"
                assert value, f"{name} has no comment"
                visit(value, f"{name}.")

    visit(yaml.safe_load((CHART / "values.yaml").read_text()), "")


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_what_is_served_is_the_file_in_deployments(path: Path, tmp_path: Path) -> None:
    """`serveConfigV2` is that file, and what the cluster accepts."""
    values = yaml.safe_load(path.read_text())
    text = one(render(values), "RayService")["spec"]["serveConfigV2"]
    source = ROOT / "deployments" / f"{values['serveConfig']}.yaml"
    assert yaml.safe_load(text) == yaml.safe_load(source.read_text())
    extracted = tmp_path / "serve.yaml"
    extracted.write_text(text)
    assert load_serve_config(extracted)[1] == load_serve_config(source)[1]


def test_config_goes_over_the_file(tmp_path: Path) -> None:
    """Falsy values too, and `null` takes away."""
    values = {
        "config": {
            "target": {"enforce_eager": False, "max_num_waiting": 0, "model": "mine"},
            "drafter": {"num_replicas": 0},
            "speculative": None,
        }
    }
    extracted = tmp_path / "serve.yaml"
    extracted.write_text(one(render(values), "RayService")["spec"]["serveConfigV2"])
    config = load_serve_config(extracted)[1]
    assert config.target.enforce_eager is False
    assert config.target.max_num_waiting == 0
    assert config.target.model == "mine"
    assert config.target.dtype == "float32"  # the file's
    assert config.drafter.num_replicas == 0
    assert config.speculative is None


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_part_has_a_place(path: Path) -> None:
    _check_places(yaml.safe_load(path.read_text()))


def test_the_model_of_ones_own_on_the_page_has_a_place() -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    (mine,) = re.findall(r"```yaml\n(# mine\.yaml, for: .+?)```", page, re.DOTALL)
    assert "-f helm/dspark/profiles/one-node.yaml -f mine.yaml" in mine.splitlines()[0]
    values = _over(_profile("one-node"), yaml.safe_load(mine))
    config = _check_places(values)
    assert config.target.num_shards == 4
    assert (config.target.device, config.target.num_gpus) == ("cuda", 1)
    assert config.router.chat_template is None  # the model has its own


def _check_places(values: Object) -> ClusterConfig:
    """What Ray's own autoscaler reads from the pods covers what the parts ask of Ray."""
    service = one(render(values), "RayService")["spec"]
    application = yaml.safe_load(service["serveConfigV2"])["applications"][0]
    config = ClusterConfig.parse(application["args"])
    cluster = service["rayClusterConfig"]
    types = node_types(cluster)
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert not any(name.startswith("dspark-") for name in types["headgroup"]["resources"])
    hosts = {group["groupName"]: group["numOfHosts"] for group in cluster["workerGroupSpecs"]}
    asked = {
        "router": (config.router.num_replicas, config.router, 1),
        "target": (config.target.highest, config.target, config.target.num_shards),
        "drafter": (config.drafter.highest, config.drafter, 1),
    }
    for pool, (num_replicas, part, num_actors) in asked.items():
        offered = types[pool]["resources"]
        assert part.resources == {f"dspark-{pool}": 1}
        # Actors that fit a pod, by the scarcest of what it offers.
        needs = {"CPU": part.num_cpus, "GPU": getattr(part, "num_gpus", 0), **part.resources}
        fit = min(int(offered.get(name, 0) // need) for name, need in needs.items() if need)
        assert fit * hosts[pool] >= num_actors, pool
        assert num_replicas <= types[pool]["max_workers"] // hosts[pool], pool
        # A target of several hosts fills them.
        assert num_actors > fit * (hosts[pool] - 1)
    return config


def test_what_a_pod_offers_may_be_any_quantity() -> None:
    for amount in ("0.5", "500m"):  # a whole one to Ray
        assert render({"target": {"rayResources": {"CPU": amount}}})


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"speculative": None}, id="nothing"),
        pytest.param({"speculative": {"method": "ngram", "model": None}}, id="ngram"),
    ],
)
def test_drafters_that_are_not_there_need_no_place(values: Object) -> None:
    assert render({"config": values, "drafter": {"replicas": 0, "rayResources": {"CPU": "0"}}})


def test_a_new_chart_version_changes_no_pod(tmp_path: Path) -> None:
    """KubeRay starts a new cluster for any change of them, with its GPUs."""
    before = one(render(ALL_ON), "RayService")
    after = one(render(ALL_ON, chart_copy(tmp_path, version="9.9.9")), "RayService")
    assert before["metadata"]["labels"] != after["metadata"]["labels"]
    assert before["spec"] == after["spec"]


def test_a_change_of_the_serve_configuration_changes_no_pod() -> None:
    """Though it is one of everything, but for the ports of routers."""
    pods = yaml.safe_load((CHART / "profiles" / "two-pools.yaml").read_text())
    changed = yaml.safe_load((CHART / "serve" / "laptop.yaml").read_text())["applications"][0]
    config = changed["args"] | {
        "drain_timeout_s": 1,
        "tracing": {"endpoint": "http://collector:4317"},
        "security": {"api_keys_file": "/keys"},
    }
    config["drafter"] |= {"port": 26000, "num_ports": 8}
    before, after = (one(render(pods | {"config": c}), "RayService")["spec"] for c in ({}, config))
    assert before["serveConfigV2"] != after["serveConfigV2"]
    assert before["rayClusterConfig"] == after["rayClusterConfig"]


def test_what_of_the_serve_configuration_changes_pods(tmp_path: Path) -> None:
    page, comment = (ROOT / "docs" / "install.md").read_text(), (CHART / "values.yaml").read_text()
    before = one(render({}), "RayService")["spec"]["rayClusterConfig"]
    for key in ("port", "metrics_port"):
        after = one(render({"config": {"router": {key: 50060}}}), "RayService")["spec"]
        assert after["rayClusterConfig"] != before
        assert f"`config.router.{key}`" in page
        assert f"`router.{key}`" in comment
    chart = chart_copy(tmp_path)
    document = yaml.safe_load((CHART / "serve" / "laptop.yaml").read_text())
    for change in ({"http_options": {"port": 8123}}, {"proxy_location": "Disabled"}):
        (chart / "serve" / "other.yaml").write_text(yaml.safe_dump(document | change))
        after = one(render({"serveConfig": "other"}, chart), "RayService")["spec"]
        assert after["rayClusterConfig"] != before


@pytest.mark.parametrize("rendered", VALUES, indirect=True)
def test_the_operator_would_take_it(rendered: list[Object]) -> None:
    """What KubeRay 1.7 checks itself, behind the CRD's schema."""
    cluster = one(rendered, "RayService")["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]
    names = {port["name"] for port in head["template"]["spec"]["containers"][0]["ports"]}
    assert {"serve", "dashboard", "gcs-server", "client", "metrics"} == names
    resource_parameters = {"num-cpus", "num-gpus", "memory", "resources"}
    for group in [head, *cluster["workerGroupSpecs"]]:
        named_twice = resource_parameters & group["rayStartParams"].keys() and group.get(
            "resources"
        )
        assert not named_twice
        assert "restartPolicy" not in group["template"]["spec"]  # the autoscaler wants its own
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["maxReplicas"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    environment = {entry["name"] for entry in head["template"]["spec"]["containers"][0]["env"]}
    managed = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_enable_autoscaler_v2"}
    assert not managed & environment


def test_labels_that_kuberay_selects_by_are_left_to_it() -> None:
    theirs = {"app.kubernetes.io/name", "app.kubernetes.io/created-by"}
    for template in pods(render({})).values():
        assert not theirs & template["metadata"]["labels"].keys()


@pytest.mark.parametrize("release", ["a", "b" * 53])
def test_names_leave_room_for_kuberays(release: str) -> None:
    import helm_python

    with helm_python.Chart.load(CHART) as chart:
        texts = chart.render(ALL_ON, name=release)
    texts.pop("dspark/templates/NOTES.txt")
    found = objects("\n---\n".join(texts.values()))
    assert all(len(loaded["metadata"]["name"]) <= 63 for loaded in found)
    assert len(one(found, "RayService")["metadata"]["name"]) <= 40


@pytest.mark.shared
def test_names_that_yaml_reads_otherwise_stay_names(shared_dir: Path) -> None:
    import helm_python

    names = {"existingSecret", "existingClaim", "storageClassName", "serviceAccountName"}
    names |= {"priorityClassName", "runtimeClassName", "serverName", "hostname", "caConfigMap"}
    names |= {"key", "passwordKey", "nameOverride"}

    def renamed(values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: "no" if key in names else renamed(value) for key, value in values.items()}

    with helm_python.Chart.load(CHART) as chart:
        texts = chart.render(renamed(ALL_ON), name="on")
    texts.pop("dspark/templates/NOTES.txt")
    for loaded in objects("\n---\n".join(texts.values())):
        assert loaded["metadata"]["labels"]["app.kubernetes.io/instance"] == "on"
        assert not core_problems(loaded, "1.37")
        if loaded["kind"] not in WITHOUT_SCHEMA:
            assert not custom_problems(loaded, shared_dir / "k8s" / "crds")


def test_a_chart_around_this_one_has_values_for_all() -> None:
    assert render({"global": {"imageRegistry": "mine", "labels": {"a": 1}}}) == render({})


@pytest.mark.parametrize("rendered", VALUES, indirect=True)
def test_selectors_find_pods_with_the_ports_they_name(rendered: list[Object]) -> None:
    templates = pods(rendered)
    for loaded in rendered:
        spec = loaded.get("spec", {})
        kind = loaded["kind"]
        if kind == "Service":
            selector, ports = (
                {"matchLabels": spec["selector"]},
                [p["targetPort"] for p in spec["ports"]],
            )
        elif kind == "PodDisruptionBudget":
            selector, ports = spec["selector"], []
        elif kind == "PodMonitor":
            selector, ports = spec["selector"], [e["port"] for e in spec["podMetricsEndpoints"]]
        elif kind == "NetworkPolicy":
            rules = [port for rule in spec["ingress"] for port in rule.get("ports", ())]
            named = [port["port"] for port in rules if isinstance(port["port"], str)]
            selector, ports = spec["podSelector"], named
        else:
            continue
        matched = [
            pod for pod in templates.values() if selects(selector, pod["metadata"]["labels"])
        ]
        assert matched, loaded["metadata"]["name"]
        for pod in matched:
            names = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
            assert names.issuperset(ports), loaded["metadata"]["name"]


def test_grpc_is_headless_and_says_what_it_speaks() -> None:
    service = one(render({}), "Service", "-grpc")["spec"]
    assert service["clusterIP"] == "None"
    assert service["ports"][0]["appProtocol"] == "kubernetes.io/h2c"
    container = pods(render({}))["router"]["spec"]["containers"][0]
    assert container["readinessProbe"]["grpc"] == {"port": 50051}
    tls = render({"tls": {"client": {"existingSecret": "certificate"}}})
    assert one(tls, "Service", "-grpc")["spec"]["ports"][0]["appProtocol"] == "https"
    container = pods(tls)["router"]["spec"]["containers"][0]
    # As the kubelet's gRPC probe knows no TLS.
    ready = {"path": "/ready", "port": "dspark-metrics"}
    assert container["readinessProbe"]["httpGet"] == ready
    assert "dspark-metrics" in {port["name"] for port in container["ports"]}


def test_http_follows_the_serve_configuration(tmp_path: Path) -> None:
    chart = chart_copy(tmp_path)
    values = {**ALL_ON, "serveConfig": "other"}
    document = yaml.safe_load((CHART / "serve" / "laptop.yaml").read_text())
    document["http_options"]["port"] = 8123
    (chart / "serve" / "other.yaml").write_text(yaml.safe_dump(document))
    found = render(values, chart)
    service = one(found, "Service", "-http")["spec"]
    assert service["ports"][0]["targetPort"] == "serve"
    ports = pods(found)["router"]["spec"]["containers"][0]["ports"]
    assert {"name": "serve", "containerPort": 8123} in ports
    route = one(found, "HTTPRoute")["spec"]
    assert route["rules"] == [{"backendRefs": [{"name": "test-dspark-http", "port": 80}]}]
    document["proxy_location"] = "Disabled"
    (chart / "serve" / "other.yaml").write_text(yaml.safe_dump(document))
    kinds = [loaded["kind"] for loaded in render(values, chart)]
    assert kinds.count("Service") == 1
    assert "HTTPRoute" not in kinds


def test_every_profile_has_http() -> None:
    for profile in PROFILES:
        values = yaml.safe_load(profile.read_text())
        service = one(render(values), "Service", "-http")["spec"]
        assert service["ports"][0]["port"] == 80
        assert service["ports"][0]["appProtocol"] == "http"


def test_http_has_the_certificate_of_the_clients_door() -> None:
    """Wherever one of Serve's proxies may run: on the head, and where a part of the cluster is."""
    found = render({"tls": {"client": {"existingSecret": "certificate"}}})
    assert one(found, "Service", "-http")["spec"]["ports"][0]["appProtocol"] == "https"
    options = ServeDeploySchema.model_validate(_served(found)).http_options
    assert options.port == 8000
    for component, pod in pods(found).items():
        mounts = pod["spec"]["containers"][0]["volumeMounts"]
        (folder,) = (m["mountPath"] for m in mounts if m["name"] == "client-tls")
        assert options.ssl_certfile == f"{folder}/tls.crt", component
        assert options.ssl_keyfile == f"{folder}/tls.key", component
    plain = ServeDeploySchema.model_validate(_served(render({}))).http_options
    assert (plain.ssl_certfile, plain.ssl_keyfile) == (None, None)


def test_http_is_no_way_around_clients_certificates() -> None:
    """Serve's proxies ask for none."""
    door = {"existingSecret": "certificate", "requireClientCertificate": True}
    closed = render({"tls": {"client": door}})
    assert [kind["kind"] for kind in closed].count("Service") == 1
    served = _served(closed)
    assert served["proxy_location"] == "Disabled"
    assert served["applications"][0]["route_prefix"] is None
    names = {c["name"] for c in one(closed, "Pod")["spec"]["containers"]}
    assert names == {"client"}


def test_gateways_encrypt_where_routers_do() -> None:
    gateway = {**ALL_ON["gateway"], "backendTLS": {"hostname": "llm.example"}}
    tls = {"client": {"existingSecret": "certificate"}}
    for authority, trusted in (
        ("", {"wellKnownCACertificates": "System"}),
        ("ca", {"caCertificateRefs": [{"group": "", "kind": "ConfigMap", "name": "ca"}]}),
    ):
        gateway["backendTLS"]["caConfigMap"] = authority
        found = render({"gateway": gateway, "tls": tls})
        for end in ("-grpc", "-http"):
            policy = one(found, "BackendTLSPolicy", end)
            assert policy["apiVersion"] == "gateway.networking.k8s.io/v1"
            assert policy["spec"]["validation"] == {"hostname": "llm.example", **trusted}
            (aimed,) = policy["spec"]["targetRefs"]
            service = one(found, "Service", end)
            assert (aimed["group"], aimed["kind"]) == ("", "Service")
            assert aimed["name"] == service["metadata"]["name"]
            assert aimed["sectionName"] == service["spec"]["ports"][0]["name"]
    for values in (
        {"gateway": gateway},
        {"gateway": {**gateway, "backendTLS": {"enabled": False}}, "tls": tls},
    ):
        assert "BackendTLSPolicy" not in {loaded["kind"] for loaded in render(values)}
    gateway["http"] = {"enabled": False}
    kinds = [loaded["kind"] for loaded in render({"gateway": gateway, "tls": tls})]
    assert kinds.count("BackendTLSPolicy") == 1


def test_the_hook_asks_over_http_too() -> None:
    for values, url in (
        ({}, "http://test-dspark-http:80/ready"),
        ({"tls": {"client": {"existingSecret": "c"}}}, "https://test-dspark-http:80/ready"),
    ):
        containers = one(render(values), "Pod")["spec"]["containers"]
        assert [container["name"] for container in containers] == ["http", "client"]
        assert containers[0]["command"][-1] == url


def test_the_routers_metrics_are_scraped_from_each_of_them() -> None:
    found = render(ALL_ON)
    monitor = one(found, "ServiceMonitor")["spec"]
    service = one(found, "Service", "-grpc")
    assert selects(monitor["selector"], service["metadata"]["labels"])
    assert service["spec"]["clusterIP"] == "None"  # one target for each pod, not for all
    (endpoint,) = monitor["endpoints"]
    ports = {port["name"]: port for port in service["spec"]["ports"]}
    assert ports[endpoint["port"]]["port"] == 9400
    assert ports[endpoint["port"]]["targetPort"] == "dspark-metrics"
    container = pods(found)["router"]["spec"]["containers"][0]
    assert {"name": "dspark-metrics", "containerPort": 9400} in container["ports"]
    closed = render({"config": {"router": {"metrics_port": None}}})
    assert "metrics" not in {p["name"] for p in one(closed, "Service", "-grpc")["spec"]["ports"]}
    with pytest.raises(HelmError, match=r"config\.router\.metrics_port"):
        render({**ALL_ON, "config": {"router": {"metrics_port": None}}})


def test_routes_lead_to_the_grpc_service() -> None:
    found = render(ALL_ON)
    route = one(found, "GRPCRoute")
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    assert route["spec"]["parentRefs"] == ALL_ON["gateway"]["parentRefs"]
    (rule,) = route["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    service = one(found, "Service", "-grpc")
    assert backend == {
        "name": service["metadata"]["name"],
        "port": service["spec"]["ports"][0]["port"],
    }


def test_budgets_count_pods() -> None:
    """KubeRay's pods have no scalable owner: Kubernetes hears a whole `minAvailable` only."""
    values = yaml.safe_load((CHART / "profiles" / "deepseek-v4.yaml").read_text())
    budgets = [loaded for loaded in render(values) if loaded["kind"] == "PodDisruptionBudget"]
    found = {b["metadata"]["name"].rsplit("-", 1)[1]: b["spec"] for b in budgets}
    assert {pool: spec["minAvailable"] for pool, spec in found.items()} == {
        "router": 2,
        "target": 2,  # of 2 replicas with 2 hosts each
    }
    assert not any("maxUnavailable" in spec for spec in found.values())
    values["router"]["minAvailable"] = 0
    names = [loaded["metadata"]["name"] for loaded in render(values)]
    assert "test-dspark-target" in names
    assert "test-dspark-router" not in names


CLIENT = {"app": "client"}
STRANGER = {"app": "other"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
HEAD, ROUTER, TARGET, DRAFTER, HOOK = (
    {"app.kubernetes.io/instance": "test", "app.kubernetes.io/component": component}
    for component in ("head", "router", "target", "drafter", "test")
)


@pytest.mark.parametrize(
    ("source", "destination", "port", "allowed"),
    [
        (TARGET, DRAFTER, 25100, True),
        (TARGET, DRAFTER, 25163, True),
        (ROUTER, DRAFTER, 25100, False),
        (DRAFTER, DRAFTER, 25100, False),
        (HEAD, DRAFTER, 25163, False),
        (STRANGER, DRAFTER, 25100, False),
        (HEAD, DRAFTER, 25099, True),  # Ray's
        (DRAFTER, HEAD, 6379, True),
        (ROUTER, TARGET, 40000, True),
        (STRANGER, TARGET, 40000, False),
        (STRANGER, HEAD, 6379, False),
        (STRANGER, HEAD, 8265, False),
        (OPERATOR, HEAD, 8265, True),
        (OPERATOR, TARGET, 8265, False),
        (CLIENT, ROUTER, 50051, True),
        (HOOK, ROUTER, 50051, True),
        (HOOK, ROUTER, 8000, True),
        (CLIENT, TARGET, 8000, False),  # a proxy is there, but only for the release's own
        (HOOK, DRAFTER, 25100, False),
        (STRANGER, ROUTER, 50051, False),
        (CLIENT, ROUTER, 6379, False),
        (CLIENT, TARGET, 50051, False),
        (STRANGER, HEAD, 8080, True),  # metrics
    ],
)
def test_who_may_connect_to_what(
    source: dict[str, str], destination: dict[str, str], port: int, allowed: bool
) -> None:
    found = render(ALL_ON)
    templates = pods(found)
    container = templates[destination["app.kubernetes.io/component"]]["spec"]["containers"][0]
    names = {named["name"]: named["containerPort"] for named in container["ports"]}
    policies = [
        loaded["spec"]
        for loaded in found
        if loaded["kind"] == "NetworkPolicy" and selects(loaded["spec"]["podSelector"], destination)
    ]
    assert policies, "an unselected pod is open to all"

    def matches(rule: Object) -> bool:
        peers = rule.get("from")
        if peers and not any(selects(peer["podSelector"], source) for peer in peers):
            return False
        if "ports" not in rule:
            return True
        for entry in rule["ports"]:
            first = (
                names.get(entry["port"], -1) if isinstance(entry["port"], str) else entry["port"]
            )
            if first <= port <= entry.get("endPort", first):
                return True
        return False

    assert any(matches(rule) for policy in policies for rule in policy["ingress"]) is allowed


def test_secrets_are_mounted_where_they_are_used() -> None:
    values = {
        "tls": {
            "client": {"existingSecret": "door", "requireClientCertificate": True},
            "internal": {"existingSecret": "inside"},
        },
        "apiKeys": {"existingSecret": "keys"},
        "huggingFace": {"existingSecret": "hub"},
    }
    found = render(values)
    mounted = {
        component: {
            volume["secret"]["secretName"]
            for volume in pod["spec"]["volumes"]
            if "secret" in volume
        }
        for component, pod in pods(found).items()
    }
    assert mounted == {
        "head": set(),  # as HTTP is off
        "router": {"door", "inside", "keys"},
        "target": {"inside"},
        "drafter": {"inside"},
    }
    security = _served(found)["applications"][0]["args"]["security"]
    paths = [
        path
        for part in (security["client_tls"], security["internal_tls"])
        for key, path in part.items()
        if key != "server_name"
    ]
    router = pods(found)["router"]["spec"]["containers"][0]
    folders = tuple(mount["mountPath"] + "/" for mount in router["volumeMounts"])
    assert all(path.startswith(folders) for path in [*paths, security["api_keys_file"]])
    parsed = ClusterConfig.parse(_served(found)["applications"][0]["args"]).security
    assert parsed.client_tls is not None
    assert parsed.client_tls.client_ca_file is not None


def test_no_pod_is_root_or_has_a_token() -> None:
    for component, pod in pods(render({})).items():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
        # The head's autoscaler asks Kubernetes for pods.
        assert component == "head" or spec["automountServiceAccountToken"] is False


def test_dashboards_and_rules_are_those_of_the_folder(tmp_path: Path) -> None:
    chart = chart_copy(tmp_path)
    for folder in ("dashboards", "rules"):
        (chart / folder).mkdir(exist_ok=True)
    dashboard = {"title": "Speculation", "panels": [{"legendFormat": "{{ replica }}"}]}
    (chart / "dashboards" / "speculation.json").write_text(json.dumps(dashboard, indent=2))
    rule = {"alert": "Slow", "expr": "up == 0", "annotations": {"summary": "{{ $labels.pod }}"}}
    group = {"name": "dspark", "rules": [rule]}
    (chart / "rules" / "zz.yaml").write_text(yaml.safe_dump({"groups": [group]}))
    found = render(ALL_ON, chart)
    data = one(found, "ConfigMap", "-dashboard-speculation")["data"]
    assert json.loads(data["speculation.json"]) == dashboard
    assert one(found, "PrometheusRule")["spec"]["groups"][-1] == group


def test_an_alert_links_to_its_runbook_where_the_values_say_where_it_is() -> None:
    base = ALL_ON["monitoring"]["rules"]["runbookBase"]
    for values, found in (
        (ALL_ON, True),
        ({"monitoring": {"rules": {"enabled": True}}}, False),
    ):
        groups = one(render(values), "PrometheusRule")["spec"]["groups"]
        notes = [rule["annotations"] for g in groups for rule in g["rules"] if "alert" in rule]
        assert notes
        for note in notes:
            link = f"{base}/{note['runbook']}" if found else None
            assert note.get("runbook_url") == link
            assert (ROOT / note["runbook"].split("#")[0]).is_file()


def test_each_pod_has_what_its_values_add() -> None:
    for component, pod in pods(render(ALL_ON)).items():
        spec = pod["spec"]
        assert spec["runtimeClassName"] == "nvidia", component
        assert spec["priorityClassName"] == "high"
        assert pod["metadata"]["labels"]["team"] == "llm"
        assert pod["metadata"]["labels"]["app.kubernetes.io/component"] == component
        assert pod["metadata"]["annotations"] == {"note": "mine"}
        assert OF_A_POD["extraVolumes"][0] in spec["volumes"]
        assert OF_A_POD["extraVolumeMounts"][0] in spec["containers"][0]["volumeMounts"]
    for pod in pods(render({})).values():
        assert "runtimeClassName" not in pod["spec"]


def test_generated_parts_are_fresh() -> None:
    command = [sys.executable, str(ROOT / "helm" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"run `make chart`: {done.stdout}{done.stderr}"


def _served(found: list[Object]) -> Object:
    """The Serve configuration in the objects."""
    served: Object = yaml.safe_load(one(found, "RayService")["spec"]["serveConfigV2"])
    return served


def _by_name(found: list[Object]) -> dict[tuple[str, str], Object]:
    by_name = {(loaded["kind"], loaded["metadata"]["name"]): loaded for loaded in found}
    assert len(by_name) == len(found)
    return by_name
