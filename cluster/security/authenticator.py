"""Who calls: from a header to an API key."""

from __future__ import annotations

import hmac
import logging

from cluster.errors import UnauthenticatedError
from cluster.security.api_keys import ApiKey, hash_key, read_keys
from cluster.security.refusals import Refusal, Refusals
from cluster.security.watched_file import WatchedFiles

logger = logging.getLogger(__name__)

_SCHEME = "bearer"
# Who calls where no keys are asked for.
ANYBODY = ApiKey(name="anybody", sha256="0" * 64)


class Authenticator:
    """Finds the API key of a call, for gRPC and HTTP alike. Thread-safe.

    Guarantees: every key of the file is compared with, each in constant time; what was presented
    is neither kept nor logged; a changed file is in force within a second, and one that cannot be
    read changes nothing.

    Args:
        path: of the key file; unset: everybody may call, as ``ANYBODY``.
        refusals: counted into.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(self, path: str | None = None, refusals: Refusals | None = None) -> None:
        self.refusals = refusals or Refusals()
        self._keys: WatchedFiles[tuple[ApiKey, ...]] | None = None
        if path is not None:
            self._keys = WatchedFiles([path], lambda: read_keys(path), on_error=_tell)

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
        return self._keys is None

    def authenticate(self, header: str | None, peer: str = "") -> ApiKey:
        """The key that ``header`` presents.

        Args:
            header: the value of ``authorization``; ``None``: there was none.
            peer: address of who calls, for the log.

        Raises:
            UnauthenticatedError: no key, or an unknown one.
        """
        if self._keys is None:
            return ANYBODY
        scheme, _, presented = (header or "").partition(" ")
        presented = presented.strip()
        if scheme.lower() != _SCHEME or not presented:
            self.refusals.count(Refusal.NO_KEY, peer)
            raise UnauthenticatedError(
                "an API key is needed: 'authorization: Bearer KEY', from `dspark keys create`"
            )
        digest = hash_key(presented)
        found = None
        for key in self._keys.get():
            if hmac.compare_digest(key.sha256, digest):
                found = key
        if found is None:
            self.refusals.count(Refusal.UNKNOWN_KEY, peer)
            raise UnauthenticatedError("the API key is not known")
        return found


def _tell(error: Exception) -> None:
    logger.error("API keys stay as they are: %s", error)
