"""The peer: its command, its processes, and what is refused before it starts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import cli
from cluster.bench.peer import PeerServer, PeerSettings, serve_command
from cluster.errors import ConfigError, DsparkError

FAKE_PEER = """#!{python}
import http.server, multiprocessing, os, signal, sys, time
if "--broken" in sys.argv or "--speculative-config" in sys.argv:
    print("ValueError: no such method")
    sys.exit(1)
port = int(sys.argv[sys.argv.index("--port") + 1])
def stay():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
child = multiprocessing.Process(target=stay)
child.start()
open(os.environ["FAKE_CHILD"], "w").write(str(child.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def peer(tmp_path: Path) -> PeerSettings:
    """A virtual environment whose Python is a server of nothing but its health."""
    bin_folder = tmp_path / "venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "vllm").touch()
    (bin_folder / "python").write_text(FAKE_PEER.format(python=sys.executable))
    (bin_folder / "python").chmod(0o755)
    return PeerSettings(venv=tmp_path / "venv", target="model")


def state_of(pid: int) -> str:
    """As in proc(5); Z where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_peer_stands_still_with_its_children_and_ends_with_them(
    peer: PeerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CHILD", str(tmp_path / "child"))
    server = PeerServer(peer, None, tmp_path / "peer.log")
    try:
        server.wait_ready(60)
        child = int((tmp_path / "child").read_text())
        server.pause()
        wait_for(lambda: state_of(child) == "T")
        server.resume()
        wait_for(lambda: state_of(child) == "S")
        server.wait_ready(10)
        server.pause()
    finally:
        server.close()
    wait_for(lambda: state_of(child) == "Z")


def test_a_peer_that_cannot_start_says_why(peer: PeerSettings, tmp_path: Path) -> None:
    server = PeerServer(peer, {"method": "magic"}, tmp_path / "peer.log")
    try:
        with pytest.raises(DsparkError, match=r"ValueError: no such method.*peer\.log"):
            server.wait_ready(60)
    finally:
        server.close()


def test_a_peer_s_command_and_environment(
    peer: PeerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = serve_command(peer, {"method": "ngram"}, 1234)
    assert command[command.index("--port") + 1] == "1234"
    assert json.loads(command[command.index("--speculative-config") + 1]) == {"method": "ngram"}
    assert "--speculative-config" not in serve_command(peer, None, 1234)
    environment = peer.environment()
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    assert "OMP_NUM_THREADS" not in environment
    assert "LD_PRELOAD" not in environment or "iomp" not in environment["LD_PRELOAD"]
    library = peer.venv / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    assert peer.environment()["LD_PRELOAD"] == str(library)


def test_a_virtual_environment_without_the_peer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--peer-venv"):
        PeerServer(PeerSettings(venv=tmp_path, target="model"), None, tmp_path / "peer.log")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed", "--peer-venv", "{tmp}"], "--peer-venv"),
        (["speed", "--peer-venv", "{venv}", "--cores", "one"], "--cores"),
        (["speed", "--peer-venv", "{venv}", "--cores", "4095"], "4095"),
        (["speed", "--peer-venv", "{venv}", "--concurrency", "2"], "--concurrency"),
        (["load", "--trace", "{tmp}/none.csv"], "none.csv"),
        (["load", "--trace", "{tmp}/none.csv", "--rate", "0"], "--rate"),
        (["load", "--trace", "{tmp}/none.csv", "--context", "2"], "--context"),
        (["load", "--server", "ftp://there"], "--server"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    arguments: list[str],
    message: str,
    peer: PeerSettings,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = [text.format(tmp=tmp_path, venv=peer.venv) for text in arguments]
    assert cli.main(["bench", *given, "--json"]) in (1, 2)
    assert message in capfd.readouterr().err
