"""The fleet file: which devices, models and policies are simulated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.section import Section, parse_section
from cluster.speculation.device_profile import DeviceProfile
from cluster.speculation.draft_curve import DraftCurve
from cluster.speculation.pool_policy import PoolTiming
from cluster.speculation.verify_curve import VerifyCurve


class TargetFleet(Section):
    """The target replicas; names as in the cluster's configuration."""

    profile: str = Field(description="file of a device profile, or the name of one in `profiles`")
    num_replicas: int = Field(default=1, ge=1, le=100_000)
    devices: int = Field(default=1, ge=1, description="of a replica, for figures per device")
    max_num_seqs: int = Field(default=64, ge=1, description="requests at once on a replica")
    max_num_batched_tokens: int = Field(default=2048, ge=1, description="tokens of one pass")
    max_num_waiting: int = Field(default=1024, ge=0, description="requests queued on a replica")
    kv_cache_tokens: int | None = Field(default=None, ge=1, description="unset: all that is needed")
    host_step_ms: float = Field(default=0.0, ge=0, description="between passes, of the host's time")
    host_sequence_ms: float = Field(default=0.0, ge=0, description="more of it for each sequence")
    host_round_ms: float = Field(default=0.0, ge=0, description="more of it with a drafted round")


class DrafterFleet(Section):
    """The pool of drafters."""

    profile: str | None = Field(default=None, description="unset: the target's")
    min_replicas: int = Field(default=1, ge=0, le=100_000)
    max_replicas: int = Field(default=1, ge=0, le=100_000, description="min_replicas: a fixed pool")
    placement: Literal["remote", "colocated"] = Field(
        default="remote",
        description="colocated: one on each replica's own devices, which compute one or the other",
    )
    devices: int = Field(default=1, ge=1, description="of a remote drafter, for figures per device")
    start_s: float = Field(default=30.0, ge=0, description="until a new drafter is ready")
    per_replica: int = Field(default=4, ge=1, description="drafters that a replica's sessions use")
    network_ms: float = Field(default=0.5, ge=0, description="to a drafter and back")

    @property
    def is_colocated(self) -> bool:
        """Whether each replica has its own."""
        return self.placement == "colocated"

    @property
    def is_elastic(self) -> bool:
        """Whether the pool's policy chooses how many there are."""
        return not self.is_colocated and self.max_replicas > self.min_replicas

    @model_validator(mode="after")
    def _check_bounds(self) -> DrafterFleet:
        if self.is_colocated and {"min_replicas", "max_replicas"} & self.model_fields_set:
            raise ValueError("min_replicas and max_replicas are for remote drafters")
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must be at least min_replicas")
        return self


class Acceptance(Section):
    """How often guesses are accepted (``cluster.simulation.acceptance``)."""

    source: str = Field(default="", description="what it was measured on, and by which command")
    conditional: tuple[float, ...] = Field(
        min_length=1, max_length=128, description="by position, given those before; `dspark eval`"
    )
    request_spread: float = Field(default=0.7, ge=0, le=10, description="of requests, in log-odds")
    round_spread: float = Field(default=0.7, ge=0, le=10, description="of rounds, in log-odds")

    @field_validator("conditional")
    @classmethod
    def _check_conditional(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= value <= 1 for value in values):
            raise ValueError("must be chances between 0 and 1")
        return values


class SpeculationSettings(Section):
    """As ``speculative`` in the cluster's configuration."""

    num_speculative_tokens: int | None = Field(default=None, ge=0, le=128)
    scheduler: Literal["full", "prefix", "search"] = "search"
    switching: Literal["auto", "always"] = "auto"
    grouping: Literal["auto", "off", "always"] = "auto"
    draft_timeout_ms: float = Field(default=200.0, gt=0, le=600_000)


class PoolSettings(Section):
    """``PoolTiming``, under the same names."""

    min_gain: float = Field(default=PoolTiming.min_gain, gt=0)
    up_s: float = Field(default=PoolTiming.up_s, ge=0)
    down_s: float = Field(default=PoolTiming.down_s, ge=0)
    to_zero_s: float = Field(default=PoolTiming.to_zero_s, ge=0)
    settle_s: float = Field(default=PoolTiming.settle_s, ge=0)
    growth: float = Field(default=PoolTiming.growth, gt=0)


class RouterSettings(Section):
    """The router; one stands for all."""

    max_queued_tokens: int | None = Field(default=None, ge=1, description="unset: no bound")
    prefix_hit_rate: float = Field(
        default=0.0, ge=0, lt=1, description="share of prompt tokens that replicas have cached"
    )


class FleetConfig(Section):
    """One fleet. ``docs/simulate.md`` says what each part means."""

    seed: int = Field(default=0, ge=0)
    time_scale: float = Field(
        default=1.0, gt=0, le=1e6, description="stretches the profiles' times"
    )
    target: TargetFleet
    drafter: DrafterFleet | None = Field(default=None, description="unset: plain decoding")
    acceptance: Acceptance | None = Field(
        default=None, description="needed with drafters; in a fleet file also a file's path"
    )
    speculative: SpeculationSettings = Field(default_factory=SpeculationSettings)
    pool: PoolSettings = Field(default_factory=PoolSettings)
    router: RouterSettings = Field(default_factory=RouterSettings)

    @model_validator(mode="after")
    def _check_together(self) -> FleetConfig:
        if self.drafter is not None and self.acceptance is None:
            raise ValueError("acceptance is required where there are drafters")
        if self.target.max_num_batched_tokens < self.target.max_num_seqs:
            raise ValueError("target.max_num_batched_tokens must be at least target.max_num_seqs")
        return self

    @classmethod
    def parse(cls, values: Any) -> FleetConfig:
        """Validates ``values`` (a mapping as read from YAML).

        Raises:
            ConfigError: naming the key's dotted path.
        """
        return parse_section(cls, values)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A fleet with its curves, as they are before ``time_scale``."""

    config: FleetConfig
    target: VerifyCurve
    drafter: DraftCurve | None

    @classmethod
    def of(cls, config: FleetConfig, profiles: dict[str, DeviceProfile]) -> Fleet:
        """Puts the profiles in, which are given by the names in the file.

        Raises:
            ConfigError: one lacks the part it is named for.
        """
        from cluster.errors import ConfigError

        target = profiles[config.target.profile].target
        if target is None:
            raise ConfigError("target.profile", f"{config.target.profile} has no target")
        drafter = None
        if config.drafter is not None:
            name = config.drafter.profile or config.target.profile
            drafter = profiles[name].drafter
            if drafter is None:
                raise ConfigError("drafter.profile", f"{name} has no drafter")
        return cls(config=config, target=target, drafter=drafter)


def profile_path(name: str, base_dir: Path) -> Path:
    """Where a profile is: a path, or a name in ``profiles`` beside the fleet file."""
    names = (name, *(f"profiles/{name}.{kind}" for kind in ("yaml", "json")))
    return next((base_dir / n for n in names if (base_dir / n).is_file()), Path(name))
