"""Where Ray Serve's proxies serve HTTP, and waiting for them."""

from __future__ import annotations

import socket
import ssl
import time
import urllib.error
import urllib.request
from typing import Any

from cluster.errors import ClusterStateError, ConfigError

_DEFAULT_HOST = "127.0.0.1"
_DEFAULT_PORT = 8000  # Ray Serve's own
_ANY_ADDRESS = ("0.0.0.0", "::")
_POLL_S = 0.1
_TIMEOUT_S = 2.0


def http_url(document: dict[str, Any]) -> str | None:
    """``http://HOST:PORT`` of a Serve configuration, as it is reached on a node with a proxy.

    ``None`` where it has no proxies, or the application no route.
    """
    application = document["applications"][0]
    prefix = application.get("route_prefix", "/")
    if document.get("proxy_location") == "Disabled" or prefix is None:
        return None
    options = document.get("http_options") or {}
    host, port = _host_and_port(document)
    host = _DEFAULT_HOST if host in _ANY_ADDRESS else host
    scheme = "https" if options.get("ssl_certfile") else "http"
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}:{port}{str(prefix).rstrip('/')}"


def check_port(document: dict[str, Any]) -> None:
    """Makes sure that a proxy here could listen. Raises: ConfigError: the port is taken."""
    if http_url(document) is None:
        return
    host, port = _host_and_port(document)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                "http_options.port", f"cannot listen on {host}:{port}: {error.strerror}"
            ) from None


def wait_http(url: str, deadline: float) -> None:
    """Waits until a proxy answers for a router that can serve.

    Args:
        deadline: a ``time.monotonic()`` value.

    Raises:
        ClusterStateError: none does by then.
    """
    # Whose certificate it is does not matter here: nothing is told, and nothing believed.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    answer = "no answer"
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=_TIMEOUT_S, context=context):
                return
        except urllib.error.HTTPError as error:
            answer = f"{error.code} {error.reason}"
        except OSError as error:
            answer = str(error)
        time.sleep(_POLL_S)
    raise ClusterStateError(f"{url} does not serve: {answer}")


def _host_and_port(document: dict[str, Any]) -> tuple[str, int]:
    options = document.get("http_options") or {}
    return options.get("host") or _DEFAULT_HOST, int(options.get("port") or _DEFAULT_PORT)
