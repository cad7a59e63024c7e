"""The lab: hosts on one machine, joined by links that can be slow or cut."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.bench.lab.host import Host
from cluster.errors import DsparkError

_SWITCH = Path(__file__).with_name("switch.py")
# RFC 2544 sets these addresses aside for tests of networks.
_SUBNET = "198.18.{lab}.{host}"
_NUM_LABS = 250
_OUTSIDE = 254
_MTU = "9000"
_RAY_FOLDER = "ray"


def why_unavailable() -> str | None:
    """Why this machine cannot have a lab; ``None``: it can. Makes a host to see."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "not running as root"
    for command in ("ip", "unshare", "nsenter"):
        if shutil.which(command) is None:
            return f"no `{command}` command"
    if not Path("/dev/net/tun").exists():
        return "no /dev/net/tun for the hosts' interfaces"
    try:  # seeing commands is not enough: containers often forbid what they do
        Host("probe", "").close()
    except DsparkError as error:
        return str(error)
    return None


class Network:
    """Hosts, each of which can reach the others and this machine, until links are broken.

    Guarantees: nothing of it outlives the ``with`` block, or this process however it ends. A cut
    link loses what is sent, without a word to either end.

    Args:
        names: of the hosts.

    Attributes:
        hosts: by name, in the order given.
        folder: what all hosts see alike; removed at the end.
        ray_folder: a folder inside that is another one on each host.

    Raises:
        DsparkError: this machine cannot have one (``why_unavailable``).
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.hosts: dict[str, Host] = {}
        # Sockets live below it, and their paths may have about 100 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="dspark-lab-", dir="/tmp"))
        self.ray_folder = self.folder / _RAY_FOLDER
        self._names = list(names)
        self._switch: subprocess.Popen[str] | None = None
        self._cut: set[frozenset[str]] = set()
        self._delays: dict[frozenset[str], float] = {}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def host_folder(self, name: str) -> Path:
        """The host's own ``ray_folder``, as this machine sees it."""
        return self.folder / f"on-{name}"

    def cut(self, host: str, other: str | None = None) -> None:
        """Cuts a host off from ``other``, or from all and this machine."""
        self._cut |= self._links_of(host, other)
        self._apply()

    def heal(self, host: str, other: str | None = None) -> None:
        """Undoes ``cut`` with the same arguments."""
        self._cut -= self._links_of(host, other)
        self._apply()

    def delay(self, seconds: float, host: str, other: str | None = None) -> None:
        """Makes what travels between a host and ``other``, or all and this machine, take longer.

        Args:
            seconds: one way; 0: as fast as it goes.
        """
        for link in self._links_of(host, other):
            self._delays[link] = seconds
        self._apply()

    def mend(self) -> None:
        """Every link is whole, and fast, again."""
        self._cut.clear()
        self._delays.clear()
        self._apply()

    def _start(self) -> None:
        self.ray_folder.mkdir()
        entries = self.folder / "hosts"
        for lab in range(_NUM_LABS):
            interface = f"dspark-lab{lab}"
            if not Path("/sys/class/net", interface).exists():
                break
        addresses = {
            name: _SUBNET.format(lab=lab, host=number)
            for number, name in enumerate(self._names, start=1)
        }
        lines = ["127.0.0.1 localhost", *(f"{ip} {name}" for name, ip in addresses.items())]
        entries.write_text("\n".join(lines) + "\n")
        for name, address in addresses.items():
            own = self.host_folder(name)
            own.mkdir()
            binds = [(entries, Path("/etc/hosts")), (own, self.ray_folder)]
            self.hosts[name] = Host(name, address, binds)
        self._start_switch(interface)
        for name, host in self.hosts.items():
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "address", "add", f"{addresses[name]}/24", "dev", interface)
            host.run("ip", "link", "set", interface, "mtu", _MTU, "up")
        outside = f"{_SUBNET.format(lab=lab, host=_OUTSIDE)}/24"
        subprocess.run(["ip", "address", "add", outside, "dev", interface], check=True)
        subprocess.run(["ip", "link", "set", interface, "mtu", _MTU, "up"], check=True)

    def _start_switch(self, interface: str) -> None:
        pids = [str(host.pid) for host in self.hosts.values()]
        self._switch = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SWITCH), interface, *pids],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("ready")

    def _stop(self) -> None:
        for host in self.hosts.values():
            host.close()
        if self._switch is not None:
            self._switch.kill()
            self._switch.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _links_of(self, host: str, other: str | None) -> set[frozenset[str]]:
        others = {*self._names, ""} - {host} if other is None else {other}
        return {frozenset((host, name)) for name in others}

    def _apply(self) -> None:
        links = []
        ports = {name: port for port, name in enumerate([*self._names, ""])}
        for source, to in itertools.permutations(ports, 2):
            link = frozenset((source, to))
            delay_s = None if link in self._cut else self._delays.get(link, 0.0)
            links.append((ports[source], ports[to], delay_s))
        if self._switch is None or self._switch.stdin is None:
            raise DsparkError("the lab does not run")
        self._switch.stdin.write(json.dumps(links) + "\n")
        self._switch.stdin.flush()
        self._expect("ok")

    def _expect(self, word: str) -> None:
        stdout = self._switch.stdout if self._switch is not None else None
        answer = stdout.readline().strip() if stdout is not None else ""
        if answer != word:
            raise DsparkError("the lab's switch has ended")
