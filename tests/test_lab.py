"""The lab: hosts with names, addresses and processes of their own, and links that break."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.bench.lab.network import Network

pytestmark = pytest.mark.netlab

_PORT = 8000
_ECHO = f"""
import socketserver
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line)
socketserver.ThreadingTCPServer(("0.0.0.0", {_PORT}), Echo).serve_forever()
"""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(["alpha", "bravo", "charlie"]) as network:
        for host in network.hosts.values():
            host.start([sys.executable, "-c", _ECHO], stderr=subprocess.DEVNULL)
        for host in network.hosts.values():
            _wait_for_echo(host.address)
        yield network
    assert not network.folder.exists()
    assert all(not Path(f"/proc/{host.pid}").exists() for host in network.hosts.values())


def _wait_for_echo(address: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            return socket.create_connection((address, _PORT), timeout=1).close()
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"nothing answers at {address}")


def _round_trip_s(connection: socket.socket) -> float:
    start = time.monotonic()
    connection.sendall(b"hello\n")
    assert connection.recv(64) == b"hello\n"
    return time.monotonic() - start


def _can_reach(network: Network, source: str, to: str) -> bool:
    """Whether a host can connect to another."""
    code = f"import socket; socket.create_connection(({to!r}, {_PORT}), timeout=0.5)"
    process = network.hosts[source].start([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    return process.wait() == 0


def test_hosts_have_names_and_processes_of_their_own(network: Network) -> None:
    name = "import os, socket; print(socket.gethostname(), os.getpid() < 100)"
    for host in network.hosts.values():
        process = host.start([sys.executable, "-c", name], stdout=subprocess.PIPE, text=True)
        assert process.communicate()[0].split() == [host.name, "True"]
        assert len(host.processes("socketserver")) == 1


def test_hosts_reach_each_other_by_name(network: Network) -> None:
    assert _can_reach(network, "alpha", "bravo")
    assert _can_reach(network, "charlie", "alpha")
    assert not _can_reach(network, "alpha", "delta")


@pytest.mark.timed
def test_delay_is_of_each_way(network: Network) -> None:
    bravo = network.hosts["bravo"]
    with socket.create_connection((bravo.address, _PORT), timeout=5) as connection:
        assert _round_trip_s(connection) < 0.05
        network.delay(0.1, "bravo")
        assert 0.2 <= _round_trip_s(connection) < 0.3
        network.mend()
        assert _round_trip_s(connection) < 0.05


def test_a_cut_host_is_silent_and_comes_back(network: Network) -> None:
    bravo = network.hosts["bravo"]
    with socket.create_connection((bravo.address, _PORT), timeout=0.5) as connection:
        network.cut("bravo")
        connection.sendall(b"early\n")
        with pytest.raises(TimeoutError):
            connection.recv(64)
        assert not _can_reach(network, "alpha", "bravo")
        assert _can_reach(network, "alpha", "charlie")
        network.heal("bravo")
        connection.settimeout(10)
        assert connection.recv(64) == b"early\n"  # TCP sends again what was lost
    assert _can_reach(network, "alpha", "bravo")


def test_a_pair_is_cut(network: Network) -> None:
    network.cut("alpha", "bravo")
    assert not _can_reach(network, "alpha", "bravo")
    assert not _can_reach(network, "bravo", "alpha")
    assert _can_reach(network, "charlie", "bravo")
    network.heal("bravo", "alpha")
    assert _can_reach(network, "alpha", "bravo")


def test_signals_reach_one_host_s_processes(network: Network) -> None:
    alpha, bravo = network.hosts["alpha"], network.hosts["bravo"]
    for host in (alpha, bravo):
        host.start(["sleep", "1000"])
    deadline = time.monotonic() + 10
    while not (alpha.processes("sleep 1000") and bravo.processes("sleep 1000")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(alpha.send(signal.SIGKILL, "sleep 1000")) == 1
    while alpha.processes("sleep 1000"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(bravo.processes("sleep 1000")) == 1


def test_hosts_end_with_the_process_that_made_them() -> None:
    code = """
import os, signal
from cluster.bench.lab.network import Network
with Network(["solo"]) as network:
    print(network.hosts["solo"].pid, network.folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid, folder = process.stdout.split()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the host lives on"
        time.sleep(0.05)
    shutil.rmtree(folder)
