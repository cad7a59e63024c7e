"""One round that nobody waits for, to see whether a drafter has recovered."""

from __future__ import annotations

import asyncio

import torch
from grpc import aio

from cluster.engine.draft_client import DraftSampling, DraftSequence, SessionKey
from cluster.engine.draft_loop import FeatureChunk
from cluster.errors import MalformedProposalError
from cluster.rpc.draft_messages import (
    MAX_CHUNK_BYTES,
    decode_answer,
    encode_chunk,
    encode_round,
    encode_session,
)
from cluster.rpc.drafter_handshake import read_message
from cluster.v1 import drafter_pb2

_ROUND_ID = 0  # real rounds count from 1
_NUM_ROWS = 4
_FEATURE_DTYPE = torch.bfloat16
_SESSION = SessionKey("probe", 0)
_SAMPLING = DraftSampling(temperature=0.0)
_FEED_TIMEOUT_S = 5.0


async def probe(
    draft: aio.StreamStreamCall,
    feed: aio.StreamStreamCall,
    *,
    feature_size: int,
    vocab_size: int,
    timeout_s: float,
) -> None:
    """Runs a round of one made-up sequence on greeted streams that nothing else uses yet.

    Args:
        feature_size: values of one position's features, as the drafter says.
        vocab_size: the target's.
        timeout_s: within which a round must be answered.

    Raises:
        TimeoutError: it was not.
        MalformedProposalError: an answer breaks the protocol.
        EOFError, aio.AioRpcError: a stream ended.
    """
    if not 0 <= feature_size * _NUM_ROWS * _FEATURE_DTYPE.itemsize < MAX_CHUNK_BYTES:
        raise MalformedProposalError(f"feature_size is {feature_size}")
    chunk = FeatureChunk(
        session=_SESSION,
        start=0,
        features=torch.zeros(_NUM_ROWS, feature_size, dtype=_FEATURE_DTYPE),
        token_ids=(0,) * (_NUM_ROWS + 1),
        sampling=_SAMPLING,
    )
    async with asyncio.timeout(_FEED_TIMEOUT_S):
        await feed.write(encode_chunk(chunk))
        await read_message(feed, "ack")
    sequence = DraftSequence(
        session=_SESSION,
        committed_length=_NUM_ROWS + 1,
        num_features=0,
        new_token_ids=(0,),
        num_speculative_tokens=1,
    )
    nothing = torch.zeros(0, feature_size, dtype=_FEATURE_DTYPE)
    async with asyncio.timeout(timeout_s):
        await draft.write(encode_round(_ROUND_ID, [sequence], nothing))
        answer = (await read_message(draft, "proposals")).proposals
    if answer.round_id != _ROUND_ID:
        raise MalformedProposalError("an answer to a round that is not outstanding")
    decode_answer(
        answer,
        asked={_SESSION: sequence},
        samplings={_SESSION: _SAMPLING},
        vocab_size=vocab_size,
    )
    close = drafter_pb2.DraftRequest.Close(sessions=[encode_session(_SESSION)])
    await draft.write(drafter_pb2.DraftRequest(close=close))
