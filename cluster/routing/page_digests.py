"""What a KV page is known by, on every machine the same.

A page's digest covers its tokens and all before it. Routers and replicas speak of pages by the
first 8 bytes of that, its key: a key that meant another page would send a request to a replica that
has to compute a little more, and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

KEY_BYTES = 8


def page_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of a page and all before it; the same on every machine.

    Args:
        parent: digest of the page before it, empty for the first.
        token_ids: of the page, all of them.

    Returns:
        32 bytes. Collisions would hand one request another one's context, hence SHA-256.
    """
    return hashlib.sha256(parent + np.asarray(token_ids, dtype="<i4").tobytes()).digest()


def page_key(digest: bytes) -> int:
    """The key of the page with this digest, below 2**64."""
    return int.from_bytes(digest[:KEY_BYTES], "little")


class PrefixLayout(NamedTuple):
    """Which pages a replica reports: of ``page_size`` tokens each, every ``stride``-th of a
    prefix."""

    page_size: int
    stride: int

    @property
    def num_tokens(self) -> int:
        """Tokens from one reported page's end to the next one's."""
        return self.page_size * self.stride


def prefix_keys(token_ids: Sequence[int], layout: PrefixLayout) -> list[int]:
    """Keys of a prompt's pages that may be reported, the longest prefix last.

    The page with the prompt's last token is none of them: that token must be computed.
    """
    size = layout.page_size * 4
    data = np.asarray(token_ids, dtype="<i4").tobytes()
    keys = []
    digest = b""
    for index in range((len(token_ids) - 1) // layout.num_tokens * layout.stride):
        digest = hashlib.sha256(digest + data[index * size : (index + 1) * size]).digest()
        if (index + 1) % layout.stride == 0:
            keys.append(page_key(digest))
    return keys
