from cluster.v1 import common_pb2 as _common_pb2
from cluster.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ConnectRequest(_message.Message):
    __slots__ = ("hello", "submit", "cancel")
    class Hello(_message.Message):
        __slots__ = ("router_id", "protocol_version")
        ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
        PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
        router_id: str
        protocol_version: int
        def __init__(self, router_id: _Optional[str] = ..., protocol_version: _Optional[int] = ...) -> None: ...
    class Submit(_message.Message):
        __slots__ = ("request_id", "attempt", "choice_index", "prompt_token_ids", "resume_token_ids", "sampling", "speculation", "timeout_seconds", "priority", "queue_timeout_seconds", "traceparent")
        REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
        ATTEMPT_FIELD_NUMBER: _ClassVar[int]
        CHOICE_INDEX_FIELD_NUMBER: _ClassVar[int]
        PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
        RESUME_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
        SAMPLING_FIELD_NUMBER: _ClassVar[int]
        SPECULATION_FIELD_NUMBER: _ClassVar[int]
        TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
        PRIORITY_FIELD_NUMBER: _ClassVar[int]
        QUEUE_TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
        TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
        request_id: str
        attempt: int
        choice_index: int
        prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
        resume_token_ids: _containers.RepeatedScalarFieldContainer[int]
        sampling: _common_pb2.SamplingParams
        speculation: _common_pb2.SpeculationParams
        timeout_seconds: float
        priority: _common_pb2.Priority
        queue_timeout_seconds: float
        traceparent: str
        def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., choice_index: _Optional[int] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., resume_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., speculation: _Optional[_Union[_common_pb2.SpeculationParams, _Mapping]] = ..., timeout_seconds: _Optional[float] = ..., priority: _Optional[_Union[_common_pb2.Priority, str]] = ..., queue_timeout_seconds: _Optional[float] = ..., traceparent: _Optional[str] = ...) -> None: ...
    class Cancel(_message.Message):
        __slots__ = ("request_id", "reason")
        REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
        REASON_FIELD_NUMBER: _ClassVar[int]
        request_id: str
        reason: str
        def __init__(self, request_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    hello: ConnectRequest.Hello
    submit: ConnectRequest.Submit
    cancel: ConnectRequest.Cancel
    def __init__(self, hello: _Optional[_Union[ConnectRequest.Hello, _Mapping]] = ..., submit: _Optional[_Union[ConnectRequest.Submit, _Mapping]] = ..., cancel: _Optional[_Union[ConnectRequest.Cancel, _Mapping]] = ...) -> None: ...

class ConnectResponse(_message.Message):
    __slots__ = ("welcome", "step")
    class Welcome(_message.Message):
        __slots__ = ("replica_id", "protocol_version", "max_model_len", "vocab_size", "digests", "page_size", "prefix_stride")
        REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
        PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
        MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
        VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
        DIGESTS_FIELD_NUMBER: _ClassVar[int]
        PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
        PREFIX_STRIDE_FIELD_NUMBER: _ClassVar[int]
        replica_id: str
        protocol_version: int
        max_model_len: int
        vocab_size: int
        digests: _common_pb2.ModelDigests
        page_size: int
        prefix_stride: int
        def __init__(self, replica_id: _Optional[str] = ..., protocol_version: _Optional[int] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., digests: _Optional[_Union[_common_pb2.ModelDigests, _Mapping]] = ..., page_size: _Optional[int] = ..., prefix_stride: _Optional[int] = ...) -> None: ...
    class StepUpdate(_message.Message):
        __slots__ = ("step", "deltas", "load", "num_counted_submissions", "prefixes")
        STEP_FIELD_NUMBER: _ClassVar[int]
        DELTAS_FIELD_NUMBER: _ClassVar[int]
        LOAD_FIELD_NUMBER: _ClassVar[int]
        NUM_COUNTED_SUBMISSIONS_FIELD_NUMBER: _ClassVar[int]
        PREFIXES_FIELD_NUMBER: _ClassVar[int]
        step: int
        deltas: _containers.RepeatedCompositeFieldContainer[ConnectResponse.Delta]
        load: _inference_pb2.ReplicaStatus
        num_counted_submissions: int
        prefixes: ConnectResponse.PrefixReport
        def __init__(self, step: _Optional[int] = ..., deltas: _Optional[_Iterable[_Union[ConnectResponse.Delta, _Mapping]]] = ..., load: _Optional[_Union[_inference_pb2.ReplicaStatus, _Mapping]] = ..., num_counted_submissions: _Optional[int] = ..., prefixes: _Optional[_Union[ConnectResponse.PrefixReport, _Mapping]] = ...) -> None: ...
    class PrefixReport(_message.Message):
        __slots__ = ("is_full", "added", "removed")
        IS_FULL_FIELD_NUMBER: _ClassVar[int]
        ADDED_FIELD_NUMBER: _ClassVar[int]
        REMOVED_FIELD_NUMBER: _ClassVar[int]
        is_full: bool
        added: _containers.RepeatedScalarFieldContainer[int]
        removed: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, is_full: _Optional[bool] = ..., added: _Optional[_Iterable[int]] = ..., removed: _Optional[_Iterable[int]] = ...) -> None: ...
    class Delta(_message.Message):
        __slots__ = ("request_id", "token_offset", "token_ids", "token_sources", "logprobs", "finish_reason", "usage", "error", "prompt_logprobs")
        REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
        TOKEN_OFFSET_FIELD_NUMBER: _ClassVar[int]
        TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
        TOKEN_SOURCES_FIELD_NUMBER: _ClassVar[int]
        LOGPROBS_FIELD_NUMBER: _ClassVar[int]
        FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
        USAGE_FIELD_NUMBER: _ClassVar[int]
        ERROR_FIELD_NUMBER: _ClassVar[int]
        PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
        request_id: str
        token_offset: int
        token_ids: _containers.RepeatedScalarFieldContainer[int]
        token_sources: _containers.RepeatedScalarFieldContainer[_common_pb2.TokenSource]
        logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.PositionLogprobs]
        finish_reason: _common_pb2.FinishReason
        usage: _common_pb2.Usage
        error: ConnectResponse.RequestError
        prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.PositionLogprobs]
        def __init__(self, request_id: _Optional[str] = ..., token_offset: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., token_sources: _Optional[_Iterable[_Union[_common_pb2.TokenSource, str]]] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.PositionLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., usage: _Optional[_Union[_common_pb2.Usage, _Mapping]] = ..., error: _Optional[_Union[ConnectResponse.RequestError, _Mapping]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_common_pb2.PositionLogprobs, _Mapping]]] = ...) -> None: ...
    class RequestError(_message.Message):
        __slots__ = ("code", "message", "field", "retry_after_seconds")
        CODE_FIELD_NUMBER: _ClassVar[int]
        MESSAGE_FIELD_NUMBER: _ClassVar[int]
        FIELD_FIELD_NUMBER: _ClassVar[int]
        RETRY_AFTER_SECONDS_FIELD_NUMBER: _ClassVar[int]
        code: int
        message: str
        field: str
        retry_after_seconds: float
        def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., retry_after_seconds: _Optional[float] = ...) -> None: ...
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    welcome: ConnectResponse.Welcome
    step: ConnectResponse.StepUpdate
    def __init__(self, welcome: _Optional[_Union[ConnectResponse.Welcome, _Mapping]] = ..., step: _Optional[_Union[ConnectResponse.StepUpdate, _Mapping]] = ...) -> None: ...
