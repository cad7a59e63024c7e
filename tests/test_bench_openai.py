"""The load client of OpenAI-compatible servers."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from cluster.bench.load_generator import closed_loop
from cluster.bench.load_record import LoadResult
from cluster.bench.openai_client import OpenAIClient, TokenCounter
from cluster.request import Request, SamplingParams


@asynccontextmanager
async def openai_server(
    answer: Callable[[dict[str, Any]], list[str]],
) -> AsyncGenerator[tuple[str, list[dict[str, Any]]], None]:
    """A server that streams what ``answer`` makes of a body; its URL, and the bodies it got."""
    bodies: list[dict[str, Any]] = []

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "some-model"}]})

    async def complete(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        if bodies[-1]["max_tokens"] > 100:
            return web.json_response({"error": "too long"}, status=400)
        response = web.StreamResponse()
        await response.prepare(request)
        for event in answer(bodies[-1]):
            await response.write(f"data: {event}\n\n".encode())
        return response

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", bodies
    finally:
        await runner.cleanup()


def text_event(text: str, completion_tokens: int | None = None) -> str:
    usage = None if completion_tokens is None else {"completion_tokens": completion_tokens}
    return json.dumps({"choices": [{"index": 0, "text": text}], "usage": usage})


def request_of(request_id: str, max_tokens: int) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=request_id, prompt_token_ids=(3, 4, 5), sampling=sampling)


async def run_against(
    answer: Callable[[dict[str, Any]], list[str]], requests: list[Request]
) -> tuple[LoadResult, list[dict[str, Any]]]:
    async with openai_server(answer) as (url, bodies):
        client = OpenAIClient(url + "/")
        try:
            return await closed_loop(client, requests, 1), bodies
        finally:
            await client.close()


async def test_a_server_s_stream_is_counted_by_its_usage() -> None:
    events = [text_event("a", 1), text_event("", 3), text_event("bc", 6), "[DONE]"]
    result, bodies = await run_against(lambda _: events, [request_of("a", 6)])
    (one,) = result.records
    assert one.error is None
    assert one.num_tokens == (6,)  # all that comes at once is one piece
    assert bodies[0]["model"] == "some-model"
    assert bodies[0]["prompt"] == [3, 4, 5]
    assert bodies[0]["ignore_eos"] is True
    assert (bodies[0]["temperature"], bodies[0]["max_tokens"]) == (0.0, 6)


async def test_tokens_that_only_the_last_usage_counts_are_added() -> None:
    usage = json.dumps({"choices": [], "usage": {"completion_tokens": 5}})
    events = [text_event("a"), text_event("b"), usage, "[DONE]"]
    result, _ = await run_against(lambda _: events, [request_of("a", 5)])
    assert sum(result.records[0].num_tokens) == 5


async def test_a_server_that_refuses_a_request_fails_it_alone() -> None:
    events = [text_event("a", 1), "[DONE]"]
    requests = [request_of("a", 500), request_of("b", 1)]
    result, _ = await run_against(lambda _: events, requests)
    assert [sum(record.num_tokens) for record in result.records] == [0, 1]
    assert "400" in (result.records[0].error or "")
    assert result.records[1].error is None


async def test_an_error_within_a_stream_fails_the_request() -> None:
    events = [text_event("a", 1), json.dumps({"error": {"message": "out of memory"}})]
    result, _ = await run_against(lambda _: events, [request_of("a", 5)])
    assert "out of memory" in (result.records[0].error or "")


async def test_a_server_that_does_not_answer_fails_requests() -> None:
    client = OpenAIClient("http://127.0.0.1:9")
    result = await closed_loop(client, [request_of("a", 5)], 1)
    await client.close()
    assert "127.0.0.1:9" in (result.records[0].error or "")


def test_tokens_without_usage_are_pieces_with_text() -> None:
    counter = TokenCounter()
    lines = [text_event("a"), text_event(""), text_event("b"), '{"choices": []}']
    pieces = [counter.read(f"data: {line}\n".encode()) for line in lines]
    assert [piece and piece.num_tokens for piece in pieces] == [1, None, 1, None]
    assert counter.missing <= 0
    last = '{"choices": [], "usage": {"completion_tokens": 5}}'
    assert counter.read(f"data: {last}\n".encode()) is None
    assert counter.missing == 3
    assert counter.read(b"\n") is None
    assert counter.read(b": ping\n") is None
