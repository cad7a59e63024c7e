"""What strangers' bytes reach first, each as one function: bytes in, accepted or refused by type.

Used by ``cluster.bench.fuzz_child``, in which the modules named here are instrumented; so nothing
here is imported before that, and gRPC and models not at all.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml
from google.protobuf.message import DecodeError, Message

from cluster.bench.fuzz_mutators import dump_document, mutate_document, mutate_message

VOCAB_SIZE = 1000
MAX_MODEL_LEN = 512
FEATURE_SIZE = 4
BLOCK_SIZE = 8

# Valid bodies, by path.
HTTP_BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": "def f(x):", "max_tokens": 4, "temperature": 0.5, "stop": ["a"], "n": 2},
        {
            "prompt": [[1, 2], [3]],
            "echo": True,
            "logprobs": 2,
            "seed": 7,
            "logit_bias": {"5": 1.5},
            "stream": True,
            "stream_options": {"include_usage": True},
            "structured_outputs": {"regex": "[a-z]+"},
        },
        {
            "prompt": ["a", "b"],
            "best_of": 3,
            "bad_words": ["x"],
            "allowed_token_ids": [7, 8],
            "speculation": "off",
            "return_token_ids": True,
            "priority": "batch",
            "timeout_seconds": 5.5,
        },
    ],
    "/v1/chat/completions": [
        {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "top_p": 0.9},
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
                {"role": "user", "content": "add"},
            ],
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "add",
                        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
                    },
                }
            ],
            "tool_choice": "auto",
            "logprobs": True,
            "top_logprobs": 2,
            "stream": True,
        },
        {
            "messages": [{"role": "user", "content": "json"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": {"type": "object"}},
            },
        },
    ],
    "/tokenize": [{"prompt": "a b", "add_special_tokens": False, "return_token_strs": True}],
    "/detokenize": [{"tokens": [40, 41, 42]}],
}

ACCEPTED = "accepted"
UNDECODABLE = "undecodable"  # no message of its kind at all: protobuf's, or YAML's, own refusal


class Loaded(NamedTuple):
    """A surface in use.

    Attributes:
        check: returns ``ACCEPTED``, ``UNDECODABLE`` or the name of the typed error, and raises
            anything that is a mistake of ours.
        seeds: valid inputs.
        mutate: changes what is decoded; returns its input where it cannot be decoded.
    """

    check: Callable[[bytes], str]
    seeds: list[bytes]
    mutate: Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Surface:
    """One surface.

    Attributes:
        modules: whose branches count.
        load: imports what is needed.
    """

    modules: tuple[str, ...]
    load: Callable[[], Loaded]


def _client() -> Loaded:
    from cluster.errors import DsparkError
    from cluster.request import Request
    from cluster.rpc.convert import generate_call_from_proto, submit_from_proto, submit_to_proto
    from cluster.v1 import common_pb2, inference_pb2

    def check(data: bytes) -> str:
        try:
            message = inference_pb2.GenerateRequest.FromString(data)
        except DecodeError:
            return UNDECODABLE
        try:
            call = generate_call_from_proto(message)
            prompt = call.prompt
            token_ids = tuple(prompt.encode()) if isinstance(prompt, str) else prompt
            request = Request(
                request_id=call.request_id or "r",
                prompt_token_ids=token_ids,
                sampling=call.sampling,
                speculation=call.speculation,
                resume_token_ids=call.resume_token_ids,
                attempt=call.attempt,
            )
            request.validate(vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN, eos_token_ids={2})
            # What is accepted reaches the replica as it is.
            submit = submit_to_proto(request).submit
            assert submit_from_proto(submit, "r").sampling == request.sampling
        except DsparkError as error:
            return type(error).__name__
        return ACCEPTED

    ids = inference_pb2.TokenIds(ids=[1, 2, 3])
    every = common_pb2.SamplingParams(
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        seed=7,
        stop_token_ids=[3, 4],
        stop=["a", "bc"],
        max_tokens=20,
        min_tokens=2,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.2,
        logit_bias={5: 1.0, 6: -2.0},
        ignore_eos=True,
        logprobs=3,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        allowed_token_ids=[7, 8],
        bad_words=["x", "yz"],
    )
    speculation = common_pb2.SpeculationParams(mode=common_pb2.SPECULATION_MODE_OFF)
    speculation.num_speculative_tokens = 3
    messages = [
        inference_pb2.GenerateRequest(text="def f(x):"),
        inference_pb2.GenerateRequest(
            token_ids=ids, sampling=every, n=2, request_id="r", attempt=1
        ),
        inference_pb2.GenerateRequest(
            token_ids=ids,
            speculation=speculation,
            resume_token_ids=inference_pb2.TokenIds(ids=[4, 5]),
        ),
    ]

    def mutate(data: bytes, rng: random.Random) -> bytes:
        return _mutated(inference_pb2.GenerateRequest, data, rng)

    return Loaded(check, [message.SerializeToString() for message in messages], mutate)


def _drafter() -> Loaded:
    """Both directions; the first byte says which message it is."""
    import torch

    from cluster.engine.draft_client import DraftSampling, DraftSequence, SessionKey
    from cluster.engine.draft_loop import FeatureChunk
    from cluster.errors import DsparkError
    from cluster.rpc.draft_messages import (
        decode_answer,
        decode_chunk,
        decode_round,
        decode_session,
        encode_chunk,
        encode_round,
    )
    from cluster.rpc.tensors import encode_tensor
    from cluster.v1 import drafter_pb2

    keys = [SessionKey("a", 1), SessionKey("b", 2)]
    sequences = [
        DraftSequence(
            session=key,
            committed_length=10,
            num_features=2,
            new_token_ids=(1, 2, 3),
            num_speculative_tokens=3,
        )
        for key in keys
    ]
    asked = dict(zip(keys, sequences, strict=True))
    samplings = {
        keys[0]: DraftSampling(temperature=0.0),
        keys[1]: DraftSampling(temperature=1.0, send_probs=True),
    }

    def check_round(data: bytes) -> None:
        message = drafter_pb2.DraftRequest.FromString(data)
        for session in message.close.sessions:
            decode_session(session)
        decode_round(
            message.round,
            feature_size=FEATURE_SIZE,
            vocab_size=VOCAB_SIZE,
            block_size=BLOCK_SIZE,
            max_sequences=8,
        )

    def check_chunk(data: bytes) -> None:
        message = drafter_pb2.FeedRequest.FromString(data)
        decode_chunk(message.chunk, feature_size=FEATURE_SIZE, vocab_size=VOCAB_SIZE)

    def check_answer(data: bytes) -> None:
        message = drafter_pb2.DraftResponse.FromString(data)
        results = decode_answer(
            message.proposals, asked=asked, samplings=samplings, vocab_size=VOCAB_SIZE
        )
        for result in results:
            assert result.committed_length == 10
            if result.proposal is not None:
                assert all(0 <= token < VOCAB_SIZE for token in result.proposal.draft_token_ids)
                assert all(0 <= value <= 1 for value in result.proposal.confidences)

    kinds = (check_round, check_chunk, check_answer)

    def check(data: bytes) -> str:
        try:
            kinds[data[0] % len(kinds) if data else 0](data[1:])
        except DecodeError:
            return UNDECODABLE
        except DsparkError as error:
            return type(error).__name__
        return ACCEPTED

    proposals = [
        drafter_pb2.DraftResponse.Proposal(
            session=drafter_pb2.SessionKey(request_id=key.request_id, epoch=key.epoch),
            committed_length=10,
            outcome=drafter_pb2.DraftResponse.OUTCOME_DRAFTED,
            draft_token_ids=[4, 5],
            confidences=[0.5, 0.25],
        )
        for key in keys
    ]
    ids = torch.tensor([[4, 5]] * 2, dtype=torch.int32)
    proposals[1].draft_prob_token_ids.CopyFrom(encode_tensor(ids))
    proposals[1].draft_prob_values.CopyFrom(encode_tensor(torch.full((2, 2), 0.5).half()))
    answer = drafter_pb2.DraftResponse.Proposals(round_id=1, proposals=proposals)
    first = FeatureChunk(
        session=keys[0],
        start=0,
        features=torch.ones(2, FEATURE_SIZE),
        token_ids=(1, 2, 3),
        sampling=DraftSampling(temperature=0.7, top_k=3, top_p=0.5, seed=4),
    )
    messages: list[Any] = [
        encode_round(1, sequences, torch.ones(4, FEATURE_SIZE)),
        encode_chunk(first),
        drafter_pb2.DraftResponse(proposals=answer),
    ]

    def mutate(data: bytes, rng: random.Random) -> bytes:
        kind = data[0] % len(messages) if data else 0
        return bytes([kind]) + _mutated(type(messages[kind]), data[1:], rng)

    seeds = [bytes([i]) + m.SerializeToString() for i, m in enumerate(messages)]
    return Loaded(check, seeds, mutate)


def _config() -> Loaded:
    from cluster.config import ClusterConfig
    from cluster.errors import DsparkError
    from cluster.section import parse_yaml
    from cluster.security.api_keys import parse_keys

    def check(data: bytes) -> str:
        try:
            document = parse_yaml("fuzz", data)
        except DsparkError:
            return UNDECODABLE
        outcome = ACCEPTED
        for parse in (ClusterConfig.parse, parse_keys):
            try:
                parse(document)
            except DsparkError as error:
                outcome = type(error).__name__
        return outcome

    seeds = [
        "target: {model: m, dtype: float32, tensor_parallel_size: 2, max_num_seqs: 8}\n"
        "speculative: {method: ngram, num_speculative_tokens: 4, prompt_lookup_max: 3}\n"
        "drafter: {num_replicas: 2, port: 0}\nrouter: {port: 50051, max_message_mb: 4}\n",
        "target:\n  model: m\n  device: cuda\nspeculative:\n  method: dspark\n  model: d\n"
        "  draft_timeout_ms: 20.5\nsecurity:\n  api_keys_file: k\n  internal_tls:\n"
        "    cert_file: a\n    key_file: b\n    ca_file: c\n",
        f"keys: [{{name: a, sha256: '{'ab' * 32}', requests_per_second: 1.5}}]\n",
    ]

    def mutate(data: bytes, rng: random.Random) -> bytes:
        try:
            document = parse_yaml("fuzz", data)
            return dump_document(mutate_document(document, rng))
        except (DsparkError, yaml.YAMLError, RecursionError):
            return data

    return Loaded(check, [seed.encode() for seed in seeds], mutate)


def _http() -> Loaded:
    """Bodies; the first byte says of which path."""
    from pydantic import ValidationError

    from cluster.api.chat import ChatCompletionRequest
    from cluster.api.completions import CompletionRequest
    from cluster.api.fields import GenerationFields
    from cluster.api.tokens import DetokenizeRequest, TokenizeRequest
    from cluster.errors import DsparkError

    kinds = (CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest)

    def check(data: bytes) -> str:
        try:
            document = json.loads(data[1:])
        except (ValueError, RecursionError):
            return UNDECODABLE
        try:
            fields = kinds[data[0] % len(kinds)].model_validate(document)
            if isinstance(fields, GenerationFields):
                fields.check_together()
                sampling = fields.to_sampling(
                    max_tokens=fields.max_tokens or 1, logprobs=None, grammar=fields.to_grammar()
                )
                sampling.validate(VOCAB_SIZE)
            if isinstance(fields, ChatCompletionRequest):
                fields.to_tools()
        except ValidationError:
            return "InvalidRequestError"  # which the application makes of it
        except DsparkError as error:
            return type(error).__name__
        return ACCEPTED

    def mutate(data: bytes, rng: random.Random) -> bytes:
        try:
            document = mutate_document(json.loads(data[1:]), rng)
            return data[:1] + json.dumps(document).encode()
        except (ValueError, RecursionError):
            return data

    seeds = [
        bytes([index]) + json.dumps(body).encode()
        for index, bodies in enumerate(HTTP_BODIES.values())
        for body in bodies
    ]
    return Loaded(check, seeds, mutate)


def _mutated(kind: type[Message], data: bytes, rng: random.Random) -> bytes:
    try:
        message = kind.FromString(data)
    except DecodeError:
        return data
    mutate_message(message, rng)
    return message.SerializeToString()


SURFACES = {
    "client": Surface(("cluster.rpc.convert", "cluster.request"), _client),
    "drafter": Surface(
        ("cluster.rpc.draft_messages", "cluster.rpc.tensors", "cluster.speculation.proposal"),
        _drafter,
    ),
    "http": Surface(
        ("cluster.api.fields", "cluster.chat.fields", "cluster.api.chat", "cluster.chat.tools"),
        _http,
    ),
    "config": Surface(("cluster.config", "cluster.section", "cluster.security.api_keys"), _config),
}
