"""Broken messages from live drafters to a replica's client of them, without an engine."""

from __future__ import annotations

import asyncio
import itertools
import random

import torch

from cluster.bench.fuzz_hostile_drafters import check_client, no_mistakes, supplied_client
from cluster.bench.fuzz_live_counts import LiveCounts
from cluster.bench.fuzz_proposals import check_result
from cluster.bench.fuzz_surfaces import BLOCK_SIZE
from cluster.config import SpeculativeConfig
from cluster.engine.draft_client import DraftRound, DraftSampling, DraftSequence, SessionKey
from cluster.rpc.drafter_client import GrpcDraftClient

_NUM_DRAFTERS = 32
_NUM_SESSIONS = 64
_PROMPT = (1, 2, 3)
_COLLECT_S = 0.1
_PAUSE_S = 0.005  # while nobody drafts
_HONEST_ROUNDS = 100
# Of the honest ones, and of the drafters that were taken away: moments on an idle machine.
_HANG_S = 120.0


async def fuzz_proposals(counts: LiveCounts, num_messages: int, rng: random.Random) -> None:
    """Drafts for rounds as an engine asks for them, one behind the other."""
    config = SpeculativeConfig(
        method="ngram", num_speculative_tokens=BLOCK_SIZE, draft_timeout_ms=100
    )
    with no_mistakes(counts):
        async with supplied_client(
            counts, config, num_messages, rng, num_drafters=_NUM_DRAFTERS
        ) as (client, supplying):
            rounds = _Rounds(client, counts)
            try:
                while counts.num_messages < num_messages:
                    async with asyncio.timeout(_HANG_S):
                        await asyncio.to_thread(rounds.run_once)
                    check_client(counts, client)
                before = client.stats.num_rounds
                async with asyncio.timeout(_HANG_S):  # they are honest now
                    while client.stats.num_rounds < before + _HONEST_ROUNDS:
                        await asyncio.to_thread(rounds.run_once)
                supplying.cancel()
                client.set_drafters([])
                rounds.close()
                async with asyncio.timeout(_HANG_S):
                    while client.status():
                        await asyncio.sleep(_PAUSE_S)
            except TimeoutError:
                counts.fail(f"rounds hang, or drafters stay: {client.status()[:3]}")


class _Rounds:
    """Sessions, opened anew whenever one is gone, and rounds of all of them."""

    def __init__(self, client: GrpcDraftClient, counts: LiveCounts) -> None:
        self._client = client
        self._counts = counts
        self._epochs = itertools.count(1)
        self._keys: dict[str, SessionKey] = {}
        self._unfed: set[SessionKey] = set()

    def run_once(self) -> None:
        """A round, if some drafter has part in it."""
        for number in range(_NUM_SESSIONS):
            self._keep(f"s{number}", DraftSampling(temperature=1.0, send_probs=number % 2 == 0))
        features = torch.zeros(len(_PROMPT) - 1, 0)
        for key in list(self._unfed):
            if self._client.feed(key, 0, features, _PROMPT):
                self._unfed.discard(key)
        asked = {
            key: DraftSequence(
                session=key,
                committed_length=len(_PROMPT),
                num_features=0,
                new_token_ids=_PROMPT[-1:],
                num_speculative_tokens=BLOCK_SIZE,
            )
            for key in self._keys.values()
            if key not in self._unfed
        }
        handle = self._client.start_round(DraftRound(tuple(asked.values()), torch.zeros(0, 0)))
        results = self._client.collect(handle, _COLLECT_S)
        for result in results:
            try:
                check_result(result, asked[result.session])
            except (AssertionError, KeyError) as error:
                self._counts.fail(f"{error!r}: {result}")
        self._counts.outcomes["results"] += len(results)

    def close(self) -> None:
        """Ends all sessions."""
        for key in self._keys.values():
            self._client.close_session(key)

    def _keep(self, name: str, sampling: DraftSampling) -> None:
        former = self._keys.get(name)
        if former is not None and self._client.has_session(former):
            return
        if former is not None:
            self._client.close_session(former)
            self._unfed.discard(former)
            del self._keys[name]
        key = SessionKey(name, next(self._epochs))
        if self._client.open_session(key, sampling):
            self._keys[name] = key
            self._unfed.add(key)
