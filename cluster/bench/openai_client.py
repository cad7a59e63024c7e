"""A load client for any OpenAI-compatible server: streamed completions over HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp

from cluster.bench.load_clients import Piece
from cluster.errors import DsparkError
from cluster.request import Request

_DATA = b"data:"
_DONE = b"[DONE]"
_MAX_LINE_BYTES = 1 << 20


class OpenAIClient:
    """``/v1/completions`` of one server, for the first model that it lists.

    Prompts are sent as token ids, so nothing depends on the server's tokenizer. Tokens of a piece
    are counted by ``usage`` where every piece has one (``continuous_usage_stats``, which vLLM and
    SGLang know), else a piece with text is one token; what the last ``usage`` counts beyond that
    is added to the last piece.

    Args:
        url: ``http://HOST:PORT``. To be made in the event loop.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        # No limit of its own on connections: the load is the caller's to bound.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=_MAX_LINE_BYTES,
        )
        self._model = ""

    async def generate(self, request: Request) -> AsyncGenerator[Piece, None]:
        """As ``LoadClient``; penalties, bias and stop strings are not sent."""
        try:
            if not self._model:
                self._model = await self._first_model()
            async with self._session.post(
                f"{self._url}/v1/completions", json=completion_body(self._model, request)
            ) as response:
                await _check(response)
                counter = TokenCounter()
                async for line in response.content:
                    if (piece := counter.read(line)) is not None:
                        yield piece
                if (missing := counter.missing) > 0:
                    yield Piece(missing)
        except aiohttp.ClientError as error:
            raise DsparkError(f"{self._url}: {type(error).__name__}: {error}") from error

    async def close(self) -> None:
        """Ends the connections."""
        await self._session.close()

    async def _first_model(self) -> str:
        async with self._session.get(f"{self._url}/v1/models") as response:
            await _check(response)
            models = (await response.json())["data"]
        if not models:
            raise DsparkError(f"{self._url}: lists no model")
        return str(models[0]["id"])


class TokenCounter:
    """Counts the tokens of one stream of server-sent events."""

    def __init__(self) -> None:
        self._num_seen = 0
        self._num_told = 0

    @property
    def missing(self) -> int:
        """Tokens that the server has told of, beyond those of the pieces."""
        return self._num_told - self._num_seen

    def read(self, line: bytes) -> Piece | None:
        """The piece that a line brings, if it brings one.

        Raises:
            DsparkError: the server sends an error instead.
        """
        if not line.startswith(_DATA):
            return None
        data = line[len(_DATA) :].strip()
        if data == _DONE:
            return None
        event = json.loads(data)
        if "error" in event:
            raise DsparkError(f"the server answers: {event['error']}")
        if (usage := event.get("usage")) is not None:
            self._num_told = int(usage["completion_tokens"])
        if not event.get("choices"):
            return None
        is_text = bool(event["choices"][0].get("text"))
        count = self.missing if usage is not None else int(is_text)
        if count <= 0:
            return None
        self._num_seen += count
        return Piece(count)


def completion_body(model: str, request: Request) -> dict[str, Any]:
    """The body of a streamed completion."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt_token_ids),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "ignore_eos": sampling.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    return body


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        raise DsparkError(f"{response.url}: {response.status}: {(await response.text())[:200]}")
