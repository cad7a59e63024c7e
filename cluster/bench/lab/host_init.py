"""The first process of a host: mounts what the host sees, then buries its dead.

Run as a script by ``host.Host`` in namespaces of its own, with the standard library alone so that
it is small. The first line of standard input is a JSON object with the host's ``name``, ``binds``
([source, target] folders or files) and ``tmpfs`` (folders). Says ``ready``, and ends with its
standard input; the system then kills everything else on the host.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import socket
import sys

_MS_BIND = 4096
_POLL_S = 0.2


def mount(source: str, target: str, kind: str, flags: int = 0) -> None:
    """Raises OSError where the system refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), flags, None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot mount {target}: {os.strerror(number)}")


def bury() -> None:
    """Takes note of every child that has ended; orphans of the whole host come here."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def main() -> None:
    """Runs until standard input ends."""
    settings = json.loads(sys.stdin.readline())
    socket.sethostname(settings["name"])
    for source, target in settings["binds"]:
        mount(source, target, "none", _MS_BIND)
    for target in settings["tmpfs"]:
        mount("tmpfs", target, "tmpfs")
    print("ready", flush=True)
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], _POLL_S)
        bury()
        if readable and not sys.stdin.readline():
            return


if __name__ == "__main__":
    main()
