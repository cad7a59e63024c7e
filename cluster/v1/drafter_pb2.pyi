from cluster.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionKey(_message.Message):
    __slots__ = ("request_id", "epoch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class DraftRequest(_message.Message):
    __slots__ = ("hello", "round", "close")
    class Hello(_message.Message):
        __slots__ = ("replica_id", "protocol_version", "digests")
        REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
        PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
        DIGESTS_FIELD_NUMBER: _ClassVar[int]
        replica_id: str
        protocol_version: int
        digests: _common_pb2.ModelDigests
        def __init__(self, replica_id: _Optional[str] = ..., protocol_version: _Optional[int] = ..., digests: _Optional[_Union[_common_pb2.ModelDigests, _Mapping]] = ...) -> None: ...
    class Round(_message.Message):
        __slots__ = ("round_id", "sequences", "features")
        ROUND_ID_FIELD_NUMBER: _ClassVar[int]
        SEQUENCES_FIELD_NUMBER: _ClassVar[int]
        FEATURES_FIELD_NUMBER: _ClassVar[int]
        round_id: int
        sequences: _containers.RepeatedCompositeFieldContainer[DraftRequest.Sequence]
        features: _common_pb2.Tensor
        def __init__(self, round_id: _Optional[int] = ..., sequences: _Optional[_Iterable[_Union[DraftRequest.Sequence, _Mapping]]] = ..., features: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ...) -> None: ...
    class Sequence(_message.Message):
        __slots__ = ("session", "committed_length", "num_features", "new_token_ids", "num_speculative_tokens")
        SESSION_FIELD_NUMBER: _ClassVar[int]
        COMMITTED_LENGTH_FIELD_NUMBER: _ClassVar[int]
        NUM_FEATURES_FIELD_NUMBER: _ClassVar[int]
        NEW_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
        NUM_SPECULATIVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
        session: SessionKey
        committed_length: int
        num_features: int
        new_token_ids: _containers.RepeatedScalarFieldContainer[int]
        num_speculative_tokens: int
        def __init__(self, session: _Optional[_Union[SessionKey, _Mapping]] = ..., committed_length: _Optional[int] = ..., num_features: _Optional[int] = ..., new_token_ids: _Optional[_Iterable[int]] = ..., num_speculative_tokens: _Optional[int] = ...) -> None: ...
    class Close(_message.Message):
        __slots__ = ("sessions",)
        SESSIONS_FIELD_NUMBER: _ClassVar[int]
        sessions: _containers.RepeatedCompositeFieldContainer[SessionKey]
        def __init__(self, sessions: _Optional[_Iterable[_Union[SessionKey, _Mapping]]] = ...) -> None: ...
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    hello: DraftRequest.Hello
    round: DraftRequest.Round
    close: DraftRequest.Close
    def __init__(self, hello: _Optional[_Union[DraftRequest.Hello, _Mapping]] = ..., round: _Optional[_Union[DraftRequest.Round, _Mapping]] = ..., close: _Optional[_Union[DraftRequest.Close, _Mapping]] = ...) -> None: ...

class DraftResponse(_message.Message):
    __slots__ = ("welcome", "proposals")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[DraftResponse.Outcome]
        OUTCOME_DRAFTED: _ClassVar[DraftResponse.Outcome]
        OUTCOME_MISSING: _ClassVar[DraftResponse.Outcome]
        OUTCOME_UNKNOWN_SESSION: _ClassVar[DraftResponse.Outcome]
    OUTCOME_UNSPECIFIED: DraftResponse.Outcome
    OUTCOME_DRAFTED: DraftResponse.Outcome
    OUTCOME_MISSING: DraftResponse.Outcome
    OUTCOME_UNKNOWN_SESSION: DraftResponse.Outcome
    class Welcome(_message.Message):
        __slots__ = ("drafter_id", "protocol_version", "digests", "method", "block_size", "feed_credit_bytes", "vocab_size", "feature_size", "paced", "draft_curve")
        DRAFTER_ID_FIELD_NUMBER: _ClassVar[int]
        PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
        DIGESTS_FIELD_NUMBER: _ClassVar[int]
        METHOD_FIELD_NUMBER: _ClassVar[int]
        BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
        FEED_CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
        VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
        FEATURE_SIZE_FIELD_NUMBER: _ClassVar[int]
        PACED_FIELD_NUMBER: _ClassVar[int]
        DRAFT_CURVE_FIELD_NUMBER: _ClassVar[int]
        drafter_id: str
        protocol_version: int
        digests: _common_pb2.ModelDigests
        method: str
        block_size: int
        feed_credit_bytes: int
        vocab_size: int
        feature_size: int
        paced: _common_pb2.Pace
        draft_curve: DraftResponse.DraftCurve
        def __init__(self, drafter_id: _Optional[str] = ..., protocol_version: _Optional[int] = ..., digests: _Optional[_Union[_common_pb2.ModelDigests, _Mapping]] = ..., method: _Optional[str] = ..., block_size: _Optional[int] = ..., feed_credit_bytes: _Optional[int] = ..., vocab_size: _Optional[int] = ..., feature_size: _Optional[int] = ..., paced: _Optional[_Union[_common_pb2.Pace, _Mapping]] = ..., draft_curve: _Optional[_Union[DraftResponse.DraftCurve, _Mapping]] = ...) -> None: ...
    class DraftCurve(_message.Message):
        __slots__ = ("sessions", "tokens", "seconds")
        SESSIONS_FIELD_NUMBER: _ClassVar[int]
        TOKENS_FIELD_NUMBER: _ClassVar[int]
        SECONDS_FIELD_NUMBER: _ClassVar[int]
        sessions: _containers.RepeatedScalarFieldContainer[int]
        tokens: _containers.RepeatedScalarFieldContainer[int]
        seconds: _containers.RepeatedScalarFieldContainer[float]
        def __init__(self, sessions: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[int]] = ..., seconds: _Optional[_Iterable[float]] = ...) -> None: ...
    class Proposals(_message.Message):
        __slots__ = ("round_id", "proposals", "queue_seconds", "compute_seconds", "paced")
        ROUND_ID_FIELD_NUMBER: _ClassVar[int]
        PROPOSALS_FIELD_NUMBER: _ClassVar[int]
        QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
        COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
        PACED_FIELD_NUMBER: _ClassVar[int]
        round_id: int
        proposals: _containers.RepeatedCompositeFieldContainer[DraftResponse.Proposal]
        queue_seconds: float
        compute_seconds: float
        paced: _common_pb2.Pace
        def __init__(self, round_id: _Optional[int] = ..., proposals: _Optional[_Iterable[_Union[DraftResponse.Proposal, _Mapping]]] = ..., queue_seconds: _Optional[float] = ..., compute_seconds: _Optional[float] = ..., paced: _Optional[_Union[_common_pb2.Pace, _Mapping]] = ...) -> None: ...
    class Proposal(_message.Message):
        __slots__ = ("session", "committed_length", "outcome", "missing_from", "draft_token_ids", "confidences", "draft_prob_token_ids", "draft_prob_values")
        SESSION_FIELD_NUMBER: _ClassVar[int]
        COMMITTED_LENGTH_FIELD_NUMBER: _ClassVar[int]
        OUTCOME_FIELD_NUMBER: _ClassVar[int]
        MISSING_FROM_FIELD_NUMBER: _ClassVar[int]
        DRAFT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
        CONFIDENCES_FIELD_NUMBER: _ClassVar[int]
        DRAFT_PROB_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
        DRAFT_PROB_VALUES_FIELD_NUMBER: _ClassVar[int]
        session: SessionKey
        committed_length: int
        outcome: DraftResponse.Outcome
        missing_from: int
        draft_token_ids: _containers.RepeatedScalarFieldContainer[int]
        confidences: _containers.RepeatedScalarFieldContainer[float]
        draft_prob_token_ids: _common_pb2.Tensor
        draft_prob_values: _common_pb2.Tensor
        def __init__(self, session: _Optional[_Union[SessionKey, _Mapping]] = ..., committed_length: _Optional[int] = ..., outcome: _Optional[_Union[DraftResponse.Outcome, str]] = ..., missing_from: _Optional[int] = ..., draft_token_ids: _Optional[_Iterable[int]] = ..., confidences: _Optional[_Iterable[float]] = ..., draft_prob_token_ids: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., draft_prob_values: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ...) -> None: ...
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    PROPOSALS_FIELD_NUMBER: _ClassVar[int]
    welcome: DraftResponse.Welcome
    proposals: DraftResponse.Proposals
    def __init__(self, welcome: _Optional[_Union[DraftResponse.Welcome, _Mapping]] = ..., proposals: _Optional[_Union[DraftResponse.Proposals, _Mapping]] = ...) -> None: ...

class FeedRequest(_message.Message):
    __slots__ = ("hello", "chunk")
    class Hello(_message.Message):
        __slots__ = ("replica_id", "protocol_version")
        REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
        PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
        replica_id: str
        protocol_version: int
        def __init__(self, replica_id: _Optional[str] = ..., protocol_version: _Optional[int] = ...) -> None: ...
    class Chunk(_message.Message):
        __slots__ = ("session", "start", "features", "sampling", "token_ids", "traceparent")
        SESSION_FIELD_NUMBER: _ClassVar[int]
        START_FIELD_NUMBER: _ClassVar[int]
        FEATURES_FIELD_NUMBER: _ClassVar[int]
        SAMPLING_FIELD_NUMBER: _ClassVar[int]
        TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
        TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
        session: SessionKey
        start: int
        features: _common_pb2.Tensor
        sampling: FeedRequest.DraftSampling
        token_ids: _containers.RepeatedScalarFieldContainer[int]
        traceparent: str
        def __init__(self, session: _Optional[_Union[SessionKey, _Mapping]] = ..., start: _Optional[int] = ..., features: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., sampling: _Optional[_Union[FeedRequest.DraftSampling, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., traceparent: _Optional[str] = ...) -> None: ...
    class DraftSampling(_message.Message):
        __slots__ = ("temperature", "top_k", "top_p", "min_p", "seed", "choice_index", "send_probs")
        TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
        TOP_K_FIELD_NUMBER: _ClassVar[int]
        TOP_P_FIELD_NUMBER: _ClassVar[int]
        MIN_P_FIELD_NUMBER: _ClassVar[int]
        SEED_FIELD_NUMBER: _ClassVar[int]
        CHOICE_INDEX_FIELD_NUMBER: _ClassVar[int]
        SEND_PROBS_FIELD_NUMBER: _ClassVar[int]
        temperature: float
        top_k: int
        top_p: float
        min_p: float
        seed: int
        choice_index: int
        send_probs: bool
        def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., choice_index: _Optional[int] = ..., send_probs: _Optional[bool] = ...) -> None: ...
    HELLO_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    hello: FeedRequest.Hello
    chunk: FeedRequest.Chunk
    def __init__(self, hello: _Optional[_Union[FeedRequest.Hello, _Mapping]] = ..., chunk: _Optional[_Union[FeedRequest.Chunk, _Mapping]] = ...) -> None: ...

class FeedResponse(_message.Message):
    __slots__ = ("welcome", "ack")
    class Welcome(_message.Message):
        __slots__ = ("credit_bytes",)
        CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
        credit_bytes: int
        def __init__(self, credit_bytes: _Optional[int] = ...) -> None: ...
    class Ack(_message.Message):
        __slots__ = ("session", "length", "credit_bytes")
        SESSION_FIELD_NUMBER: _ClassVar[int]
        LENGTH_FIELD_NUMBER: _ClassVar[int]
        CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
        session: SessionKey
        length: int
        credit_bytes: int
        def __init__(self, session: _Optional[_Union[SessionKey, _Mapping]] = ..., length: _Optional[int] = ..., credit_bytes: _Optional[int] = ...) -> None: ...
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    welcome: FeedResponse.Welcome
    ack: FeedResponse.Ack
    def __init__(self, welcome: _Optional[_Union[FeedResponse.Welcome, _Mapping]] = ..., ack: _Optional[_Union[FeedResponse.Ack, _Mapping]] = ...) -> None: ...

class GetDrafterStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetDrafterStatusResponse(_message.Message):
    __slots__ = ("drafter_id", "num_sessions", "num_streams")
    DRAFTER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_STREAMS_FIELD_NUMBER: _ClassVar[int]
    drafter_id: str
    num_sessions: int
    num_streams: int
    def __init__(self, drafter_id: _Optional[str] = ..., num_sessions: _Optional[int] = ..., num_streams: _Optional[int] = ...) -> None: ...
