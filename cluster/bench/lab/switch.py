"""The lab's switch: joins the hosts' interfaces, each link with a delay of its own, or cut.

Run as a script by ``network.Network``, with the standard library alone so that it is small::

    python -I -S switch.py INTERFACE PID...

makes an Ethernet interface (TAP) named INTERFACE in the network namespace of each process and one
more in its own, then says ``ready``. Each line of standard input is a JSON list of links
``[from, to, delay_s]``, ports by number in that order; a delay of null cuts the link. Each line is
answered by ``ok``. It ends with its standard input, and the interfaces with it.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import json
import os
import select
import struct
import sys
import time

_TUNSETIFF = 0x400454CA
_IFF_TAP_NO_PI = 0x0002 | 0x1000
_CLONE_NEWNET = 0x40000000
_MAX_FRAME = 70_000
_BATCH = 64  # frames of one port before the next one's turn


def open_tap(name: str) -> int:
    """A new interface in this thread's network namespace; lives until the file is closed."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP_NO_PI))
    return file


def open_taps(name: str, pids: list[int]) -> list[int]:
    """One interface in each process's network namespace, and the last one here."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    taps = []
    for pid in pids:
        namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        _enter(libc, namespace)
        taps.append(open_tap(name))
        os.close(namespace)
    _enter(libc, home)
    os.close(home)
    return [*taps, open_tap(name)]


class Switch:
    """Learns which address is behind which port, and hands frames on."""

    def __init__(self, taps: list[int]) -> None:
        self._taps = taps
        self._links: dict[tuple[int, int], float | None] = {}
        self._port_of: dict[bytes, int] = {}  # by Ethernet address
        self._late: list[tuple[float, int, int, bytes]] = []
        self._numbers = itertools.count()

    def set_links(self, links: list[tuple[int, int, float | None]]) -> None:
        """Changes these; what is under way arrives as it would have."""
        self._links.update({(source, to): delay_s for source, to, delay_s in links})

    def take(self, port: int) -> None:
        """Reads what has come in."""
        for _ in range(_BATCH):
            try:
                frame = os.read(self._taps[port], _MAX_FRAME)
            except OSError:  # nothing more, or the interface is down
                return
            self._port_of[frame[6:12]] = port
            known = self._port_of.get(frame[:6])
            if known is not None:
                self._send(port, known, frame)
                continue
            for other in range(len(self._taps)):
                self._send(port, other, frame)

    def deliver(self) -> float | None:
        """Hands on what is due. Returns seconds until more is; ``None``: nothing is waiting."""
        while self._late and self._late[0][0] <= time.monotonic():
            _, _, to, frame = heapq.heappop(self._late)
            self._write(to, frame)
        return max(self._late[0][0] - time.monotonic(), 0.0) if self._late else None

    def _send(self, source: int, to: int, frame: bytes) -> None:
        delay_s = self._links.get((source, to), 0.0)
        if source == to or delay_s is None:
            return
        if delay_s == 0.0:
            self._write(to, frame)
            return
        due = time.monotonic() + delay_s
        heapq.heappush(self._late, (due, next(self._numbers), to, frame))

    def _write(self, to: int, frame: bytes) -> None:
        try:
            os.write(self._taps[to], frame)
        except OSError:
            return  # a full or absent interface loses frames, as a real one does


def _enter(libc: ctypes.CDLL, namespace: int) -> None:
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


def main() -> None:
    """Runs until standard input ends."""
    taps = open_taps(sys.argv[1], [int(pid) for pid in sys.argv[2:]])
    switch = Switch(taps)
    ports = {tap: port for port, tap in enumerate(taps)}
    poll = select.epoll()
    for file in (0, *taps):
        poll.register(file, select.EPOLLIN)
    print("ready", flush=True)
    while True:
        for file, _ in poll.poll(switch.deliver()):
            if file != 0:
                switch.take(ports[file])
                continue
            line = sys.stdin.readline()
            if not line:
                return
            switch.set_links(json.loads(line))
            print("ok", flush=True)


if __name__ == "__main__":
    main()
