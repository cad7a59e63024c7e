"""A certificate with its key, and the authority that others are checked with, from PEM files."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import ConfigError
from cluster.security.watched_file import WatchedFiles

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Certificates:
    """One consistent set, as PEM; its representation shows nothing of it.

    Attributes:
        chain: the certificate, intermediates behind it; ``None`` without one.
        key: its private key.
        authority: certificates that sign the other side's; ``None``: it is not asked for one, or,
            for a client, the system's are used.
    """

    chain: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    authority: bytes | None = field(default=None, repr=False)


class CertificateFiles:
    """Certificates that are read again when their files change. Thread-safe.

    Guarantees: a set is used only when the key belongs to the certificate and all of it can be
    read; until a changed set is usable, the former one is in force, and the log says why.

    Args:
        section: of the configuration, for errors: ``security.internal_tls``.
        cert_file, key_file: both or none.
        ca_key, ca_file: name in the section, and path, of the authority, if there is one.

    Raises:
        ConfigError: naming the key whose file cannot be used.
    """

    def __init__(
        self,
        section: str,
        *,
        cert_file: str | None = None,
        key_file: str | None = None,
        ca_key: str = "ca_file",
        ca_file: str | None = None,
    ) -> None:
        self._section = section
        self._cert_file, self._key_file = cert_file, key_file
        self._ca_key, self._ca_file = ca_key, ca_file
        paths = [path for path in (cert_file, key_file, ca_file) if path is not None]
        self._files = WatchedFiles(paths, self._load, on_error=self._tell)

    def get(self) -> Certificates:
        """The certificates in force."""
        return self._files.get()

    def _load(self) -> Certificates:
        found = Certificates(
            self._read("cert_file", self._cert_file),
            self._read("key_file", self._key_file),
            self._read(self._ca_key, self._ca_file),
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if found.authority is not None:
            try:
                context.load_verify_locations(cadata=found.authority.decode("ascii"))
            except (ssl.SSLError, ValueError):
                raise self._error(self._ca_key, "holds no certificate (PEM)") from None
        if self._cert_file is not None:
            try:
                # With an empty password: else an encrypted key would ask the terminal for one.
                context.load_cert_chain(self._cert_file, self._key_file, password="")
            except (ssl.SSLError, OSError, ValueError):
                message = "is not a certificate (PEM) with the key of key_file"
                raise self._error("cert_file", message) from None
        return found

    def _read(self, key: str, path: str | None) -> bytes | None:
        if path is None:
            return None
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise self._error(key, f"{path} cannot be read: {error.strerror}") from None

    def _error(self, key: str, message: str) -> ConfigError:
        return ConfigError(f"{self._section}.{key}", message)

    def _tell(self, error: Exception) -> None:
        logger.error("certificates stay as they are: %s", error)
