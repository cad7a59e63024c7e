"""How requests end that do not finish: refused, failed, cancelled or too late."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc import aio
from grpc_status import rpc_status

from cluster.errors import (
    DeadlineExceededError,
    DsparkError,
    InvalidRequestError,
    QueueFullError,
    RequestCancelledError,
)
from cluster.request import Request, SpeculationParams
from cluster.rpc.status import to_status
from cluster.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.rpc_tools import (
    MAX_MODEL_LEN,
    VOCAB_SIZE,
    collect,
    expected,
    gather_chunks,
    running_cluster,
    until,
)

NAN = float("nan")
BAD_INPUT: list[tuple[Any, dict[str, Any], str]] = [
    ("", {}, "prompt"),
    ([], {}, "prompt"),
    ([1] * MAX_MODEL_LEN, {}, "prompt"),
    ("word " * 5000, {}, "prompt"),
    ([VOCAB_SIZE] * MAX_MODEL_LEN, {}, "prompt"),  # lengths come first
    ([VOCAB_SIZE], {}, "prompt.token_ids"),
    ([1, VOCAB_SIZE, 2], {}, "prompt.token_ids"),
    ([-1], {}, "prompt.token_ids"),
    ([2**40], {}, "prompt.token_ids"),
    ("a\ud800", {}, "prompt"),
    ([1], {"temperature": -0.1}, "sampling.temperature"),
    ([1], {"temperature": NAN}, "sampling.temperature"),
    ([1], {"temperature": "hot"}, "sampling.temperature"),
    ([1], {"temprature": 1.0}, "sampling"),
    ([1], {"top_k": -1}, "sampling.top_k"),
    ([1], {"top_k": 2**40}, "sampling.top_k"),
    ([1], {"top_p": 0.0}, "sampling.top_p"),
    ([1], {"top_p": NAN}, "sampling.top_p"),
    ([1], {"min_p": 1.5}, "sampling.min_p"),
    ([1], {"seed": 2**64}, "sampling.seed"),
    ([1], {"max_tokens": -5}, "sampling.max_tokens"),
    ([1], {"min_tokens": 9, "max_tokens": 8}, "sampling.min_tokens"),
    ([1], {"presence_penalty": 3.0}, "sampling.presence_penalty"),
    ([1], {"frequency_penalty": NAN}, "sampling.frequency_penalty"),
    ([1], {"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
    ([1], {"logprobs": 21}, "sampling.logprobs"),
    ([1], {"stop_token_ids": [VOCAB_SIZE]}, "sampling.stop_token_ids"),
    ([1], {"logit_bias": {VOCAB_SIZE: 1.0}}, "sampling.logit_bias"),
    ([1], {"logit_bias": {1: 101.0}}, "sampling.logit_bias"),
    ([1], {"stop_token_ids": [1] * 1025}, "sampling.stop_token_ids"),
    ([1], {"logit_bias": dict.fromkeys(range(1025), 1.0)}, "sampling.logit_bias"),
    ([1], {"allowed_token_ids": [1] * (VOCAB_SIZE + 1)}, "sampling.allowed_token_ids"),
    ([1], {"stop": [""]}, "sampling.stop"),
    ([1], {"stop": ["x"] * 17}, "sampling.stop"),
    ([1], {"n": 0}, "n"),
    ([1], {"n": 17}, "n"),
    ([1], {"n": 2, "resume_token_ids": [1]}, "resume_token_ids"),
    ([1], {"resume_token_ids": [VOCAB_SIZE]}, "resume_token_ids"),
    ([1], {"resume_token_ids": [1, 2], "max_tokens": 2}, "resume_token_ids"),
    ([1], {"attempt": -1}, "attempt"),
    ([1], {"request_id": "x" * 129}, "request_id"),
    (
        [1],
        {"speculation": SpeculationParams(num_speculative_tokens=-1)},
        "speculation.num_speculative_tokens",
    ),
]


async def test_bad_input_names_its_field_and_disturbs_nobody() -> None:
    async with running_cluster(step_s=0.01) as cluster:
        bystander = asyncio.create_task(gather_chunks(cluster.client, [9], max_tokens=60))
        for prompt, arguments, field_name in BAD_INPUT:
            with pytest.raises(InvalidRequestError) as caught:
                await gather_chunks(cluster.client, prompt, **arguments)
            assert caught.value.field == field_name, (prompt, arguments)
        chunks = await bystander
        assert [t for chunk in chunks for t in chunk.token_ids] == expected([9], 60)
        assert len(cluster.replicas[0].loop.submitted) == 1


async def test_a_huge_text_is_refused_unread() -> None:
    async with running_cluster() as cluster:
        started_at = time.monotonic()
        with pytest.raises(InvalidRequestError) as caught:
            await gather_chunks(cluster.client, "a" * 10_000_000)
        assert caught.value.field == "prompt"
        assert time.monotonic() - started_at < 5  # reading it would take several times as long


async def test_bad_input_on_the_wire() -> None:
    requests = [
        (inference_pb2.GenerateRequest(), "prompt"),
        (inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds()), "prompt"),
        (
            inference_pb2.GenerateRequest(
                text="x",
                speculation=common_pb2.SpeculationParams(mode=99),  # type: ignore[arg-type]
            ),
            "speculation.mode",
        ),
        (
            inference_pb2.GenerateRequest(
                text="x", sampling=common_pb2.SamplingParams(temperature=NAN)
            ),
            "sampling.temperature",
        ),
    ]
    async with running_cluster() as cluster, aio.insecure_channel(cluster.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for request, field_name in requests:
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.Generate(request).read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            status = rpc_status.from_call(caught.value)
            info = error_details_pb2.ErrorInfo()
            assert status.details[0].Unpack(info)
            assert (info.domain, info.reason) == ("dspark-cluster", "INVALID_REQUEST")
            assert info.metadata["field"] == field_name


async def test_complete_output_is_not_resumed() -> None:
    eos, stop = 7, 8
    async with running_cluster(
        router={"eos_token_ids": (eos,)},
        completion=lambda request: [*request.resume_token_ids, *range(100, 110)],
    ) as cluster:

        async def resume(token_ids: list[int], **sampling: Any) -> list[int]:
            arguments: dict[str, Any] = {"max_tokens": 8, "stop_token_ids": [stop], **sampling}
            chunks = await gather_chunks(
                cluster.client, [1], resume_token_ids=token_ids, **arguments
            )
            return [t for chunk in chunks for t in chunk.token_ids]

        for token_ids, sampling in [
            ([1, 2, eos], {}),
            ([1, 2, stop], {}),
            ([1, eos, 3], {}),
            ([1, 2, stop], {"ignore_eos": True}),
            ([1, 2, eos], {"min_tokens": 2}),
        ]:
            with pytest.raises(InvalidRequestError, match="already holds an end-of-") as caught:
                await resume(token_ids, **sampling)
            assert caught.value.field == "resume_token_ids"
        assert not cluster.replicas[0].loop.submitted
        assert await resume([1, 2, eos], ignore_eos=True) == list(range(100, 105))
        assert await resume([1, 2, eos], min_tokens=3) == list(range(100, 105))
        assert await resume([1, 2, 3]) == list(range(100, 105))


async def test_engine_error_ends_only_its_request() -> None:
    secret = "the prompt's own words"

    def error_at(request: Request, index: int) -> Exception | None:
        if index < 5 or request.prompt_token_ids[0] == 1:
            return None
        if request.prompt_token_ids[0] == 2:
            return ValueError(secret)
        return DsparkError("out of pages")

    async with running_cluster(error_at=error_at, step_s=0.005) as cluster:
        good = asyncio.create_task(gather_chunks(cluster.client, [1], max_tokens=40))
        got: list[int] = []
        with pytest.raises(DsparkError, match=r"internal error \(ValueError\)") as caught:
            await collect(cluster.client.generate([2], max_tokens=40), got)
        assert secret not in str(caught.value)
        assert got == expected([2], 40)[:5]
        with pytest.raises(DsparkError, match="out of pages"):
            await gather_chunks(cluster.client, [3], max_tokens=40)
        assert [t for chunk in await good for t in chunk.token_ids] == expected([1], 40)


async def test_engine_queue_full_reaches_the_client() -> None:
    async with running_cluster(max_num_seqs=1, step_s=0.01) as cluster:
        first = asyncio.create_task(gather_chunks(cluster.client, [1], max_tokens=30))
        await until(lambda: cluster.replicas[0].loop.num_active == 1)
        with pytest.raises(QueueFullError) as caught:
            await gather_chunks(cluster.client, [1])
        assert 0.5 <= caught.value.retry_after_s <= 1.5
        await first


async def test_admission_is_bounded() -> None:
    async with running_cluster(router={"max_queued_tokens": 110}, step_s=0.01) as cluster:
        first = asyncio.create_task(gather_chunks(cluster.client, [1], max_tokens=60))
        await until(lambda: 45 <= cluster.router.num_queued_tokens <= 61)
        started = time.monotonic()
        with pytest.raises(QueueFullError) as caught:
            await gather_chunks(cluster.client, [1], max_tokens=60)
        assert time.monotonic() - started < 0.2
        assert caught.value.retry_after_s > 0
        await gather_chunks(cluster.client, [1], max_tokens=30)
        await first


@pytest.mark.parametrize("leave", ["close", "cancel", "break"])
async def test_cancel_reaches_the_engine(leave: str) -> None:
    async with running_cluster(step_s=0.01) as cluster:
        loop = cluster.replicas[0].loop
        if leave == "cancel":
            task = asyncio.create_task(gather_chunks(cluster.client, [1], n=3, max_tokens=400))
            await until(lambda: loop.num_active == 3)
            task.cancel()
        else:
            async with aclosing(cluster.client.generate([1], n=3, max_tokens=400)) as chunks:
                await anext(chunks)
                await until(lambda: loop.num_active == 3)
                if leave == "close":
                    await chunks.aclose()
        left_at = time.monotonic()
        await until(lambda: len(loop.cancelled) == 3)
        assert max(when for _, _, when in loop.cancelled) - left_at < 0.2
        assert all(isinstance(error, RequestCancelledError) for _, error, _ in loop.cancelled)
        assert loop.num_active == 0


async def test_deadline_reaches_the_engine() -> None:
    async with running_cluster(step_s=0.01) as cluster:
        loop = cluster.replicas[0].loop
        started = time.monotonic()
        got: list[int] = []
        with pytest.raises(DeadlineExceededError, match=r"^the request's deadline passed$"):
            await collect(cluster.client.generate([1], max_tokens=400, timeout_s=0.4), got)
        assert 0.35 < time.monotonic() - started < 0.7
        assert len(got) > 5
        await until(lambda: len(loop.cancelled) == 1)
        assert loop.cancelled[0][2] - started < 0.6
        assert isinstance(loop.cancelled[0][1], DeadlineExceededError)


@pytest.mark.parametrize("letter", ["x", "é", "😀"])
def test_what_quotes_a_client_at_length_fits_the_headers(letter: str) -> None:
    status = to_status(InvalidRequestError(letter * 9000, letter * 9000))
    assert len(status.message.encode()) <= 1003
    assert status.message.endswith("…")
    assert len(status.SerializeToString()) < 2500
    short = to_status(InvalidRequestError("prompt", f"must not be {letter}"))
    assert short.message == f"prompt: must not be {letter}"
