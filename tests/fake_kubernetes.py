"""A Kubernetes API server of one process for Helm: discovery, storage, validation; no controllers.

It answers what `helm install`, `upgrade`, `rollback`, `test` and `uninstall` ask, and refuses what
the schemas refuse. It runs nothing: pods are said to have succeeded, and no operator turns a
RayService into pods. Of merging it knows what these calls need: JSON merge patches, strategic ones
for the ports of a Service, and server-side apply by a single manager.
"""

from __future__ import annotations

import base64
import copy
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

Object = dict[str, Any]
# (group and version, plural) -> kind; all are namespaced.
KINDS = {
    ("v1", "configmaps"): "ConfigMap",
    ("v1", "persistentvolumeclaims"): "PersistentVolumeClaim",
    ("v1", "pods"): "Pod",
    ("v1", "secrets"): "Secret",
    ("v1", "services"): "Service",
    ("networking.k8s.io/v1", "networkpolicies"): "NetworkPolicy",
    ("policy/v1", "poddisruptionbudgets"): "PodDisruptionBudget",
    ("gateway.networking.k8s.io/v1", "grpcroutes"): "GRPCRoute",
    ("gateway.networking.k8s.io/v1", "httproutes"): "HTTPRoute",
    ("monitoring.coreos.com/v1", "podmonitors"): "PodMonitor",
    ("monitoring.coreos.com/v1", "prometheusrules"): "PrometheusRule",
    ("monitoring.coreos.com/v1", "servicemonitors"): "ServiceMonitor",
    ("ray.io/v1", "rayservices"): "RayService",
}
VERSION = {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
_PROTOBUF = b"k8s\0"
Key = tuple[str, str, str, str]  # group and version, plural, namespace, name


class ApiError(Exception):
    """An answer that is not a success."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


class FakeKubernetes:
    """Serves on ``url`` inside a ``with`` block.

    Args:
        problem: what is wrong with an object that somebody writes, or ``None``.

    Attributes:
        objects: what is stored; ``metadata.generation`` counts the changes of a ``spec``.
        unanswered: paths that were asked for and are not known here.
    """

    def __init__(self, problem: Callable[[Object], str | None]) -> None:
        self.objects: dict[Key, Object] = {}
        self.unanswered: list[str] = []
        self._problem = problem
        self._lock = threading.RLock()
        self._version = 0
        self._stopping = threading.Event()
        server = self

        class Handler(_Handler):
            kubernetes = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> FakeKubernetes:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._http.shutdown()
        self._http.server_close()

    def stored(self, kind: str) -> dict[str, Object]:
        """Objects of a kind, by name."""
        with self._lock:
            return {
                name: copy.deepcopy(loaded)
                for (group, plural, _, name), loaded in self.objects.items()
                if KINDS[group, plural] == kind
            }

    def discover(self, path: str) -> Object | None:
        """The answer to a question about the API itself."""
        groups = sorted({group for group, _ in KINDS if group != "v1"})
        if path == "/version":
            return VERSION
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            listed = [
                {
                    "name": group.split("/")[0],
                    "versions": [version := {"groupVersion": group, "version": "v1"}],
                    "preferredVersion": version,
                }
                for group in groups
            ]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
        for group in ("v1", *groups):
            if path == _group_path(group):
                verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
                resources = [
                    {"name": plural, "kind": kind, "namespaced": True, "verbs": verbs}
                    for (of, plural), kind in KINDS.items()
                    if of == group
                ]
                return {"kind": "APIResourceList", "groupVersion": group, "resources": resources}
        return None

    def find(self, path: str) -> Key:
        """What a path means; the name may be empty. Raises: ApiError."""
        for group, plural in KINDS:
            parts = path.removeprefix(_group_path(group) + "/").split("/")
            if parts[0] == "namespaces" and len(parts) in (3, 4) and parts[2] == plural:
                return group, plural, parts[1], parts[3] if len(parts) == 4 else ""
        self.unanswered.append(path)
        raise ApiError(404, "NotFound", f"no such path: {path}")

    def get(self, key: Key) -> Object:
        with self._lock:
            if key not in self.objects:
                raise ApiError(404, "NotFound", f'{key[1]} "{key[3]}" not found')
            return self.objects[key]

    def list(self, key: Key, query: dict[str, str]) -> Object:
        labels = dict(part.split("=") for part in query.get("labelSelector", "").split(",") if part)
        name = query.get("fieldSelector", "").removeprefix("metadata.name=")
        with self._lock:
            items = [
                loaded
                for (group, plural, space, of), loaded in self.objects.items()
                if (group, plural, space) == key[:3]
                and labels.items() <= loaded["metadata"].get("labels", {}).items()
                and name in ("", of)
            ]
            version = {"resourceVersion": str(self._version)}
        kind = f"{KINDS[key[:2]]}List"
        return {"kind": kind, "apiVersion": key[0], "metadata": version, "items": items}

    def create(self, key: Key, body: Object) -> Object:
        key = (*key[:3], body["metadata"]["name"])
        with self._lock:
            if key in self.objects:
                raise ApiError(409, "AlreadyExists", f'{key[1]} "{key[3]}" already exists')
            return self._store(key, body)

    def replace(self, key: Key, body: Object) -> Object:
        with self._lock:
            self.get(key)
            return self._store(key, body)

    def patch(self, key: Key, body: Object, content_type: str) -> Object:
        with self._lock:
            if content_type == "application/apply-patch+yaml":
                return self._store(key, body)
            if content_type == "application/strategic-merge-patch+json":
                merged = _merge(self.get(key), body, strategic=True)
            elif content_type == "application/merge-patch+json":
                merged = _merge(self.get(key), body, strategic=False)
            else:
                raise ApiError(415, "UnsupportedMediaType", content_type)
            return self._store(key, merged)

    def delete(self, key: Key) -> Object:
        with self._lock:
            self.get(key)
            return self.objects.pop(key)

    def wait_stopped(self) -> None:
        """Until the server ends: for watches, in which nothing happens."""
        self._stopping.wait(30)

    def _store(self, key: Key, body: Object) -> Object:
        body = copy.deepcopy(body)
        metadata = body["metadata"]
        if body["kind"] != KINDS[key[:2]] or metadata.get("namespace", key[2]) != key[2]:
            raise ApiError(400, "BadRequest", f"{key[1]} do not take this object")
        plain = {name: value for name, value in body.items() if name != "status"}
        plain["metadata"] = {
            name: value for name, value in metadata.items() if name != "managedFields"
        }
        if problem := self._problem(plain):
            raise ApiError(422, "Invalid", problem)
        before = self.objects.get(key)
        self._version += 1
        changed = before is None or before.get("spec") != body.get("spec")
        generation = 0 if before is None else before["metadata"]["generation"]
        metadata |= {
            "namespace": key[2],
            "uid": str(uuid.uuid4()) if before is None else before["metadata"]["uid"],
            "resourceVersion": str(self._version),
            "generation": generation + changed,
            "creationTimestamp": "2026-01-01T00:00:00Z",
        }
        if body["kind"] == "Pod":
            body["status"] = {"phase": "Succeeded"}
        self.objects[key] = body
        return body


class _Handler(BaseHTTPRequestHandler):
    kubernetes: FakeKubernetes
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        found = self.kubernetes.discover(url.path)
        if (
            url.path == "/openapi/v2"
        ):  # a document of protobuf without definitions: Helm checks none
            self._send(200, b"")
        elif found is not None:
            self._answer(200, found)
        elif query.get("watch"):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Connection", "close")
            self.end_headers()
            self.kubernetes.wait_stopped()
            self.close_connection = True
        else:
            self._do(
                lambda key, _: (
                    self.kubernetes.get(key) if key[3] else self.kubernetes.list(key, query)
                )
            )

    def do_POST(self) -> None:
        self._do(self.kubernetes.create, code=201)

    def do_PUT(self) -> None:
        self._do(self.kubernetes.replace)

    def do_PATCH(self) -> None:
        content_type = self.headers["Content-Type"]
        self._do(lambda key, body: self.kubernetes.patch(key, body, content_type))

    def do_DELETE(self) -> None:
        self._do(lambda key, _: self.kubernetes.delete(key))

    def log_message(self, *_: object) -> None:
        """Not on the tests' output."""

    def _do(self, action: Callable[[Key, Object], Object], code: int = 200) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(length)
        try:
            if data.startswith(_PROTOBUF):
                body = _secret_from_protobuf(data) if "/secrets" in self.path else {}
            else:
                body = yaml.load(data, Loader=yaml.CSafeLoader) if data else {}
            self._answer(code, action(self.kubernetes.find(urlsplit(self.path).path), body))
        except ApiError as error:
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
            said = {"message": str(error), "reason": error.reason, "code": error.code}
            self._answer(error.code, status | said)

    def _answer(self, code: int, body: Object) -> None:
        self._send(code, json.dumps(body).encode())

    def _send(self, code: int, data: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _group_path(group: str) -> str:
    return "/api/v1" if group == "v1" else f"/apis/{group}"


def _secret_from_protobuf(data: bytes) -> Object:
    """Helm 4's record of a release, which it sends in Kubernetes' binary form."""
    unknown = dict(_wire_fields(data[len(_PROTOBUF) :]))
    secret: Object = {"apiVersion": "v1", "kind": "Secret", "metadata": {}, "data": {}}
    for number, value in _wire_fields(unknown[2]):
        if number == 1:
            metadata: Object = {"labels": {}}
            for field, part in _wire_fields(value):
                name = {1: "name", 3: "namespace"}.get(field)
                if name and part:
                    metadata[name] = part.decode()
                elif field == 11:
                    key, label = (text.decode() for _, text in _wire_fields(part))
                    metadata["labels"][key] = label
            secret["metadata"] = metadata
        elif number == 2:
            key, content = (text for _, text in _wire_fields(value))
            secret["data"][key.decode()] = base64.b64encode(content).decode()
        elif number == 3:
            secret["type"] = value.decode()
    return secret


def _wire_fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Numbers and contents of a message's fields of variable length; the others are passed over."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            varint()
            continue
        assert wire_type == 2, wire_type
        length = varint()
        yield number, data[position : position + length]
        position += length


def _merge(before: Any, patch: Any, *, strategic: bool) -> Any:
    """RFC 7386; strategic: lists of Services' ports are merged by their numbers."""
    if not isinstance(before, dict) or not isinstance(patch, dict):
        return copy.deepcopy(patch)
    merged = copy.deepcopy(before)
    for key, value in patch.items():
        if strategic and key.startswith("$"):
            continue  # the order of what is merged
        if value is None:
            merged.pop(key, None)
        elif strategic and key == "ports" and isinstance(value, list):
            ports = {port["port"]: port for port in before.get(key, ())}
            for port in value:
                number = port["port"]
                if port.get("$patch") == "delete":
                    ports.pop(number, None)
                else:
                    ports[number] = _merge(ports.get(number, {}), port, strategic=True)
            merged[key] = list(ports.values())
        else:
            merged[key] = _merge(before.get(key), value, strategic=strategic)
    return merged
