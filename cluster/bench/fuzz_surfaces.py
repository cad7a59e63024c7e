"""What strangers' bytes reach first, each as one function: bytes in, accepted or refused by type.

Used by ``cluster.bench.fuzz_child``, in which the modules named here are instrumented; so each
surface has a module of its own, imported when it is used.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

VOCAB_SIZE = 1000
MAX_MODEL_LEN = 2048
FEATURE_SIZE = 4
BLOCK_SIZE = 8

ACCEPTED = "accepted"
UNDECODABLE = "undecodable"  # no message of its kind at all: protobuf's, JSON's or YAML's refusal


class Loaded(NamedTuple):
    """A surface in use.

    Attributes:
        check: returns ``ACCEPTED``, ``UNDECODABLE`` or the kind of the typed error, and raises
            anything that is a mistake of ours.
        seeds: valid inputs.
        mutate: changes what is decoded; returns its input where it cannot be decoded.
        splice: the first input with parts of the second one; unset: nothing of the kind.
        words: what changes of bytes put in, as libFuzzer's dictionary.
    """

    check: Callable[[bytes], str]
    seeds: list[bytes]
    mutate: Callable[[bytes, random.Random], bytes]
    splice: Callable[[bytes, bytes, random.Random], bytes] | None = None
    words: Sequence[bytes] = ()


@dataclass(frozen=True)
class Surface:
    """One surface.

    Attributes:
        module: its ``load`` returns it, and imports what it needs.
        targets: modules whose branches count.
    """

    module: str
    targets: tuple[str, ...]

    def load(self) -> Loaded:
        """Imports the targets."""
        loaded: Loaded = importlib.import_module(f"cluster.bench.{self.module}").load()
        return loaded


_CHAT = (
    "cluster.chat.fields",
    "cluster.chat.template",
    "cluster.chat.text",
    "cluster.chat.tools",
    "cluster.chat.variables",
    "cluster.rpc.chat_prompt",
    "cluster.rpc.prompt",
)
SURFACES = {
    "client": Surface(
        "fuzz_client",
        (
            "cluster.rpc.convert",
            "cluster.request",
            "cluster.rpc.chat",
            "cluster.rpc.chat_messages",
            "cluster.rpc.inference_service",
            *_CHAT,
        ),
    ),
    "http": Surface(
        "fuzz_http",
        (
            "cluster.api.body",
            "cluster.api.chat",
            "cluster.api.completions",
            "cluster.api.errors",
            "cluster.api.fields",
            "cluster.api.tokens",
            "cluster.request",
            *_CHAT,
        ),
    ),
    "drafter": Surface("fuzz_drafter", ("cluster.rpc.draft_messages", "cluster.rpc.tensors")),
    "proposals": Surface(
        "fuzz_proposals",
        (
            "cluster.rpc.draft_messages",
            "cluster.rpc.drafter_handshake",
            "cluster.rpc.tensors",
            "cluster.speculation.draft_cost",
            "cluster.speculation.draft_curve",
            "cluster.speculation.monotone_table",
            "cluster.speculation.proposal",
        ),
    ),
    "config": Surface(
        "fuzz_config", ("cluster.config", "cluster.section", "cluster.security.api_keys")
    ),
}
