"""TLS of servers and channels, over certificates that may change while they are in use."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from cluster.config import ClientTlsConfig, InternalTlsConfig, SecurityConfig
from cluster.rpc.channels import HANDSHAKE_TIMEOUT_S, Options
from cluster.security.certificates import CertificateFiles, Certificates
from cluster.security.refusals import Refusal, Refusals

_MAX_PENDING = 100_000
_MAX_PEERS = 16_384


class ServerTls:
    """Credentials of a server. Every new connection gets the certificates of now.

    Args:
        files: the server's certificates, and the authority of its clients' where it asks for them.
        peer_name: DNS name that a client's certificate must have, else it may call nothing;
            ``None``: any that the authority has signed.
        refusals: counted into.
    """

    def __init__(
        self, files: CertificateFiles, *, peer_name: str | None = None, refusals: Refusals
    ) -> None:
        self._files = files
        self.peer_name = peer_name
        self.refusals = refusals
        self.handshakes = HandshakeCount(refusals)

    def credentials(self) -> grpc.ServerCredentials:
        """For one server."""
        used = [self._files.get()]
        lock = threading.Lock()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            # In a thread of gRPC's, for each new connection before its handshake.
            self.handshakes.begin()
            certificates = self._files.get()
            with lock:
                if certificates is used[0]:
                    return None  # as they were
                used[0] = certificates
            return _server_configuration(certificates)

        return grpc.dynamic_ssl_server_credentials(
            _server_configuration(used[0]),
            fetch,
            require_client_authentication=used[0].authority is not None,
        )


@dataclass(frozen=True)
class ChannelTls:
    """Credentials of channels. Every new channel gets the certificates of now.

    Attributes:
        files: the authority of servers, and this side's certificate if there is one.
        server_name: DNS name that the server's certificate must have; empty: the address's host.
    """

    files: CertificateFiles
    server_name: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """For one channel."""
        found = self.files.get()
        return grpc.ssl_channel_credentials(found.authority, found.key, found.chain)

    def options(self) -> Options:
        """Options that the channel needs with them."""
        if not self.server_name:
            return []
        return [("grpc.ssl_target_name_override", self.server_name)]


@dataclass(frozen=True)
class InternalTls:
    """Both ends of the cluster's own connections; ``None``: plaintext."""

    server: ServerTls | None = None
    channel: ChannelTls | None = None


def client_server_tls(config: ClientTlsConfig | None, refusals: Refusals) -> ServerTls | None:
    """Of the clients' door. Raises: ConfigError."""
    if config is None:
        return None
    files = CertificateFiles(
        "security.client_tls",
        cert_file=config.cert_file,
        key_file=config.key_file,
        ca_key="client_ca_file",
        ca_file=config.client_ca_file,
    )
    return ServerTls(files, refusals=refusals)


def internal_tls(config: InternalTlsConfig | None, refusals: Refusals) -> InternalTls:
    """Between the cluster's parts. Raises: ConfigError."""
    if config is None:
        return InternalTls()
    files = CertificateFiles(
        "security.internal_tls",
        cert_file=config.cert_file,
        key_file=config.key_file,
        ca_file=config.ca_file,
    )
    return InternalTls(
        ServerTls(files, peer_name=config.server_name, refusals=refusals),
        ChannelTls(files, config.server_name),
    )


class HandshakeCount:
    """Counts connections that came to nothing. Thread-safe.

    gRPC does not say that a handshake has failed (it only logs why, on standard error). So a
    connection counts as refused when no call has come on it ``HANDSHAKE_TIMEOUT_S`` after it began,
    noticed when the next one begins or ``settle`` is called. A connection whose client just waits
    counts as well; so does a call from an address and port that was used for another connection
    shortly before. Connections still waiting beyond ``_MAX_PENDING`` are not counted.

    Args:
        refusals: counted into.
        clock: monotonic seconds.
    """

    def __init__(self, refusals: Refusals, clock: Callable[[], float] = time.monotonic) -> None:
        self._refusals = refusals
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: deque[float] = deque(maxlen=_MAX_PENDING)
        self._peers: OrderedDict[str, None] = OrderedDict()

    def begin(self) -> None:
        """A connection was accepted."""
        with self._lock:
            self._pending.append(self._clock())
        self.settle()

    def called_from(self, peer: str) -> None:
        """A call came from ``peer``, an address with its port."""
        with self._lock:
            is_known = peer in self._peers
            self._peers[peer] = None
            self._peers.move_to_end(peer)
            if len(self._peers) > _MAX_PEERS:
                self._peers.popitem(last=False)
            # Which of those that wait it was makes no difference to the number.
            if not is_known and self._pending:
                self._pending.popleft()

    def settle(self) -> None:
        """Counts those whose time is over."""
        number = 0
        with self._lock:
            limit = self._clock() - HANDSHAKE_TIMEOUT_S
            while self._pending and self._pending[0] <= limit:
                self._pending.popleft()
                number += 1
        if number:
            self._refusals.count(
                Refusal.HANDSHAKE, "connections without a call; gRPC logs why", number
            )


def _server_configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(certificates.key, certificates.chain)], certificates.authority
    )


@dataclass(frozen=True)
class NodeSecurity:
    """What one process of the cluster needs of ``security``.

    Attributes:
        refusals: of all its parts.
    """

    refusals: Refusals
    internal: InternalTls
    client: ServerTls | None = None


def load_security(config: SecurityConfig, *, is_router: bool = False) -> NodeSecurity:
    """Reads the files that this process needs. Raises: ConfigError."""
    refusals = Refusals()
    return NodeSecurity(
        refusals,
        internal_tls(config.internal_tls, refusals),
        client_server_tls(config.client_tls, refusals) if is_router else None,
    )
