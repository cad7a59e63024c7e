from cluster.v1 import chat_pb2 as _chat_pb2
from cluster.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "text", "token_ids", "sampling", "speculation", "n", "resume_token_ids", "attempt", "truncate_prompt_tokens", "model", "priority")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    text: str
    token_ids: TokenIds
    sampling: _common_pb2.SamplingParams
    speculation: _common_pb2.SpeculationParams
    n: int
    resume_token_ids: TokenIds
    attempt: int
    truncate_prompt_tokens: int
    model: str
    priority: _common_pb2.Priority
    def __init__(self, request_id: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., speculation: _Optional[_Union[_common_pb2.SpeculationParams, _Mapping]] = ..., n: _Optional[int] = ..., resume_token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., attempt: _Optional[int] = ..., truncate_prompt_tokens: _Optional[int] = ..., model: _Optional[str] = ..., priority: _Optional[_Union[_common_pb2.Priority, str]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "choice_index", "attempt", "token_offset", "token_ids", "token_sources", "text", "logprobs", "finish_reason", "usage", "text_lengths", "prompt_logprobs")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_SOURCES_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TEXT_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    choice_index: int
    attempt: int
    token_offset: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    token_sources: _containers.RepeatedScalarFieldContainer[_common_pb2.TokenSource]
    text: str
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.PositionLogprobs]
    finish_reason: _common_pb2.FinishReason
    usage: _common_pb2.Usage
    text_lengths: _containers.RepeatedScalarFieldContainer[int]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.PositionLogprobs]
    def __init__(self, request_id: _Optional[str] = ..., choice_index: _Optional[int] = ..., attempt: _Optional[int] = ..., token_offset: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., token_sources: _Optional[_Iterable[_Union[_common_pb2.TokenSource, str]]] = ..., text: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.PositionLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., usage: _Optional[_Union[_common_pb2.Usage, _Mapping]] = ..., text_lengths: _Optional[_Iterable[int]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_common_pb2.PositionLogprobs, _Mapping]]] = ...) -> None: ...

class ChatRequest(_message.Message):
    __slots__ = ("request_id", "conversation", "tool_choice", "parallel_tool_calls", "sampling", "speculation", "n", "resume_token_ids", "attempt", "truncate_prompt_tokens", "model", "priority")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    TOOL_CHOICE_FIELD_NUMBER: _ClassVar[int]
    PARALLEL_TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    conversation: _chat_pb2.Conversation
    tool_choice: _chat_pb2.ToolChoice
    parallel_tool_calls: bool
    sampling: _common_pb2.SamplingParams
    speculation: _common_pb2.SpeculationParams
    n: int
    resume_token_ids: TokenIds
    attempt: int
    truncate_prompt_tokens: int
    model: str
    priority: _common_pb2.Priority
    def __init__(self, request_id: _Optional[str] = ..., conversation: _Optional[_Union[_chat_pb2.Conversation, _Mapping]] = ..., tool_choice: _Optional[_Union[_chat_pb2.ToolChoice, _Mapping]] = ..., parallel_tool_calls: _Optional[bool] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., speculation: _Optional[_Union[_common_pb2.SpeculationParams, _Mapping]] = ..., n: _Optional[int] = ..., resume_token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., attempt: _Optional[int] = ..., truncate_prompt_tokens: _Optional[int] = ..., model: _Optional[str] = ..., priority: _Optional[_Union[_common_pb2.Priority, str]] = ...) -> None: ...

class ChatResponse(_message.Message):
    __slots__ = ("request_id", "choice_index", "attempt", "token_offset", "token_ids", "token_sources", "content", "logprobs", "finish_reason", "usage", "text_lengths", "tool_calls", "prompt_logprobs")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_SOURCES_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TEXT_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    choice_index: int
    attempt: int
    token_offset: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    token_sources: _containers.RepeatedScalarFieldContainer[_common_pb2.TokenSource]
    content: str
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.PositionLogprobs]
    finish_reason: _common_pb2.FinishReason
    usage: _common_pb2.Usage
    text_lengths: _containers.RepeatedScalarFieldContainer[int]
    tool_calls: _containers.RepeatedCompositeFieldContainer[_chat_pb2.ToolCall]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.PositionLogprobs]
    def __init__(self, request_id: _Optional[str] = ..., choice_index: _Optional[int] = ..., attempt: _Optional[int] = ..., token_offset: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., token_sources: _Optional[_Iterable[_Union[_common_pb2.TokenSource, str]]] = ..., content: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.PositionLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., usage: _Optional[_Union[_common_pb2.Usage, _Mapping]] = ..., text_lengths: _Optional[_Iterable[int]] = ..., tool_calls: _Optional[_Iterable[_Union[_chat_pb2.ToolCall, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_common_pb2.PositionLogprobs, _Mapping]]] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("text", "conversation", "add_special_tokens", "return_token_strings")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RETURN_TOKEN_STRINGS_FIELD_NUMBER: _ClassVar[int]
    text: str
    conversation: _chat_pb2.Conversation
    add_special_tokens: bool
    return_token_strings: bool
    def __init__(self, text: _Optional[str] = ..., conversation: _Optional[_Union[_chat_pb2.Conversation, _Mapping]] = ..., add_special_tokens: _Optional[bool] = ..., return_token_strings: _Optional[bool] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("token_ids", "token_strings", "max_model_len")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_STRINGS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    token_strings: _containers.RepeatedScalarFieldContainer[str]
    max_model_len: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., token_strings: _Optional[_Iterable[str]] = ..., max_model_len: _Optional[int] = ...) -> None: ...

class DetokenizeRequest(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DetokenizeResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    class Model(_message.Message):
        __slots__ = ("id", "max_model_len", "has_chat_template")
        ID_FIELD_NUMBER: _ClassVar[int]
        MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
        HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
        id: str
        max_model_len: int
        has_chat_template: bool
        def __init__(self, id: _Optional[str] = ..., max_model_len: _Optional[int] = ..., has_chat_template: _Optional[bool] = ...) -> None: ...
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ListModelsResponse.Model]
    def __init__(self, models: _Optional[_Iterable[_Union[ListModelsResponse.Model, _Mapping]]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShardStatus(_message.Message):
    __slots__ = ("rank", "node", "pid", "pipeline_stage", "tensor_rank")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_STAGE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_RANK_FIELD_NUMBER: _ClassVar[int]
    rank: int
    node: str
    pid: int
    pipeline_stage: int
    tensor_rank: int
    def __init__(self, rank: _Optional[int] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., pipeline_stage: _Optional[int] = ..., tensor_rank: _Optional[int] = ...) -> None: ...

class DrafterStatus(_message.Message):
    __slots__ = ("drafter_id", "address", "state", "reason", "round_trip_ms", "paced", "num_rounds", "round_trip_seconds")
    class NumRoundsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    DRAFTER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_MS_FIELD_NUMBER: _ClassVar[int]
    PACED_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    drafter_id: str
    address: str
    state: str
    reason: str
    round_trip_ms: float
    paced: _common_pb2.Pace
    num_rounds: _containers.ScalarMap[str, int]
    round_trip_seconds: _common_pb2.Histogram
    def __init__(self, drafter_id: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., round_trip_ms: _Optional[float] = ..., paced: _Optional[_Union[_common_pb2.Pace, _Mapping]] = ..., num_rounds: _Optional[_Mapping[str, int]] = ..., round_trip_seconds: _Optional[_Union[_common_pb2.Histogram, _Mapping]] = ...) -> None: ...

class ReplicaMetrics(_message.Message):
    __slots__ = ("num_prompt_tokens", "num_preemptions", "num_requests_by_budget", "speculation_mode", "speculation_reason_code", "num_flips", "seconds_in_mode", "drafter_demand", "draft_queue_seconds", "draft_network_seconds", "goodput", "goodput_plain", "seconds_in_state")
    class SecondsInModeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_BY_BUDGET_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_MODE_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_REASON_CODE_FIELD_NUMBER: _ClassVar[int]
    NUM_FLIPS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_IN_MODE_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_DEMAND_FIELD_NUMBER: _ClassVar[int]
    DRAFT_QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_NETWORK_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GOODPUT_FIELD_NUMBER: _ClassVar[int]
    GOODPUT_PLAIN_FIELD_NUMBER: _ClassVar[int]
    SECONDS_IN_STATE_FIELD_NUMBER: _ClassVar[int]
    num_prompt_tokens: int
    num_preemptions: int
    num_requests_by_budget: _containers.RepeatedScalarFieldContainer[int]
    speculation_mode: str
    speculation_reason_code: str
    num_flips: int
    seconds_in_mode: _containers.ScalarMap[str, float]
    drafter_demand: float
    draft_queue_seconds: float
    draft_network_seconds: float
    goodput: float
    goodput_plain: float
    seconds_in_state: float
    def __init__(self, num_prompt_tokens: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., num_requests_by_budget: _Optional[_Iterable[int]] = ..., speculation_mode: _Optional[str] = ..., speculation_reason_code: _Optional[str] = ..., num_flips: _Optional[int] = ..., seconds_in_mode: _Optional[_Mapping[str, float]] = ..., drafter_demand: _Optional[float] = ..., draft_queue_seconds: _Optional[float] = ..., draft_network_seconds: _Optional[float] = ..., goodput: _Optional[float] = ..., goodput_plain: _Optional[float] = ..., seconds_in_state: _Optional[float] = ...) -> None: ...

class PrefixCacheStats(_message.Message):
    __slots__ = ("num_queried_tokens", "num_hit_tokens", "num_cached_pages", "num_evicted_pages")
    NUM_QUERIED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_EVICTED_PAGES_FIELD_NUMBER: _ClassVar[int]
    num_queried_tokens: int
    num_hit_tokens: int
    num_cached_pages: int
    num_evicted_pages: int
    def __init__(self, num_queried_tokens: _Optional[int] = ..., num_hit_tokens: _Optional[int] = ..., num_cached_pages: _Optional[int] = ..., num_evicted_pages: _Optional[int] = ...) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("replica_id", "address", "state", "num_running", "num_waiting", "kv_cache_usage", "speculation_state", "speculation_reason", "shards", "drafters", "speculation", "num_output_tokens", "reason", "calibration_error", "calibration_drift", "speculation_method", "speculation_model", "prefix_cache", "num_queued_tokens", "num_free_tokens", "num_routers", "mean_output_tokens", "paced", "metrics", "is_exporter")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_USAGE_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_STATE_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_REASON_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    DRAFTERS_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_ERROR_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_DRIFT_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_METHOD_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_MODEL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUTERS_FIELD_NUMBER: _ClassVar[int]
    MEAN_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PACED_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    IS_EXPORTER_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    address: str
    state: str
    num_running: int
    num_waiting: int
    kv_cache_usage: float
    speculation_state: str
    speculation_reason: str
    shards: _containers.RepeatedCompositeFieldContainer[ShardStatus]
    drafters: _containers.RepeatedCompositeFieldContainer[DrafterStatus]
    speculation: _common_pb2.SpeculationStats
    num_output_tokens: int
    reason: str
    calibration_error: float
    calibration_drift: float
    speculation_method: str
    speculation_model: str
    prefix_cache: PrefixCacheStats
    num_queued_tokens: int
    num_free_tokens: int
    num_routers: int
    mean_output_tokens: float
    paced: _common_pb2.Pace
    metrics: ReplicaMetrics
    is_exporter: bool
    def __init__(self, replica_id: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[str] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., kv_cache_usage: _Optional[float] = ..., speculation_state: _Optional[str] = ..., speculation_reason: _Optional[str] = ..., shards: _Optional[_Iterable[_Union[ShardStatus, _Mapping]]] = ..., drafters: _Optional[_Iterable[_Union[DrafterStatus, _Mapping]]] = ..., speculation: _Optional[_Union[_common_pb2.SpeculationStats, _Mapping]] = ..., num_output_tokens: _Optional[int] = ..., reason: _Optional[str] = ..., calibration_error: _Optional[float] = ..., calibration_drift: _Optional[float] = ..., speculation_method: _Optional[str] = ..., speculation_model: _Optional[str] = ..., prefix_cache: _Optional[_Union[PrefixCacheStats, _Mapping]] = ..., num_queued_tokens: _Optional[int] = ..., num_free_tokens: _Optional[int] = ..., num_routers: _Optional[int] = ..., mean_output_tokens: _Optional[float] = ..., paced: _Optional[_Union[_common_pb2.Pace, _Mapping]] = ..., metrics: _Optional[_Union[ReplicaMetrics, _Mapping]] = ..., is_exporter: _Optional[bool] = ...) -> None: ...

class RouterStatus(_message.Message):
    __slots__ = ("router_id", "address")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    address: str
    def __init__(self, router_id: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("model", "router_id", "replicas", "num_active_requests", "version", "routers")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    router_id: str
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaStatus]
    num_active_requests: int
    version: str
    routers: _containers.RepeatedCompositeFieldContainer[RouterStatus]
    def __init__(self, model: _Optional[str] = ..., router_id: _Optional[str] = ..., replicas: _Optional[_Iterable[_Union[ReplicaStatus, _Mapping]]] = ..., num_active_requests: _Optional[int] = ..., version: _Optional[str] = ..., routers: _Optional[_Iterable[_Union[RouterStatus, _Mapping]]] = ...) -> None: ...
