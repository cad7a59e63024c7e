"""Options of every gRPC channel and server of the cluster, in one place.

Every connection is kept alive by pings, so that a peer that vanished without closing its socket
is noticed within ``KEEPALIVE_TIME_S + KEEPALIVE_TIMEOUT_S``, and no channel shares its TCP
connection with another one: what is sent in bulk never stands in front of what is urgent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from grpc import aio

if TYPE_CHECKING:
    from cluster.rpc.tls import ChannelTls

# Raised when a message of an internal stream changes its meaning; both sides must be equal.
PROTOCOL_VERSION = 2

KEEPALIVE_TIME_S = 10.0
KEEPALIVE_TIMEOUT_S = 5.0
MIN_RECONNECT_S = 0.1
MAX_RECONNECT_S = 2.0

# A connection that has not finished its handshake by then is closed.
HANDSHAKE_TIMEOUT_S = 10.0

MIB = 1 << 20
DEFAULT_MAX_MESSAGE_BYTES = 64 * MIB

Options = list[tuple[str, int | str]]


def channel_options(max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> Options:
    """Options of a client's channel, for ``grpc.aio`` and for ``grpc``.

    Args:
        max_message_bytes: the largest message sent or received.
    """
    return [
        *_common_options(max_message_bytes),
        ("grpc.keepalive_permit_without_calls", 1),
        # A TCP connection of its own for each channel object.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", int(MIN_RECONNECT_S * 1000)),
        ("grpc.min_reconnect_backoff_ms", int(MIN_RECONNECT_S * 1000)),
        ("grpc.max_reconnect_backoff_ms", int(MAX_RECONNECT_S * 1000)),
        # Retries are ours to decide: gRPC's own would send a message twice.
        ("grpc.enable_retries", 0),
        # Where a name has several addresses, as that of a headless Service, calls take turns.
        ("grpc.lb_policy_name", "round_robin"),
        # Inside the cluster addresses are direct; a proxy of the environment is not meant.
        ("grpc.enable_http_proxy", 0),
    ]


def server_options(
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    *,
    max_sent_bytes: int | None = None,
    reuse_port: bool = False,
    max_connection_idle_s: float | None = None,
    max_connection_age_s: float | None = None,
    max_connection_age_grace_s: float = 0.0,
    max_metadata_bytes: int | None = None,
    max_connections: int | None = None,
    max_streams: int | None = None,
) -> Options:
    """Options of a server.

    Args:
        max_message_bytes: the largest message received, and sent unless the next says otherwise.
        max_sent_bytes: the largest message sent.
        reuse_port: let several servers of one machine bind the same port (SO_REUSEPORT).
        max_connection_idle_s: a connection without any call is closed after so long; clients open
            another one by themselves.
        max_connection_age_s: older connections take no new calls; clients then look the name up
            again, and find servers that are new. ``None``: they live as long as the client likes.
        max_connection_age_grace_s: when their running calls are cut off, after that.
        max_metadata_bytes: the largest headers of a call; ``None``: gRPC's own limit.
        max_connections: further ones are closed as soon as they are accepted. ``None``: any.
        max_streams: calls of one connection at a time; more wait at the client, or are refused
            where it did not know of the limit yet. ``None``: any.
    """
    limits: Options = []
    if max_connection_idle_s is not None:
        limits.append(("grpc.max_connection_idle_ms", int(max_connection_idle_s * 1000)))
    if max_connection_age_s is not None:
        limits += [
            ("grpc.max_connection_age_ms", int(max_connection_age_s * 1000)),
            ("grpc.max_connection_age_grace_ms", int(max_connection_age_grace_s * 1000)),
        ]
    if max_metadata_bytes is not None:
        # Between a soft limit and the absolute one gRPC refuses at random.
        limits += [
            ("grpc.max_metadata_size", max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", max_metadata_bytes),
        ]
    if max_connections is not None:
        limits.append(("grpc.max_allowed_incoming_connections", max_connections))
    if max_streams is not None:
        limits.append(("grpc.max_concurrent_streams", max_streams))
    return [
        *limits,
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_TIMEOUT_S * 1000)),
        *_common_options(max_message_bytes, max_sent_bytes),
        ("grpc.keepalive_permit_without_calls", 1),
        # Clients ping as often as above; without this they are cut off for too many pings.
        ("grpc.http2.min_ping_interval_without_data_ms", int(KEEPALIVE_TIME_S * 500)),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", int(reuse_port)),
    ]


def open_channel(
    address: str,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    *,
    tls: ChannelTls | None = None,
    options: Options | None = None,
) -> aio.Channel:
    """A channel to ``address`` (``host:port``) with a TCP connection of its own.

    Must be called in the running event loop that will use it.

    Args:
        max_message_bytes: the largest message sent or received.
        tls: unset: plaintext.
        options: more of them.
    """
    options = [*channel_options(max_message_bytes), *(options or [])]
    if tls is None:
        return aio.insecure_channel(address, options=options)
    return aio.secure_channel(address, tls.credentials(), options=[*options, *tls.options()])


def open_blocking_channel(
    address: str,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    *,
    tls: ChannelTls | None = None,
) -> grpc.Channel:
    """``open_channel`` for threads instead of an event loop."""
    options = channel_options(max_message_bytes)
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, tls.credentials(), options=[*options, *tls.options()])


def _common_options(max_message_bytes: int, max_sent_bytes: int | None = None) -> Options:
    return [
        ("grpc.keepalive_time_ms", int(KEEPALIVE_TIME_S * 1000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_send_message_length", max_sent_bytes or max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
    ]
