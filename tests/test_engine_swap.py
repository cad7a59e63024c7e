"""An engine that goes over to other drafters while requests run."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config import ClusterConfig
from cluster.engine.draft_client import DraftResult, DraftRound
from cluster.engine.draft_engine import DraftEngine
from cluster.engine.draft_factory import build_draft_engine
from cluster.engine.local_drafter import LocalDraftClient
from cluster.engine.worker import ShardWorker
from cluster.request import Request, RequestOutput, SamplingParams
from tests.engine_law import (
    MAX_NUM_SEQS,
    NUM_PLAIN_TOKENS,
    NUM_TOKENS,
    PROMPT,
    method_settings,
    save_pair,
    target_law,
)
from tests.engine_tools import make_config, make_engine, run
from tests.law import law_p_value, shift_law
from tests.models import save_tiny_drafter, save_tiny_eagle3, save_tiny_target

MAX_TOKENS = 60
# What a proposal rests on (request, committed length), and its tokens.
Proposals = dict[tuple[str, int], tuple[int, ...]]


class RecordingClient(LocalDraftClient):
    """Keeps what its drafter has proposed."""

    def __init__(self, engine: DraftEngine) -> None:
        super().__init__(engine)
        self.engine = engine
        self.proposals: Proposals = {}

    def collect(self, handle: DraftRound, timeout_s: float) -> list[DraftResult]:
        results = super().collect(handle, timeout_s)
        for result in results:
            if result.proposal is not None:
                key = result.session.request_id, result.committed_length
                self.proposals[key] = result.proposal.draft_token_ids
        return results


class Swapping:
    """An engine of this process and what its actors would do with it."""

    def __init__(
        self, config: ClusterConfig, announce_port: Callable[[int], None] | None = None
    ) -> None:
        self._worker = ShardWorker(config, 0)
        if announce_port is not None:
            announce_port(self._worker.open_rendezvous("127.0.0.1"))
        self._worker.start("127.0.0.1", 0, 1)
        self.client = _client(config)
        self.engine = self._worker.build_engine(self.client)

    @property
    def num_hooks(self) -> int:
        shard = self._worker._shard
        assert shard is not None
        return sum(len(module._forward_hooks) for module in shard._base.modules())

    def stage(self, config: ClusterConfig) -> None:
        self._worker.stage_drafter(config)

    def close(self) -> None:
        self._worker.close()

    def swap(self, config: ClusterConfig) -> list[RequestOutput]:
        self.stage(config)
        self.client = _client(config)
        return self.engine.swap_drafter(config.speculative, self.client)


def _client(config: ClusterConfig) -> RecordingClient | None:
    return None if config.speculative is None else RecordingClient(build_draft_engine(config))


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClusterConfig]:
    """One target, with each kind of drafter; ``other`` is DSpark that reads other layers."""
    folder = tmp_path_factory.mktemp("models")
    target = save_tiny_target(folder / "target")
    drafters: dict[str, dict[str, Any] | None] = {
        "dspark": {"model": save_tiny_drafter(folder / "dspark", target)},
        "other": {
            "model": save_tiny_drafter(folder / "other", target, seed=2, target_layer_ids=[1, 2])
        },
        "eagle3": {
            "method": "eagle3",
            "model": save_tiny_eagle3(folder / "eagle3", target),
            "num_speculative_tokens": 3,
        },
        "draft_model": {
            "method": "draft_model",
            "model": save_tiny_target(folder / "draft_model", seed=3, num_hidden_layers=1),
            "num_speculative_tokens": 3,
        },
        "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1},
        "none": None,
    }
    return {
        name: make_config(target, page_size=4, speculative=speculative or {})
        for name, speculative in drafters.items()
    }


def make_requests(*, max_tokens: int = MAX_TOKENS) -> list[Request]:
    """Greedy, seeded and sampled ones, with prompts of one token to several pages."""
    kinds = {
        "greedy": SamplingParams(temperature=0.0, max_tokens=max_tokens),
        "seeded": SamplingParams(temperature=0.9, top_k=40, seed=5, max_tokens=max_tokens),
        "sampled": SamplingParams(temperature=0.9, top_p=0.9, max_tokens=max_tokens),
    }
    return [
        Request(
            request_id=f"{kind}{length}",
            prompt_token_ids=tuple(range(3, 3 + length)),
            sampling=params,
        )
        for kind, params in kinds.items()
        for length in (1, 6, 23)
    ]


@pytest.fixture(scope="module")
def expected(configs: dict[str, ClusterConfig]) -> dict[str, list[int]]:
    """Outputs that do not depend on chance."""
    done = run(make_engine(configs["none"]), make_requests())
    return {name: c.token_ids for name, c in done.items() if not name.startswith("sampled")}


def run_with_swaps(
    swapping: Swapping, swaps: dict[int, ClusterConfig], requests: list[Request]
) -> dict[str, list[int]]:
    """Serves all requests; ``swaps`` by number of output tokens. Returns every output."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    ended = set()

    def take(outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            assert output.error is None
            assert output.token_offset == len(tokens[output.request_id])
            tokens[output.request_id] += output.token_ids
            if output.is_last:
                ended.add(output.request_id)

    for request in requests:
        swapping.engine.add_request(request)
    due = sorted(swaps)
    while swapping.engine.has_work:
        take(swapping.engine.step())
        if due and sum(map(len, tokens.values())) >= due[0]:
            former = swapping.client
            take(swapping.swap(swaps[due.pop(0)]))
            swapping.engine.check()
            if former is not None:
                assert former.engine.num_sessions == 0
                former.engine.check_integrity()
    assert not due, "it ended before the last swap"
    assert ended == tokens.keys()
    swapping.engine.check()
    assert swapping.engine.load().kv_cache_usage == 0.0
    return tokens


CHAINS = [
    ["dspark", "ngram", "draft_model", "eagle3", "other"],
    ["ngram", "dspark", "none", "eagle3", "none"],
]


@pytest.mark.parametrize("chain", CHAINS, ids=" ".join)
def test_no_output_changes(
    chain: list[str], configs: dict[str, ClusterConfig], expected: dict[str, list[int]]
) -> None:
    swapping = Swapping(configs[chain[0]])
    clients = [swapping.client]
    swaps = {80 * number: configs[name] for number, name in enumerate(chain) if number > 0}
    swap = swapping.swap

    def recorded(config: ClusterConfig) -> list[RequestOutput]:
        outputs = swap(config)
        clients.append(swapping.client)
        return outputs

    swapping.swap = recorded  # type: ignore[method-assign]
    outputs = run_with_swaps(swapping, swaps, make_requests())
    assert {name: outputs[name] for name in expected} == expected
    assert all(len(token_ids) == MAX_TOKENS for token_ids in outputs.values())
    for name, client in zip(chain, clients, strict=True):
        assert (client is None) == (name == "none")
        assert client is None or client.proposals, f"{name} was never asked"


@pytest.mark.parametrize(
    ("former", "name"),
    [("dspark", "other"), ("ngram", "eagle3"), ("none", "other"), ("eagle3", "draft_model")],
)
def test_rounds_behind_a_swap_are_the_new_drafters_own(
    former: str, name: str, configs: dict[str, ClusterConfig]
) -> None:
    """What is proposed is what that drafter proposes where it was there from the beginning."""
    requests = [request for request in make_requests() if request.sampling.is_greedy]
    alone = Swapping(configs[name])
    run_with_swaps(alone, {}, requests)
    swapping = Swapping(configs[former])
    run_with_swaps(swapping, {40: configs[name]}, requests)
    assert alone.client is not None
    assert swapping.client is not None
    common = swapping.client.proposals.keys() & alone.client.proposals.keys()
    assert {key: swapping.client.proposals[key] for key in common} == {
        key: alone.client.proposals[key] for key in common
    }
    # All go on drafting; rounds rest on the same lengths where nothing is accepted.
    assert {request_id for request_id, _ in common} == {r.request_id for r in requests}
    assert len(common) > 60


def test_features_that_stay_valid_are_not_computed_again(
    configs: dict[str, ClusterConfig],
) -> None:
    config = configs["dspark"]
    assert config.speculative is not None
    fewer = config.speculative.model_copy(update={"num_speculative_tokens": 2})
    for changed, num_preemptions in ((fewer, 0), (configs["other"].speculative, 3)):
        swapping = Swapping(config)
        requests = make_requests()[:3]
        swap_to = config.model_copy(update={"speculative": changed})
        run_with_swaps(swapping, {40: swap_to}, requests)
        assert swapping.engine.load().num_preemptions == num_preemptions
        assert swapping.client is not None
        assert len(swapping.client.proposals) > 20


def test_nothing_is_caught_for_a_drafter_that_is_gone(configs: dict[str, ClusterConfig]) -> None:
    swapping = Swapping(configs["dspark"])
    swapping.swap(configs["other"])
    assert swapping.num_hooks == 2  # that many layers does it read
    swapping.swap(configs["none"])
    assert swapping.num_hooks == 0


def _follow(config: ClusterConfig, swap_to: ClusterConfig, pipes: list[Connection]) -> None:
    """The second of two pipeline stages: stages when it is told to, while it follows."""
    worker = ShardWorker(config, 1)
    worker.start("127.0.0.1", pipes[1].recv(), 1)

    def stage() -> None:
        pipes[1].recv()
        worker.stage_drafter(swap_to)
        pipes[1].send("staged")

    threading.Thread(target=stage, daemon=True).start()
    worker.follow()
    worker.close()


@pytest.mark.timeout(240)
def test_pipeline_stages_go_over_between_the_same_two_passes(
    configs: dict[str, ClusterConfig], expected: dict[str, list[int]]
) -> None:
    """Passes are under way when it comes, and the drafters read layers of both stages."""
    former, swap_to = (
        config.model_copy(
            update={"target": config.target.model_copy(update={"pipeline_parallel_size": 2})}
        )
        for config in (configs["dspark"], configs["eagle3"])
    )
    context = multiprocessing.get_context("spawn")
    pipes = list(context.Pipe())
    follower = context.Process(target=_follow, args=(former, swap_to, pipes), daemon=True)
    follower.start()
    swapping = Swapping(former, announce_port=pipes[0].send)
    stage, swap = swapping.stage, swapping.swap

    def stage_both(config: ClusterConfig) -> None:
        pipes[0].send("stage")
        stage(config)
        assert pipes[0].recv() == "staged"

    def swap_under_way(config: ClusterConfig) -> list[RequestOutput]:
        assert swapping.engine._in_flight
        return swap(config)

    swapping.stage = stage_both  # type: ignore[method-assign]
    swapping.swap = swap_under_way  # type: ignore[method-assign]
    outputs = run_with_swaps(swapping, {150: swap_to}, make_requests())
    assert {name: outputs[name] for name in expected} == expected
    assert swapping.client is not None
    assert len(swapping.client.proposals) > 60
    swapping.engine.close()
    follower.join(60)
    swapping.close()
    assert follower.exitcode == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_law_stays_the_targets(tmp_path: Path) -> None:
    """Requests of six tokens, sampled with rejection, and another drafter every third step."""
    target, dspark = save_pair(tmp_path)
    shape: dict[str, Any] = {
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": 4 * MAX_NUM_SEQS,
        "page_size": 4,
        "max_model_len": 16,
    }
    configs = [
        make_config(target, dspark, **shape),
        make_config(target, speculative=method_settings("eagle3", target, tmp_path), **shape),
    ]
    swapping = Swapping(configs[0])
    params = SamplingParams(temperature=0.9, top_k=5, max_tokens=NUM_PLAIN_TOKENS + NUM_TOKENS)
    num_samples, num_steps = 8 * MAX_NUM_SEQS, 0
    tokens = np.full((num_samples, params.max_tokens), -1)
    for first in range(0, num_samples, MAX_NUM_SEQS):
        for number in range(first, first + MAX_NUM_SEQS):
            swapping.engine.add_request(
                Request(request_id=str(number), prompt_token_ids=PROMPT, sampling=params)
            )
        while swapping.engine.has_work:
            outputs = swapping.engine.step()
            num_steps += 1
            if num_steps % 3 == 0:
                outputs += swapping.swap(configs[num_steps // 3 % 2])
            for output in outputs:
                end = output.token_offset + len(output.token_ids)
                tokens[int(output.request_id), output.token_offset : end] = output.token_ids
    stats = swapping.engine.load().stats
    assert stats.num_accepted_tokens > num_samples / 4
    assert stats.num_draft_tokens > 1.2 * stats.num_accepted_tokens
    law = target_law(target, params)
    assert law_p_value(tokens[:, NUM_PLAIN_TOKENS:], law) > 1e-3
    shifted = shift_law(tokens[:, NUM_PLAIN_TOKENS:], law, position=0, total_variation=0.05)
    assert law_p_value(shifted, law) < 1e-3
