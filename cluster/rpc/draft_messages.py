"""Rounds, proposals and features as messages of ``cluster.v1.DrafterService``, and back.

What comes from a replica is checked with ``InvalidRequestError``, what comes from a drafter with
``MalformedProposalError``; nothing behind these functions has to check it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from cluster.engine.draft_client import (
    DraftOutcome,
    DraftResult,
    DraftRound,
    DraftSampling,
    DraftSequence,
    SessionKey,
)
from cluster.engine.draft_loop import FeatureChunk, RoundAnswer
from cluster.errors import ConfigError, InvalidRequestError, MalformedProposalError
from cluster.rpc.convert import pace_to_proto
from cluster.rpc.tensors import FLOAT_DTYPES, decode_tensor, encode_tensor
from cluster.speculation.draft_curve import DraftCurve
from cluster.speculation.proposal import DraftProposal
from cluster.v1 import common_pb2, drafter_pb2

MAX_CHUNK_BYTES = 256 << 10
# A drafter that runs a model over a chunk's tokens keeps rounds waiting meanwhile.
MAX_CHUNK_ROWS = 512
TOKEN_ID_BYTES = 4
MAX_REQUEST_ID_CHARS = 512
MAX_CURVE_SIZES = 64
# Features on their way from a replica to a drafter.
FEED_CREDIT_BYTES = 4 << 20
_OUTCOMES = {
    DraftOutcome.DRAFTED: drafter_pb2.DraftResponse.OUTCOME_DRAFTED,
    DraftOutcome.MISSING: drafter_pb2.DraftResponse.OUTCOME_MISSING,
    DraftOutcome.UNKNOWN_SESSION: drafter_pb2.DraftResponse.OUTCOME_UNKNOWN_SESSION,
}
DIGEST_NAMES = ("target", "tokenizer", "drafter", "projection")


def encode_digests(digests: Mapping[str, str]) -> common_pb2.ModelDigests:
    """From a mapping by ``DIGEST_NAMES``; a name without a digest is empty."""
    return common_pb2.ModelDigests(**digests)


def mismatched_digests(ours: Mapping[str, str], theirs: common_pb2.ModelDigests) -> list[str]:
    """Names of the digests that differ; two sides may speculate together when there are none."""
    return [name for name in DIGEST_NAMES if ours.get(name, "") != getattr(theirs, name)]


def encode_session(session: SessionKey) -> drafter_pb2.SessionKey:
    """The wire form of a session's key."""
    return drafter_pb2.SessionKey(request_id=session.request_id, epoch=session.epoch)


def decode_session(message: drafter_pb2.SessionKey) -> SessionKey:
    """Raises: InvalidRequestError."""
    if not 1 <= len(message.request_id) <= MAX_REQUEST_ID_CHARS:
        raise InvalidRequestError("session.request_id", "is empty or too long")
    return SessionKey(message.request_id, message.epoch)


def encode_round(
    round_id: int, sequences: Sequence[DraftSequence], features: torch.Tensor
) -> drafter_pb2.DraftRequest:
    """One drafter's part of a round; ``features`` ``[sum of num_features, d]``."""
    return drafter_pb2.DraftRequest(
        round=drafter_pb2.DraftRequest.Round(
            round_id=round_id,
            sequences=[
                drafter_pb2.DraftRequest.Sequence(
                    session=encode_session(sequence.session),
                    committed_length=sequence.committed_length,
                    num_features=sequence.num_features,
                    new_token_ids=sequence.new_token_ids,
                    num_speculative_tokens=sequence.num_speculative_tokens,
                )
                for sequence in sequences
            ],
            features=encode_tensor(features),
        )
    )


def decode_round(
    message: drafter_pb2.DraftRequest.Round,
    *,
    feature_size: int,
    vocab_size: int,
    block_size: int,
    max_sequences: int,
) -> DraftRound:
    """A replica's round, checked against the drafter's shape.

    Raises:
        InvalidRequestError: naming the first field that is wrong.
    """
    if not 1 <= len(message.sequences) <= max_sequences:
        raise InvalidRequestError(
            "round.sequences", f"must have 1 to {max_sequences}, got {len(message.sequences)}"
        )
    sequences = tuple(
        _decode_sequence(sequence, vocab_size=vocab_size, block_size=block_size)
        for sequence in message.sequences
    )
    if len({sequence.session for sequence in sequences}) != len(sequences):
        raise InvalidRequestError("round.sequences", "name a session twice")
    num_rows = sum(sequence.num_features for sequence in sequences)
    features = decode_tensor(
        message.features,
        name="round.features",
        dtypes=FLOAT_DTYPES,
        shape=(num_rows, feature_size),
    )
    return DraftRound(sequences, features)


def encode_answer(round_id: int, answer: RoundAnswer) -> drafter_pb2.DraftResponse:
    """A drafter's answer to a round."""
    return drafter_pb2.DraftResponse(
        proposals=drafter_pb2.DraftResponse.Proposals(
            round_id=round_id,
            proposals=[_encode_result(result) for result in answer.results],
            queue_seconds=answer.queue_s,
            compute_seconds=answer.compute_s,
            paced=None if answer.paced is None else pace_to_proto(answer.paced),
        )
    )


def decode_answer(
    message: drafter_pb2.DraftResponse.Proposals,
    *,
    asked: Mapping[SessionKey, DraftSequence],
    samplings: Mapping[SessionKey, DraftSampling],
    vocab_size: int,
) -> list[DraftResult]:
    """A drafter's answer, checked against what it was asked.

    Args:
        asked: this drafter's sequences of the round.
        samplings: of their sessions.
        vocab_size: the target's.

    Raises:
        MalformedProposalError: naming the first thing that is wrong.
    """
    if len(message.proposals) != len(asked):
        raise MalformedProposalError(
            f"{len(message.proposals)} proposals for {len(asked)} sequences"
        )
    for name in ("queue_seconds", "compute_seconds"):
        seconds = getattr(message, name)
        if not (math.isfinite(seconds) and seconds >= 0):
            raise MalformedProposalError(f"{name} must be 0 or more")
    results: dict[SessionKey, DraftResult] = {}
    for proposal in message.proposals:
        session = SessionKey(proposal.session.request_id, proposal.session.epoch)
        sequence = asked.get(session)
        if sequence is None or session in results:
            raise MalformedProposalError("a proposal for a session that was not asked for")
        results[session] = _decode_result(proposal, sequence, samplings[session], vocab_size)
    return list(results.values())


def chunk_bytes(message: drafter_pb2.FeedRequest.Chunk) -> int:
    """What a chunk takes of the byte credit: its features and token ids."""
    return len(message.features.data) + len(message.token_ids) * TOKEN_ID_BYTES


def encode_chunk(chunk: FeatureChunk) -> drafter_pb2.FeedRequest:
    """Positions of one session, at most ``MAX_CHUNK_ROWS`` and ``MAX_CHUNK_BYTES`` of them."""
    sampling = chunk.sampling
    return drafter_pb2.FeedRequest(
        chunk=drafter_pb2.FeedRequest.Chunk(
            session=encode_session(chunk.session),
            start=chunk.start,
            features=encode_tensor(chunk.features),
            token_ids=chunk.token_ids,
            traceparent="" if sampling is None else sampling.traceparent,
            sampling=None
            if sampling is None
            else drafter_pb2.FeedRequest.DraftSampling(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                seed=sampling.seed,
                choice_index=sampling.choice_index,
                send_probs=sampling.send_probs,
            ),
        )
    )


def decode_chunk(
    message: drafter_pb2.FeedRequest.Chunk, *, feature_size: int, vocab_size: int
) -> FeatureChunk:
    """A replica's positions; sampling is set exactly where they start at 0.

    Raises:
        InvalidRequestError: naming the first field that is wrong.
    """
    if chunk_bytes(message) > MAX_CHUNK_BYTES:
        raise InvalidRequestError("chunk.features", f"is larger than {MAX_CHUNK_BYTES} bytes")
    num_rows = len(message.token_ids) - 1
    if not 0 <= num_rows <= MAX_CHUNK_ROWS:
        raise InvalidRequestError(
            "chunk.token_ids", f"must be 1 to {MAX_CHUNK_ROWS + 1}, got {num_rows + 1}"
        )
    if message.start < 0:
        raise InvalidRequestError("chunk.start", f"must be 0 or more, got {message.start}")
    if message.HasField("sampling") != (message.start == 0):
        raise InvalidRequestError("chunk.sampling", "must be set where start is 0, and only there")
    return FeatureChunk(
        session=decode_session(message.session),
        start=message.start,
        features=decode_tensor(
            message.features,
            name="chunk.features",
            dtypes=FLOAT_DTYPES,
            shape=(num_rows, feature_size),
        ),
        token_ids=_decode_token_ids(message.token_ids, "chunk.token_ids", vocab_size),
        sampling=_decode_sampling(message.sampling) if message.start == 0 else None,
    )


def _decode_sequence(
    message: drafter_pb2.DraftRequest.Sequence, *, vocab_size: int, block_size: int
) -> DraftSequence:
    committed_length, num_features = message.committed_length, message.num_features
    if committed_length < 1:
        raise InvalidRequestError("sequence.committed_length", "must be 1 or more")
    if not 0 <= num_features < committed_length:
        raise InvalidRequestError(
            "sequence.num_features", f"must be from 0 to {committed_length - 1}, got {num_features}"
        )
    if not 0 <= message.num_speculative_tokens <= block_size:
        raise InvalidRequestError(
            "sequence.num_speculative_tokens",
            f"must be from 0 to {block_size}, got {message.num_speculative_tokens}",
        )
    if len(message.new_token_ids) != num_features + 1:
        raise InvalidRequestError(
            "sequence.new_token_ids",
            f"must be {num_features + 1} for {num_features} features, "
            f"got {len(message.new_token_ids)}",
        )
    return DraftSequence(
        session=decode_session(message.session),
        committed_length=committed_length,
        num_features=num_features,
        new_token_ids=_decode_token_ids(
            message.new_token_ids, "sequence.new_token_ids", vocab_size
        ),
        num_speculative_tokens=message.num_speculative_tokens,
    )


def _decode_token_ids(token_ids: Sequence[int], name: str, vocab_size: int) -> tuple[int, ...]:
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise InvalidRequestError(name, f"must be ids below {vocab_size}")
    return tuple(token_ids)


def _decode_sampling(message: drafter_pb2.FeedRequest.DraftSampling) -> DraftSampling:
    if not (math.isfinite(message.temperature) and message.temperature >= 0):
        raise InvalidRequestError("sampling.temperature", "must be 0 or more")
    if message.top_k < 0:
        raise InvalidRequestError("sampling.top_k", "must be 0 or more")
    if not 0 < message.top_p <= 1:
        raise InvalidRequestError("sampling.top_p", "must be in (0, 1]")
    if not 0 <= message.min_p <= 1:
        raise InvalidRequestError("sampling.min_p", "must be in [0, 1]")
    return DraftSampling(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        seed=message.seed if message.HasField("seed") else None,
        choice_index=message.choice_index,
        send_probs=message.send_probs,
    )


def _encode_result(result: DraftResult) -> drafter_pb2.DraftResponse.Proposal:
    message = drafter_pb2.DraftResponse.Proposal(
        session=encode_session(result.session),
        committed_length=result.committed_length,
        outcome=_OUTCOMES[result.outcome],
        missing_from=result.missing_from,
    )
    proposal = result.proposal
    if proposal is None:
        return message
    message.draft_token_ids.extend(proposal.draft_token_ids)
    message.confidences.extend(proposal.confidences)
    if proposal.draft_prob_token_ids is not None and proposal.draft_prob_values is not None:
        message.draft_prob_token_ids.CopyFrom(
            encode_tensor(torch.from_numpy(np.ascontiguousarray(proposal.draft_prob_token_ids)))
        )
        message.draft_prob_values.CopyFrom(
            encode_tensor(torch.from_numpy(np.ascontiguousarray(proposal.draft_prob_values)))
        )
    return message


def _decode_result(
    message: drafter_pb2.DraftResponse.Proposal,
    sequence: DraftSequence,
    sampling: DraftSampling,
    vocab_size: int,
) -> DraftResult:
    if message.committed_length != sequence.committed_length:
        raise MalformedProposalError(
            f"a proposal for length {message.committed_length}, not {sequence.committed_length}"
        )
    try:
        outcome = DraftOutcome(message.outcome)
    except ValueError:
        raise MalformedProposalError(f"unknown outcome {message.outcome}") from None
    if not 0 <= message.missing_from < sequence.committed_length:
        raise MalformedProposalError(f"missing_from {message.missing_from} is out of range")
    proposal = None
    if outcome is DraftOutcome.DRAFTED:
        proposal = _decode_proposal(message, sequence, sampling, vocab_size)
    return DraftResult(
        session=sequence.session,
        committed_length=sequence.committed_length,
        outcome=outcome,
        missing_from=message.missing_from,
        proposal=proposal,
    )


def _decode_proposal(
    message: drafter_pb2.DraftResponse.Proposal,
    sequence: DraftSequence,
    sampling: DraftSampling,
    vocab_size: int,
) -> DraftProposal:
    token_ids = tuple(message.draft_token_ids)
    columns = values = None
    # Rejection verification needs the law; nobody else may be handed one.
    if sampling.send_probs and sampling.temperature > 0 and sampling.seed is None and token_ids:
        try:
            columns = decode_tensor(
                message.draft_prob_token_ids,
                name="draft_prob_token_ids",
                dtypes=(torch.int32,),
                shape=(len(token_ids), None),
            ).numpy()
            values = decode_tensor(
                message.draft_prob_values,
                name="draft_prob_values",
                dtypes=(torch.float16,),
                shape=columns.shape,
            ).numpy()
        except InvalidRequestError as error:
            raise MalformedProposalError(str(error)) from None
    elif message.HasField("draft_prob_token_ids") or message.HasField("draft_prob_values"):
        raise MalformedProposalError("draft probabilities that were not asked for")
    proposal = DraftProposal(
        draft_token_ids=token_ids,
        confidences=tuple(message.confidences),
        draft_prob_token_ids=columns,
        draft_prob_values=values,
    )
    proposal.validate(vocab_size=vocab_size, max_tokens=sequence.num_speculative_tokens)
    return proposal


def encode_curve(curve: DraftCurve) -> drafter_pb2.DraftResponse.DraftCurve:
    """What a drafter's passes cost, for its welcome."""
    return drafter_pb2.DraftResponse.DraftCurve(
        sessions=[int(size) for size in curve.sessions],
        tokens=[int(size) for size in curve.tokens],
        seconds=curve.table.ravel().tolist(),
    )


def decode_curve(message: drafter_pb2.DraftResponse.DraftCurve) -> DraftCurve:
    """The inverse of ``encode_curve``. Raises: MalformedProposalError: it is no curve."""
    shape = (len(message.sessions), len(message.tokens))
    if max(shape) > MAX_CURVE_SIZES or len(message.seconds) != shape[0] * shape[1]:
        raise MalformedProposalError("draft_curve has other sizes than it says, or too many")
    try:
        return DraftCurve.fit(message.sessions, message.tokens, np.reshape(message.seconds, shape))
    except ConfigError as error:
        raise MalformedProposalError(f"draft_curve: {error}") from None
