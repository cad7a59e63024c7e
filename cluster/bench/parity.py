"""Suite ``parity``: are our outputs what plain transformers says? (DESIGN.md, rule 9)

Held-out prompts of mixed length run concurrently, greedy and seeded, with speculation; every output
is teacher-forced through plain transformers, and the seeded ones are also produced without
speculation. Without an address the engine and the drafter run in this process; with it, the
prompts go over gRPC to the running cluster, which must serve the same checkpoint in float32.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from cluster.bench.judge import Judgement, judge
from cluster.bench.local_engine import build_local_engine, local_config, run_together
from cluster.bench.report import Report
from cluster.engine.target_config import load_tokenizer
from cluster.request import Request, SamplingParams, SpeculationMode, SpeculationParams
from cluster.rpc.client import AsyncClient
from cluster.training.corpus import load_documents

PROMPT_LENGTHS = (4, 400)

Complete = Callable[[list[Request]], dict[str, list[int]]]


def run(
    *,
    target: str,
    drafter: str,
    num_prompts: int,
    max_tokens: int,
    address: str | None = None,
    device: str = "cpu",
) -> Report:
    """Runs the suite; ``address`` names a running cluster, else the engine is in this process, on
    ``device``."""
    tokenizer = load_tokenizer(target)
    prompts = heldout_prompts(tokenizer, num_prompts)
    complete: Complete
    if address:
        complete = _RemoteCompleter(address)
    else:
        config = local_config(target, {"method": "dspark", "model": drafter}, device=device)
        complete = partial(run_together, build_local_engine(config, seed=0))
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    on = SpeculationParams()
    off = SpeculationParams(mode=SpeculationMode.OFF)
    greedy_requests = _requests(prompts, lambda _: greedy, on)
    seeded_requests = _requests(
        prompts,
        lambda i: SamplingParams(temperature=0.8, seed=i, max_tokens=max_tokens),
        on,
    )
    greedy_outputs = complete(greedy_requests)
    seeded_outputs = complete(seeded_requests)
    plain_outputs = complete(_requests(prompts, lambda i: seeded_requests[i].sampling, off))
    reference = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    verdict = Judgement()
    for requests, outputs in (
        (greedy_requests, greedy_outputs),
        (seeded_requests, seeded_outputs),
        (seeded_requests, plain_outputs),
    ):
        for request in requests:
            verdict += judge(
                reference,
                prompt_token_ids=list(request.prompt_token_ids),
                output_token_ids=outputs[request.request_id],
                params=request.sampling,
            )
    return Report(
        suite="parity",
        figures={
            "prompts": len(prompts),
            "positions": verdict.num_positions,
            "mismatches": verdict.num_mismatches,
            "within_epsilon": verdict.num_within_epsilon,
            "seeded_outputs_equal_on_and_off": sum(
                seeded_outputs[key] == plain_outputs[key] for key in seeded_outputs
            ),
        },
        passed=verdict.num_mismatches == 0,
    )


def heldout_prompts(
    tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0
) -> list[tuple[int, ...]]:
    """Beginnings and middles of held-out standard library modules, of mixed length in tokens."""
    _, documents = load_documents()
    generator = random.Random(seed)
    prompts: list[tuple[int, ...]] = []
    while len(prompts) < count:
        text = generator.choice(documents).text
        lines = text.splitlines(keepends=True)
        start = generator.randrange(len(lines))
        token_ids = tokenizer("".join(lines[start : start + 60])).input_ids
        length = generator.randint(*PROMPT_LENGTHS)
        if len(token_ids) >= PROMPT_LENGTHS[0]:
            prompts.append(tuple(token_ids[:length]))
    return prompts


class _RemoteCompleter:
    """Sends requests, all at once, to a running cluster."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __call__(self, requests: list[Request]) -> dict[str, list[int]]:
        return asyncio.run(self._complete_all(requests))

    async def _complete_all(self, requests: list[Request]) -> dict[str, list[int]]:
        async with AsyncClient(self._address) as client:

            async def complete(request: Request) -> tuple[str, list[int]]:
                token_ids: list[int] = []
                async for chunk in client.generate(
                    list(request.prompt_token_ids),
                    sampling=request.sampling,
                    speculation=request.speculation,
                ):
                    token_ids += chunk.token_ids
                return request.request_id, token_ids

            return dict(await asyncio.gather(*(complete(r) for r in requests)))


def _requests(
    prompts: list[tuple[int, ...]],
    params: Callable[[int], SamplingParams],
    speculation: SpeculationParams,
) -> list[Request]:
    return [
        Request(
            request_id=f"prompt-{index}",
            prompt_token_ids=prompt,
            sampling=params(index),
            speculation=speculation,
        )
        for index, prompt in enumerate(prompts)
    ]
