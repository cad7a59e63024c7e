"""``dspark swap``: what it refuses, and every method in turn on a real cluster under load."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import cli
from cluster.actors.drafter_choice import DrafterChoice, to_user_config
from cluster.cli import state
from cluster.cli.swap import check_same_cluster
from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.rpc.client import Client
from tests.engine_tools import ALWAYS
from tests.models import DRAFTER, TARGET, save_tiny_drafter, save_tiny_eagle3
from tests.test_cli import _dspark, _json

PROMPT = "def main(arguments):\n"
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
SEEDED: dict[str, Any] = {"temperature": 0.8, "seed": 7, "ignore_eos": True}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "ignore_eos": True}
STREAM_TOKENS = 120


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "state"
    monkeypatch.setenv("DSPARK_STATE_DIR", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return folder


def write_config(path: Path, speculative: dict[str, Any] | None, **target: Any) -> str:
    """A cluster of two shards and one drafter; returns the file's path."""
    args = {
        "target": {
            "model": TARGET,
            "tensor_parallel_size": 2,
            "dtype": "float32",
            "num_threads": 1,
            "max_model_len": 1024,
            "kv_cache_memory_mb": 32,
            "enforce_eager": True,
            **target,
        },
        "speculative": None if speculative is None else {**ALWAYS, **speculative},
        "drafter": {"dtype": "float32", "enforce_eager": True},
        "router": {"port": 0},
        "drain_timeout_s": 5,
    }
    application = {
        "name": "dspark",
        "import_path": "cluster.actors.app:build",
        "route_prefix": None,
        "args": args,
    }
    path.write_text(json.dumps({"proxy_location": "Disabled", "applications": [application]}))
    return str(path)


# ------------------------------------------------------------------------------------ refusals


def test_without_a_cluster_it_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["swap", write_config(tmp_path / "c.yaml", {"model": DRAFTER})]) == 1
    assert "no cluster" in capsys.readouterr().err


def test_a_bad_drafter_is_refused_before_anything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.yaml", {"method": "dflash", "model": DRAFTER})
    assert cli.main(["swap", config]) == 2
    assert "speculative.method: is dflash" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"target": {"model": "m", "max_num_seqs": 3}}, "target.max_num_seqs"),
        ({"drafter": {"num_replicas": 2}}, "drafter.num_replicas"),
        ({"served_model_name": "other"}, "served_model_name"),
    ],
)
def test_nothing_but_the_drafter_may_differ(changes: dict[str, Any], key: str) -> None:
    running = {"target": {"model": "m"}, "speculative": {"model": "d"}}
    given = {**running, **changes, "speculative": {"model": "other"}}
    check_same_cluster(ClusterConfig.parse(running), ClusterConfig.parse(running))
    with pytest.raises(ConfigError) as caught:
        check_same_cluster(ClusterConfig.parse(running), ClusterConfig.parse(given))
    assert caught.value.key == key


# --------------------------------------------------------------------- one after the other


class Part:
    """What a replica does with its choice: tells it which drafters may be used, and which not."""

    def __init__(self) -> None:
        self.used: list[str | None] = []
        self.ready = {"a", "b"}
        self.broken = {"broken"}

    async def use(self, config: ClusterConfig) -> bool:
        model = config.speculative.model if config.speculative is not None else None
        if model in self.broken:
            raise ConfigError("speculative.model", "is broken")
        if model is not None and model not in self.ready:
            return False
        self.used.append(model)
        return True


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 120.0
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


async def wait_for(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_the_last_wish_wins_and_a_broken_one_changes_nothing() -> None:
    config = ClusterConfig.parse({"target": {"model": "m"}, "speculative": {"model": "a"}})
    part = Part()
    choice = DrafterChoice(config, part.use)
    running = asyncio.create_task(choice.run())

    def want(model: str) -> None:
        speculative = ClusterConfig.parse(
            {"target": {"model": "m"}, "speculative": {"model": model}}
        ).speculative
        choice.want(to_user_config(speculative))

    def in_use() -> str | None:
        used = choice.state().in_use
        return None if used is None else used.model

    want("late")  # nobody is ready for it
    await asyncio.sleep(0.05)
    assert in_use() == "a"
    want("b")
    await wait_for(lambda: in_use() == "b")
    want("broken")
    await wait_for(lambda: choice.state().error)
    assert in_use() == "b"
    assert choice.state().error == "ConfigError: speculative.model: is broken"
    want("late")
    assert choice.state().error == ""
    part.ready.add("late")
    await wait_for(lambda: in_use() == "late")
    choice.want({"speculative": None})
    await wait_for(lambda: in_use() is None)
    choice.want({"speculative": {"method": "guess"}})  # by hand; Serve must not see it raise
    await wait_for(lambda: "speculative.method" in choice.state().error)
    assert part.used == ["b", "late", None]
    running.cancel()


# ----------------------------------------------------------------------------- on a real cluster


class Streams:
    """Completions that follow each other while the block lasts; each is compared at its end."""

    def __init__(self, client: Client, expected: dict[str, tuple[int, ...]]) -> None:
        self._client = client
        self._expected = expected
        self._ending = threading.Event()
        self.num_complete = 0
        self.failures: list[str] = []
        self._threads = [
            threading.Thread(target=self._read, args=(name, sampling))
            for name, sampling in (("greedy", GREEDY), ("seeded", SEEDED), ("sampled", SAMPLED))
        ]

    def __enter__(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def _read(self, name: str, sampling: dict[str, Any]) -> None:
        while not self._ending.is_set():
            tokens: list[int] = []
            try:
                for chunk in self._client.generate(PROMPT, max_tokens=STREAM_TOKENS, **sampling):
                    tokens += chunk.token_ids
            except Exception as error:
                self.failures.append(f"{name}: {error!r}")
                return
            if len(tokens) != STREAM_TOKENS:
                self.failures.append(f"{name}: {len(tokens)} tokens")
            elif name in self._expected and tuple(tokens) != self._expected[name]:
                self.failures.append(f"{name}: another output")
            self.num_complete += 1


@pytest.fixture
def drafters(tmp_path: Path) -> dict[str, dict[str, Any] | None]:
    """A way to draft of each method, for the trained target."""
    flash = {"markov_rank": 0, "confidence_head_with_markov": False}
    return {
        "ngram": {"method": "ngram", "num_speculative_tokens": 4},
        "eagle3": {
            "method": "eagle3",
            "model": save_tiny_eagle3(tmp_path / "eagle3", TARGET, tie_word_embeddings=False),
            "num_speculative_tokens": 2,
        },
        "none": None,
        "dflash": {
            "method": "dflash",
            "model": save_tiny_drafter(tmp_path / "dflash", TARGET, **flash),
        },
        "draft_model": {"method": "draft_model", "model": TARGET, "num_speculative_tokens": 3},
        "dspark": {"method": "dspark", "model": DRAFTER},
    }


@pytest.fixture
def running(tmp_path: Path, state_dir: Path) -> Iterator[dict[str, Any]]:
    config = write_config(tmp_path / "up.yaml", {"method": "dspark", "model": DRAFTER})
    yield _json("up", config, "--detach")
    if state.read_state() is not None:
        assert _dspark("down").returncode == 0


@pytest.mark.usefixtures("whole_streams")
@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_method_in_turn_while_requests_stream(
    drafters: dict[str, dict[str, Any] | None], running: dict[str, Any], tmp_path: Path
) -> None:
    with Client(running["address"]) as client:

        def parts() -> list[Any]:
            replica = client.status().replicas[0]
            return [replica.replica_id, *(shard.pid for shard in replica.shards)]

        def complete(**options: Any) -> Any:
            return client.complete(PROMPT, max_tokens=STREAM_TOKENS, **options)[0]

        expected = {
            "greedy": complete(speculation=False, **GREEDY).token_ids,
            "seeded": complete(speculation=False, **SEEDED).token_ids,
        }
        started = parts()
        with Streams(client, expected) as streams:
            for name, speculative in drafters.items():
                before = streams.num_complete
                config = write_config(tmp_path / f"{name}.yaml", speculative)
                swapped = _json("swap", config)
                assert swapped["method"] == (None if speculative is None else name)
                shown = "" if speculative is None else name
                wait_until(
                    lambda: client.status().replicas[0].speculation_method == shown  # noqa: B023
                )
                answer = complete(**GREEDY)
                assert answer.token_ids == expected["greedy"], name
                assert (answer.usage.speculation.num_drafts == 0) == (speculative is None), name
                wait_until(lambda: streams.num_complete > before + 1 or streams.failures)  # noqa: B023
            held = state.read_state()
            assert held is not None
            assert held.config == str(tmp_path / "dspark.yaml")

            # What no part can use changes nothing.
            missing = {"method": "dspark", "model": "nobody/nothing"}
            refused = _dspark("swap", write_config(tmp_path / "missing.yaml", missing))
            assert refused.returncode == 1
            assert "nobody/nothing" in refused.stderr
            other = write_config(tmp_path / "other.yaml", drafters["ngram"], max_num_seqs=8)
            refused = _dspark("swap", other)
            assert refused.returncode == 2
            assert "target.max_num_seqs" in refused.stderr
            answer = complete(**GREEDY)
            assert answer.usage.speculation.acceptance_length > 2  # the trained one, as before
        assert streams.failures == []
        assert parts() == started, "something was started anew"
