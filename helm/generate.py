"""Writes the parts of the chart that are made of other files.

    python helm/generate.py            writes them
    python helm/generate.py --check    exit 1, naming what is not up to date

Generated are ``serve/`` (the Serve configurations of ``deployments/``), ``rules/`` and
``dashboards/`` (those of ``deployments/``), the definitions of ``values.schema.json`` that
``ClusterConfig`` and Kubernetes give, and the table of values in ``README.md``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from kubernetes_validate.utils import schema_contents

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "dspark"
DEPLOYMENTS = ROOT / "deployments"
sys.path.insert(0, str(ROOT))

from cluster.config import ClusterConfig  # noqa: E402

# The Serve configurations that are profiles of the chart; `local.yaml` is for `dspark up` alone.
PROFILES = ("laptop", "one-node", "two-pools", "deepseek-v4")

# Fields of Kubernetes that values pass on, as its schemas call them, in this version of it.
KUBERNETES_VERSION = "1.37.0"
KUBERNETES_TYPES = (
    "core.v1.Affinity",
    "core.v1.EnvVar",
    "core.v1.LocalObjectReference",
    "core.v1.PodSecurityContext",
    "core.v1.ResourceRequirements",
    "core.v1.SecurityContext",
    "core.v1.Toleration",
    "core.v1.TopologySpreadConstraint",
    "core.v1.Volume",
    "core.v1.VolumeMount",
    "networking.v1.NetworkPolicyPeer",
)

TABLE_BEGIN = "<!-- values: helm/generate.py -->"
TABLE_END = "<!-- /values -->"
_KEY = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z][\w-]*):")


def generated_files() -> dict[Path, str]:
    """What each generated file should hold."""
    files = {
        CHART / "serve" / f"{name}.yaml": (DEPLOYMENTS / f"{name}.yaml").read_text()
        for name in PROFILES
    }
    for folder, pattern in (("rules", "*.yaml"), ("dashboards", "*.json")):
        for path in sorted((DEPLOYMENTS / folder).glob(pattern)):
            files[CHART / folder / path.name] = path.read_text()
    files[CHART / "values.schema.json"] = values_schema()
    files[CHART / "README.md"] = readme()
    return files


def values_schema() -> str:
    """The schema's own part, with the definitions that it refers to made anew."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    own = {
        name: definition
        for name, definition in schema["$defs"].items()
        if not name.startswith(("config.", "kubernetes."))
    }
    schema["$defs"] = own | _config_definitions() | _kubernetes_definitions()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def readme() -> str:
    """The chart's page with a new table of values."""
    text = (CHART / "README.md").read_text()
    before, rest = text.split(TABLE_BEGIN)
    after = rest.split(TABLE_END)[1]
    rows = "\n".join(values_table((CHART / "values.yaml").read_text()))
    return f"{before}{TABLE_BEGIN}\n{rows}\n{TABLE_END}{after}"


def values_table(text: str) -> Iterator[str]:
    """Lines of a table: one row for each key with a comment that begins with ``# --``."""
    yield "| value | default | what it is |"
    yield "|---|---|---|"
    values = yaml.safe_load(text)
    path: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# --"):
            comment = [stripped.removeprefix("# --").strip()]
        elif stripped.startswith("#") and comment:
            comment.append(stripped.removeprefix("#").strip())
        elif match := _KEY.match(line):
            path = [*path[: len(match["indent"]) // 2], match["key"]]
            if comment:
                default: Any = values
                for key in path:
                    default = default[key]
                described = " ".join(comment).replace("|", "\\|")
                yield f"| `{'.'.join(path)}` | `{json.dumps(default)}` | {described} |"
            comment = []
        elif not stripped.startswith("#"):
            comment = []


def _config_definitions() -> dict[str, Any]:
    """``config``'s: ``ClusterConfig``, of which any part may be given."""
    schema = ClusterConfig.model_json_schema(ref_template="#/$defs/config.{model}")
    definitions = schema.pop("$defs")
    definitions["ClusterConfig"] = schema
    return {
        f"config.{name}": _simplified(definition, drop=("required", "default", "title"))
        for name, definition in sorted(definitions.items())
    }


def _kubernetes_definitions() -> dict[str, Any]:
    path = f"kubernetes-json-schema/v{KUBERNETES_VERSION}-local-strict/_definitions.json"
    known = schema_contents(path, KUBERNETES_VERSION)["$defs"]
    found: dict[str, Any] = {}
    wanted = [f"io.k8s.api.{name}" for name in KUBERNETES_TYPES]
    while wanted:
        name = wanted.pop()
        if f"kubernetes.{name}" in found:
            continue
        definition = _simplified(known[name], drop=("description", "default", "format"))
        definition.get("properties", {}).pop("managedFields", None)  # the server's own, and untyped
        text = json.dumps(definition)
        wanted += re.findall(r'"#/\$defs/([^"]+)"', text)
        text = text.replace("#/$defs/", "#/$defs/kubernetes.")
        found[f"kubernetes.{name}"] = json.loads(text)
    return dict(sorted(found.items()))


def _simplified(node: Any, drop: tuple[str, ...]) -> Any:
    """``node`` without the keywords in ``drop`` and the vendor's, and with shorter choices of null.

    A value that is null is one that is not given: Helm drops its default.
    """
    if isinstance(node, list):
        return [_simplified(item, drop) for item in node]
    if not isinstance(node, dict):
        return node
    node = {
        key: _simplified(value, drop)
        if key not in ("properties", "patternProperties")
        else {name: _simplified(child, drop) for name, child in value.items()}
        for key, value in node.items()
        if key not in drop and not key.startswith("x-kubernetes-")
    }
    choices = node.get("anyOf", [])
    if len(choices) == 2 and choices[1] == {"type": "null"} and "type" in choices[0]:
        del node["anyOf"]
        node = {**choices[0], "type": [choices[0]["type"], "null"], **node}
        if "enum" in node:
            node["enum"] = [*node["enum"], None]
    return node


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description="Writes the generated parts of the Helm chart.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    check = parser.parse_args().check
    files = generated_files()
    kept = ("serve", "rules", "dashboards")
    surplus = {path for folder in kept for path in (CHART / folder).glob("*")} - files.keys()
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    for path in [*stale, *sorted(surplus)]:
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
    if check:
        return int(bool(stale or surplus))
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(files[path])
    for path in surplus:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
