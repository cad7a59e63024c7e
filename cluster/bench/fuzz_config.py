"""Configuration files, and files of API keys."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import yaml

from cluster.bench.fuzz_json import words_of
from cluster.bench.fuzz_mutators import dump_document, mutate_document
from cluster.bench.fuzz_surfaces import ACCEPTED, UNDECODABLE, Loaded
from cluster.config import ClusterConfig
from cluster.errors import DsparkError
from cluster.section import parse_yaml
from cluster.security.api_keys import parse_keys

_DRAFTED = {"target": {"model": "m"}, "speculative": {"method": "dspark", "model": "d"}}
_TLS = {"cert_file": "a", "key_file": "b", "ca_file": "c"}
_DOCUMENTS: tuple[dict[str, Any], ...] = (
    {
        "target": {"model": "m", "dtype": "float32", "tensor_parallel_size": 2, "max_num_seqs": 8},
        "speculative": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3},
        "drafter": {"num_replicas": 2, "port": 0},
        "router": {"port": 50051, "max_message_mb": 4},
    },
    {
        **_DRAFTED,
        "target": {"model": "m", "device": "cuda"},
        "security": {"api_keys_file": "k", "internal_tls": _TLS},
    },
)
_KEYS = {
    "keys": [
        {"name": "a", "sha256": "ab" * 32, "requests_per_second": 1.5},
        {"name": "b", "sha256": "cd" * 32},
    ]
}
# libyaml's, which is ten times faster, where PyYAML has it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load() -> Loaded:
    """The surface."""
    documents = [*_DOCUMENTS, *_sections(), _KEYS]
    words = [*words_of(documents), b"&a ", b"*a", b"<<: ", b"!!int ", b"2024-13-45", b"? ", b"|-"]
    return Loaded(_check, [dump_document(document) for document in documents], mutate, words=words)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Keys and values of the document changed."""
    try:
        document = yaml.load(data, Loader=_LOADER)
        return dump_document(mutate_document(document, rng))
    except (yaml.YAMLError, ValueError, RecursionError):
        return data


def _sections() -> list[dict[str, Any]]:
    """Every section with every key, at its default where it has one."""
    whole = ClusterConfig.parse(_DOCUMENTS[1]).model_dump(mode="json")
    sections = [{**_DRAFTED, name: values} for name, values in whole.items() if values is not None]
    return [document for document in sections if _is_accepted(document)]


def _is_accepted(document: dict[str, Any]) -> bool:
    try:
        ClusterConfig.parse(document)
    except DsparkError:
        return False
    return True


def _check(data: bytes) -> str:
    try:
        document = parse_yaml("fuzz", data)
    except DsparkError:
        return UNDECODABLE
    has_keys = isinstance(document, Mapping) and "keys" in document
    try:
        (parse_keys if has_keys else ClusterConfig.parse)(document)
    except DsparkError as error:
        return type(error).__name__
    return ACCEPTED
