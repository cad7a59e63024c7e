"""The whole configuration: frozen, validated once, unknown keys fail with the nearest right name.

``ClusterConfig`` is what ``deployments/*.yaml`` hold under ``applications[].args`` (Ray Serve's own
configuration format), and what every part receives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cluster.errors import ConfigError
from cluster.pace_config import PaceConfig
from cluster.scaling_config import (
    DrafterScalingConfig,
    ReplicaRange,
    TargetScalingConfig,
)
from cluster.section import Section, parse_section, resolve_files, resolve_path

DType = Literal["float32", "bfloat16", "float16"]
DraftMethodName = Literal["dspark", "dflash", "eagle3", "draft_model", "ngram"]

# What Ray counts by itself; `num_cpus` and `num_gpus` ask for the first two.
_RAY_OWN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")


def _check_resources(value: dict[str, float]) -> dict[str, float]:
    for name, amount in value.items():
        if name in _RAY_OWN_RESOURCES:
            raise ValueError(f"{name} is not a custom resource")
        if not 0.0001 <= amount < float("inf"):
            raise ValueError(f"{name} must be 0.0001 or more")
    return value


CustomResources = Annotated[dict[str, float], AfterValidator(_check_resources)]

_HIGHEST_PORT = 65535
# Draft tokens of a round at most, whatever a configuration or a drafter says.
MAX_SPECULATIVE_TOKENS = 128

# As in vLLM, where neither bound of prompt lookup is given.
_DEFAULT_PROMPT_LOOKUP = 5


class TargetConfig(ReplicaRange):
    """The target model and the engine of each of its replicas."""

    model: str = Field(description="Hugging Face checkpoint folder or hub id")
    num_replicas: int = Field(default=1, ge=1, description="at start, if max_replicas is set")
    min_replicas: int | None = Field(default=None, ge=1, description="needs max_replicas; unset: 1")
    default_lowest: ClassVar[int] = 1
    scaling: TargetScalingConfig = Field(default_factory=TargetScalingConfig)
    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)
    dtype: DType = "bfloat16"
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: int | None = Field(
        default=None, ge=1, description="CPU threads of each shard; unset: cores / shards"
    )
    num_cpus: float = Field(default=0.5, ge=0, description="Ray CPUs reserved for each shard")
    num_gpus: float = Field(default=0, ge=0, description="Ray GPUs reserved for each shard")
    resources: CustomResources = Field(
        default_factory=dict,
        description="custom Ray resources reserved for each shard",
    )
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    max_model_len: int | None = Field(
        default=None, ge=2, description="context in tokens; unset: the checkpoint's"
    )
    max_num_seqs: int = Field(default=64, ge=1, description="requests in one batch")
    max_num_batched_tokens: int = Field(default=512, ge=1, description="tokens in one pass")
    max_num_waiting: int = Field(default=1024, ge=0, description="requests queued on a replica")
    page_size: int = Field(default=16, ge=1, description="tokens of one KV page")
    num_pages: int | None = Field(
        default=None, ge=2, description="KV pages; unset: from kv_cache_memory_mb"
    )
    kv_cache_memory_mb: int = Field(default=256, ge=1, description="KV memory of each shard")
    enable_prefix_caching: bool = Field(
        default=True,
        description="prompts with the same beginning compute it once; never for deepseek_v4",
    )
    deterministic: bool = Field(
        default=False, description="bit-identical outputs whatever the batch (slow)"
    )
    enforce_eager: bool = Field(
        default=False,
        description="run layer by layer: starts sooner, and each pass takes longer",
    )
    verify_curve: str | None = Field(
        default=None,
        description="file of `dspark profile`; unset: measured at start, or cached from earlier",
    )
    pace: PaceConfig | None = Field(
        default=None, description="unset: steps take as long as they do; set: it brings the curve"
    )
    trust_remote_code: bool = False
    collective_timeout_s: float = Field(
        default=60.0,
        ge=15,
        description="a shard that waits longer for another is lost; idle ones are told every 5 s",
    )

    @property
    def num_shards(self) -> int:
        """Shard actors of one replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


class SpeculativeConfig(Section):
    """How drafts are made and verified; shaped as vLLM's speculative configuration.

    ``model`` belongs to every method but ``ngram``, which needs none; ``num_speculative_tokens``
    must be given for methods whose checkpoint has no block (``eagle3``, ``draft_model``,
    ``ngram``); ``prompt_lookup_min`` and ``prompt_lookup_max`` are set for ``ngram`` and no other.
    """

    method: DraftMethodName = "dspark"
    model: str | None = Field(
        default=None,
        validate_default=True,
        description="drafter checkpoint folder or hub id; not for ngram",
    )
    num_speculative_tokens: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SPECULATIVE_TOKENS,
        validate_default=True,
        description="most draft tokens a round; unset: the drafter's block (dspark, dflash)",
    )
    prompt_lookup_min: int | None = Field(
        default=None, ge=1, le=64, description="ngram: tokens that a match has at least"
    )
    prompt_lookup_max: int | None = Field(
        default=None, ge=1, le=64, description="ngram: tokens that a match is looked for with"
    )
    scheduler: Literal["full", "prefix", "search"] = Field(
        default="search",
        description="how much to verify; full: whole blocks; prefix: DSpark's algorithm 1 on the "
        "cost model; search: the best total for confidences of earlier rounds (section 5.2)",
    )
    switching: Literal["auto", "always"] = Field(
        default="auto",
        description="auto: speculate where the cost model expects more of it than of plain passes",
    )
    grouping: Literal["auto", "off", "always"] = Field(
        default="auto",
        description="two groups of sequences, one verified while the other is drafted for; auto: "
        "where the cost model expects more of it",
    )
    trust_drafter: bool = Field(
        default=True, description="false: verify as if the drafter lied about its distribution"
    )
    draft_top_k: int = Field(
        default=64, ge=1, le=1024, description="entries of the draft distribution on the wire"
    )
    draft_timeout_ms: float = Field(
        default=200.0, gt=0, le=600_000, description="a round later than this decodes plainly"
    )
    online_calibration: bool = Field(
        default=True, description="keep confidences calibrated from what is accepted while serving"
    )

    @property
    def uses_features(self) -> bool:
        """Whether drafters read the target's hidden states."""
        return self.method in ("dspark", "dflash", "eagle3")

    @property
    def checkpoint(self) -> str:
        """The drafter's folder or hub id, for methods that have one.

        Raises:
            ConfigError: ``model`` is unset.
        """
        if self.model is None:
            raise ConfigError("speculative.model", f"is unset, as for method {self.method}")
        return self.model

    @property
    def prompt_lookup(self) -> tuple[int, int]:
        """Fewest and most tokens that a match of ``ngram`` is looked for with."""
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        if low is None and high is None:
            return _DEFAULT_PROMPT_LOOKUP, _DEFAULT_PROMPT_LOOKUP
        return low or high or 1, high or low or 1

    @field_validator("model")
    @classmethod
    def _check_model(cls, value: str | None, info: ValidationInfo) -> str | None:
        method = info.data.get("method")
        if method == "ngram" and value is not None:
            raise ValueError("method ngram has no model")
        if method not in (None, "ngram") and not value:
            raise ValueError(f"method {method} needs a checkpoint folder or hub id")
        return value

    @field_validator("num_speculative_tokens")
    @classmethod
    def _check_num_speculative_tokens(cls, value: int | None, info: ValidationInfo) -> int | None:
        method = info.data.get("method")
        if method in ("eagle3", "draft_model", "ngram") and not value:
            raise ValueError(f"method {method} needs it, 1 or more")
        return value

    @field_validator("prompt_lookup_min", "prompt_lookup_max")
    @classmethod
    def _check_prompt_lookup(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("method") not in (None, "ngram"):
            raise ValueError("is for method ngram only")
        lowest = info.data.get("prompt_lookup_min")
        if value is not None and lowest is not None and value < lowest:
            raise ValueError(f"must be at least prompt_lookup_min {lowest}")
        return value


class DrafterConfig(ReplicaRange):
    """The pool of drafters; with ``highest`` 0 it is as if ``speculative`` was unset."""

    placement: Literal["remote", "colocated"] = Field(
        default="remote",
        description="colocated: in each replica's rank 0, on its device; there is no pool then",
    )
    scaling: DrafterScalingConfig = Field(default_factory=DrafterScalingConfig)
    dtype: DType = "bfloat16"
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.5, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    resources: CustomResources = Field(
        default_factory=dict, description="custom Ray resources reserved for each drafter"
    )
    host: str = Field(default="", description="address to bind and publish; empty: the node's own")
    port: int = Field(default=0, ge=0, le=65535, description="first port to try; 0: any free one")
    num_ports: int = Field(
        default=64, ge=1, validate_default=True, description="length of the port range"
    )
    max_sessions: int = Field(default=1024, ge=1)
    session_ttl_s: float = Field(default=60.0, gt=0)
    page_size: int = Field(default=16, ge=1)
    kv_cache_memory_mb: int = Field(default=256, ge=1)
    enforce_eager: bool = Field(
        default=False,
        description="run layer by layer: starts sooner, and each round takes longer",
    )
    pace: PaceConfig | None = Field(default=None, description="as `target.pace`, of each round")

    @field_validator("num_ports")
    @classmethod
    def _check_num_ports(cls, value: int, info: ValidationInfo) -> int:
        first = info.data.get("port", 0)
        if first and first + value - 1 > _HIGHEST_PORT:
            raise ValueError(f"the range {first} to {first + value - 1} ends above {_HIGHEST_PORT}")
        return value


class RouterConfig(Section):
    """The clients' door."""

    num_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.1, ge=0)
    resources: CustomResources = Field(
        default_factory=dict, description="custom Ray resources reserved for each router"
    )
    host: str = Field(default="127.0.0.1", description="address that the gRPC server binds")
    port: int = Field(default=50051, ge=0, le=65535, description="0: any free one")
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="of its own for Prometheus, beside HTTP's `/metrics`; 0: any free one; unset: "
        "none",
    )
    max_connection_age_s: float | None = Field(
        default=None,
        gt=0,
        description="clients older than this connect anew, and so spread; unset: never",
    )
    max_connection_age_grace_s: float = Field(
        default=600.0, ge=0, description="how long their running streams may go on"
    )
    replica_choice: Literal["prefix", "queue", "random"] = Field(
        default="prefix",
        description="least queued and missing tokens; without regard to prefixes; at random",
    )
    max_queued_tokens: int = Field(
        default=1_000_000,
        ge=1,
        description="of a router's admitted requests; default priority up to 90%, batch 50%",
    )
    queue_timeout_s: float | None = Field(
        default=60.0, gt=0, description="longest wait on a replica before anything is computed"
    )
    replica_wait_s: float = Field(
        default=60.0,
        ge=0,
        description="how long a request without a deadline waits for a target replica, ready or, "
        "once it was accepted, with a place in its queue",
    )
    max_message_mb: int = Field(
        default=4, ge=1, description="what a client sends: a gRPC message, an HTTP body"
    )
    chat_template: str | None = Field(
        default=None, description="a Jinja file; chatml, where the tokenizer has none; unset: its"
    )
    trust_request_chat_template: bool = Field(
        default=False,
        description="render templates that clients send; they may take any time to render",
    )
    max_metadata_kb: int = Field(default=16, ge=1, description="headers of one call")
    max_connections: int = Field(
        default=10_000,
        ge=1,
        description="of gRPC clients; further ones are closed at once. Each needs an open file: "
        "fewer are taken where `ulimit -n` is lower",
    )
    max_streams_per_connection: int = Field(
        default=1024, ge=1, description="further ones wait, or are refused"
    )
    slow_reader_timeout_s: float = Field(
        default=60.0, gt=0, description="a client that takes no chunk for so long is cut off"
    )

    @field_validator("metrics_port")
    @classmethod
    def _check_metrics_port(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and value == info.data.get("port"):
            raise ValueError("is router.port already")
        return value


class ClientTlsConfig(Section):
    """TLS of the clients' door; the files are PEM, and are read again when they change."""

    cert_file: str = Field(description="the router's certificate, intermediates behind it")
    key_file: str
    client_ca_file: str | None = Field(
        default=None, description="clients need a certificate that it has signed; unset: none"
    )


class InternalTlsConfig(Section):
    """Mutual TLS between routers, replicas and drafters; files as in ``ClientTlsConfig``."""

    cert_file: str = Field(description="names server_name; for both ends of a connection")
    key_file: str
    ca_file: str = Field(description="signs nothing but the cluster's own certificates")
    server_name: str = Field(
        default="dspark-internal",
        min_length=1,
        description="DNS name in every internal certificate, whatever the part's address is",
    )


class SecurityConfig(Section):
    """Who may connect, and how; unset parts are open. ``docs/security.md`` says more."""

    client_tls: ClientTlsConfig | None = Field(default=None, description="unset: plaintext")
    internal_tls: InternalTlsConfig | None = Field(default=None, description="unset: plaintext")
    api_keys_file: str | None = Field(
        default=None, description="of `dspark keys create`; unset: no key is asked for"
    )


class TracingConfig(Section):
    """Traces of requests, for OpenTelemetry; needs the extra ``tracing``."""

    endpoint: str = Field(
        pattern=r"^https?://", description="of a collector that takes OTLP over gRPC"
    )
    sample_ratio: float = Field(
        default=1.0, ge=0, le=1, description="of requests whose client does not say itself"
    )


class ClusterConfig(Section):
    """One cluster: a target, its drafters and its routers."""

    served_model_name: str | None = Field(default=None, description="unset: target.model's name")
    target: TargetConfig
    speculative: SpeculativeConfig | None = Field(
        default=None, description="unset: no drafters, plain decoding"
    )
    drafter: DrafterConfig = Field(default_factory=DrafterConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)
    security: SecurityConfig = Field(default_factory=SecurityConfig)
    tracing: TracingConfig | None = Field(default=None, description="unset: none")
    drain_timeout_s: float = Field(
        default=30.0, ge=0, description="longest wait for running streams when a part stops"
    )

    @model_validator(mode="after")
    def _check_together(self) -> ClusterConfig:
        if self.target.max_num_batched_tokens < self.target.max_num_seqs:
            raise ValueError(
                "target.max_num_batched_tokens must be at least target.max_num_seqs, "
                f"got {self.target.max_num_batched_tokens} < {self.target.max_num_seqs}"
            )
        if self.target.pace is not None and self.target.verify_curve is not None:
            raise ValueError("target.verify_curve must be unset where target.pace brings a curve")
        scales = {pace.time_scale for pace in (self.target.pace, self.drafter.pace) if pace}
        if len(scales) > 1:
            raise ValueError("target.pace and drafter.pace must have the same time_scale")
        target = self.target
        if not any((target.num_cpus, target.num_gpus, *target.resources.values())):
            raise ValueError("target.num_cpus must be above 0 where a shard reserves nothing else")
        return self._check_placement()

    def _check_placement(self) -> ClusterConfig:
        """A device that drafts by itself can hide neither drafting nor verifying."""
        speculative, drafter = self.speculative, self.drafter
        if drafter.placement == "remote" or speculative is None:
            return self
        if speculative.grouping == "always":
            raise ValueError("speculative.grouping must not be always with colocated drafters")
        if drafter.is_scaled:
            raise ValueError("drafter.num_replicas must be fixed with colocated drafters")
        return self

    @property
    def has_drafters(self) -> bool:
        """Whether there are drafters, or may be, as a part of their own."""
        return self.has_speculation and self.drafter.placement == "remote"

    @property
    def has_speculation(self) -> bool:
        """Whether there is somebody to draft, or may be."""
        return self.speculative is not None and self.drafter.highest > 0

    @property
    def is_scaled(self) -> bool:
        """Whether the number of any part's replicas follows the load."""
        return self.target.is_scaled or (self.has_drafters and self.drafter.is_scaled)

    @property
    def model_name(self) -> str:
        """The name clients see."""
        return self.served_model_name or Path(self.target.model).name

    @classmethod
    def parse(cls, values: Any, *, base_dir: Path | None = None) -> ClusterConfig:
        """Validates ``values`` (a mapping as read from YAML).

        Args:
            values: the mapping.
            base_dir: folder that relative paths are looked up in first.

        Raises:
            ConfigError: naming the key's dotted path.
        """
        config = parse_section(cls, values)
        if base_dir is None:
            return config
        paths: dict[str, Any] = {"model": resolve_path(config.target.model, base_dir)}
        if config.target.verify_curve is not None:
            paths["verify_curve"] = resolve_path(config.target.verify_curve, base_dir)
        if config.target.pace is not None:
            paths["pace"] = config.target.pace.resolved(base_dir)
        target = config.target.model_copy(update=paths)
        drafter = config.drafter
        if drafter.pace is not None:
            drafter = drafter.model_copy(update={"pace": drafter.pace.resolved(base_dir)})
        speculative = config.speculative
        if speculative is not None and speculative.model is not None:
            speculative = speculative.model_copy(
                update={"model": resolve_path(speculative.model, base_dir)}
            )
        security = resolve_files(config.security, base_dir)
        return config.model_copy(
            update={
                "target": target,
                "speculative": speculative,
                "drafter": drafter,
                "security": security,
            }
        )
