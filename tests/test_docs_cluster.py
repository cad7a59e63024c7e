"""What the pages say to type at a cluster, typed at one that README commands start and stop."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.bench import served_conversations
from cluster.cli.state import read_state
from tests.doc_runs import Here, fill_folder, plan_of, type_here, typed
from tests.doc_tools import PAGES, ROOT, blocks_of, commands, commands_of

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

README = {
    shlex.join(command.words[:2]).replace(".venv/bin/", ""): command.words
    for command in commands_of(ROOT / "README.md")
    if not command.is_inline
}
CLIENTS = [
    pytest.param(text, id=f"{page.relative_to(ROOT)}")
    for page in PAGES
    for language, text in blocks_of(page)
    if language == "python" and "127.0.0.1" in text
]


def _typed_here() -> dict[tuple[str, ...], Here]:
    found: dict[tuple[str, ...], Here] = {}
    for command in commands():
        plan = plan_of(command)
        if isinstance(plan, Here) and plan.on_cluster:
            found.setdefault(typed(command), plan)
    return found


def run(words: tuple[str, ...], folder: Path) -> str:
    """What a command of the README prints there."""
    first = words[0].replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    done = subprocess.run(
        [first, *words[1:]], cwd=folder, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A reader's, whose `dspark up --detach` has started a cluster."""
    for port in (8000, 50051):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                pytest.skip(f"port {port} of deployments/local.yaml is taken on this machine")
    folder = tmp_path_factory.mktemp("reader")
    fill_folder(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSPARK_STATE_DIR", str(folder / "state"))
        patch.delenv("RAY_ADDRESS", raising=False)
        assert "is ready" in run(README["dspark up"], folder)
        yield folder
        if read_state() is not None:
            subprocess.run([sys.executable, "-m", "cluster.cli", "down"], check=False)


@pytest.mark.parametrize("code", CLIENTS)
def test_a_client_on_a_page_says_what_the_command_says(code: str, folder: Path) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    # Both are greedy, and of one prompt.
    assert printed.getvalue().split() == run(README["dspark generate"], folder).split()


@pytest.mark.parametrize(
    ("words", "plan"),
    [pytest.param(*item, id=shlex.join(item[0])) for item in _typed_here().items()],
)
def test_a_command_does_on_a_cluster_what_its_page_says(
    words: tuple[str, ...], plan: Here, folder: Path
) -> None:
    if shutil.which(words[0]) is None and words[0] == "curl":
        pytest.skip("no curl")
    type_here(words, plan, folder)


def test_conversations_go_on_at_a_cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dspark bench router --cluster`, which would start one for every run."""
    state = read_state()
    assert state is not None
    started = contextlib.nullcontext(SimpleNamespace(address=state.address))
    monkeypatch.setattr(served_conversations, "OwnCluster", lambda *_: started)
    shape = replace(served_conversations._SHAPE, num_conversations=4)
    monkeypatch.setattr(served_conversations, "_SHAPE", shape)
    words = ("dspark", "bench", "router", "--cluster", "--runs", "1")
    # Nothing is chosen between, and the second policy finds what the first has left.
    type_here(words, Here("hit_rate_ratio prefix random", has_bar=True), folder)


def test_a_newcomer_streams_text_in_three_commands(folder: Path) -> None:
    """After `make install`, and `up`, with which the cluster here has begun; then the last one."""
    names = list(README)
    start = names.index("make install")
    stream = "python docs/examples/openai_stream.py"
    assert names[start:][:3] == ["make install", "dspark up", stream]
    text = run(README[stream], folder)
    assert len(text) > 40
    with urllib.request.urlopen("http://127.0.0.1:8000/console/state", timeout=30) as answer:
        state = json.load(answer)
    assert [router["address"] for router in state["routers"]] == ["127.0.0.1:50051"]
    assert [router["router_id"] for router in state["routers"]] == [state["router_id"]]
    assert state["replicas"][0]["num_output_tokens"] > 0
    # The first stream is greedy, and so is this.
    assert run(README["dspark generate"], folder).split() == text.split()
    assert "shard 1" in run(README["dspark status"], folder)
    assert "stopped" in run(README["dspark down"], folder)
    assert read_state() is None
