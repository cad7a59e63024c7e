"""What a client shows to a router, and how it knows that it is one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.rpc.tls import ChannelTls
from cluster.security.certificates import CertificateFiles

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Credentials:
    """A client's API key and TLS; its representation does not show the key.

    Attributes:
        api_key: empty: none is sent.
        tls: unset: plaintext.
    """

    api_key: str = field(default="", repr=False)
    tls: ChannelTls | None = None

    @property
    def metadata(self) -> Metadata:
        """Headers of every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Credentials:
        """What the environment says, with nothing set an open plaintext client.

        ``DSPARK_API_KEY`` is the key. TLS is used when ``DSPARK_TLS_CA_FILE`` names the router's
        authority, or ``DSPARK_TLS`` is 1 (authorities that gRPC ships). ``DSPARK_TLS_CERT_FILE``
        and ``DSPARK_TLS_KEY_FILE`` are the client's own certificate, ``DSPARK_TLS_SERVER_NAME``
        the name in the router's where it is not the address's host.

        Raises:
            ConfigError: a file cannot be used.
        """
        ca_file = environment.get("DSPARK_TLS_CA_FILE") or None
        tls = None
        if ca_file is not None or environment.get("DSPARK_TLS") == "1":
            files = CertificateFiles(
                "client",
                cert_file=environment.get("DSPARK_TLS_CERT_FILE") or None,
                key_file=environment.get("DSPARK_TLS_KEY_FILE") or None,
                ca_file=ca_file,
            )
            tls = ChannelTls(files, environment.get("DSPARK_TLS_SERVER_NAME", ""))
        return cls(environment.get("DSPARK_API_KEY", ""), tls)
