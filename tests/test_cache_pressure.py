"""Many requests that want far more cache than there is, as in a trace of a production service."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.bench.arrival_trace import Arrival, read_trace, scale_lengths
from cluster.engine.pages import PagePool
from cluster.request import Request, SamplingParams
from tests.engine_tools import make_config, make_engine, run
from tests.models import save_tiny_drafter, save_tiny_target
from tests.test_engine_cache import judge_all

PAGE_SIZE = 16


def make_requests(arrivals: list[Arrival]) -> list[Request]:
    """Every third prompt begins as others do; greedy and seeded in turn."""
    random = np.random.default_rng(3)
    common = random.integers(0, 96, 10_000)
    requests = []
    for number, arrival in enumerate(arrivals):
        length = arrival.num_prompt_tokens
        shared = length // 2 if number % 3 == 0 else 0
        prompt = (*common[:shared], *random.integers(0, 96, length - shared))
        requests.append(
            Request(
                request_id=str(number),
                prompt_token_ids=tuple(int(token_id) for token_id in prompt),
                sampling=SamplingParams(
                    temperature=0.8 * (number % 2),
                    seed=number if number % 2 else None,
                    max_tokens=arrival.num_output_tokens,
                ),
            )
        )
    return requests


def check_a_quarter_is_enough(
    folder: Path, arrivals: list[Arrival], *, context: int, speculate: bool
) -> int:
    """Serves all at once with all the pages that they want, and with a quarter of them.

    Returns:
        How often a request was preempted.
    """
    target = save_tiny_target(folder / "target", max_position_embeddings=context)
    drafter = save_tiny_drafter(folder / "drafter", target) if speculate else None
    requests = make_requests(scale_lengths(arrivals, context))
    lengths = [len(r.prompt_token_ids) + r.sampling.max_tokens for r in requests]
    wanted = sum(PagePool(2, PAGE_SIZE).pages_for(length) for length in lengths)
    num_preemptions = 0
    outputs = {}
    for num_pages in (wanted, wanted // 4):
        config = make_config(
            target,
            drafter,
            page_size=PAGE_SIZE,
            num_pages=1 + num_pages,
            max_num_seqs=len(requests),
            max_num_batched_tokens=max(512, 8 * len(requests)),
        )
        engine = make_engine(config)
        done = run(engine, requests)  # which checks that no page is leaked
        for request in requests:
            completion = done[request.request_id]
            assert completion.error is None
            assert len(completion.token_ids) == request.sampling.max_tokens
        outputs[num_pages] = done
        load = engine.load()
        assert (load.prefix_cache.num_evicted_pages > 0) == (num_pages < wanted)
        num_preemptions += load.num_preemptions
        assert (load.stats.num_drafts > 0) == speculate
    ample, tight = outputs[wanted], outputs[wanted // 4]
    # The last bits of logits depend on the batch: where they decide, both outputs must be right.
    others = [
        request
        for request in requests
        if ample[request.request_id].token_ids != tight[request.request_id].token_ids
    ]
    assert len(others) <= len(requests) // 10
    for done in (ample, tight):
        assert judge_all(target, others, done).num_mismatches == 0
    return num_preemptions


@pytest.mark.parametrize(
    "speculate", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "speculative"]
)
def test_with_a_quarter_of_the_cache_all_finish_as_with_all_of_it(
    tmp_path: Path, speculate: bool
) -> None:
    random = np.random.default_rng(1)
    prompts, outputs = random.integers(2, 50, 24), random.integers(60, 100, 24)
    arrivals = [Arrival(0.0, int(p), int(o)) for p, o in zip(prompts, outputs, strict=True)]
    assert check_a_quarter_is_enough(tmp_path, arrivals, context=256, speculate=speculate) > 2


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_requests", [100, pytest.param(500, marks=pytest.mark.full)])
@pytest.mark.parametrize("speculate", [False, True], ids=["plain", "speculative"])
def test_requests_of_the_azure_conversation_trace(
    tmp_path: Path, shared_dir: Path, speculate: bool, num_requests: int
) -> None:
    path = shared_dir / "data" / "traces" / "azure_conv.csv"
    arrivals = read_trace(str(path), num_requests)
    check_a_quarter_is_enough(tmp_path, arrivals, context=1024, speculate=speculate)
