"""Configuration of how many replicas there are of targets and of drafters."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, ValidationInfo, field_validator

from cluster.section import Section


class ReplicaRange(Section):
    """A fixed number of replicas or, with ``max_replicas``, one that follows the load."""

    default_lowest: ClassVar[int] = 0
    num_replicas: int = Field(default=1, ge=0, description="at start, if max_replicas is set")
    min_replicas: int | None = Field(default=None, ge=0, description="needs max_replicas; unset: 0")
    max_replicas: int | None = Field(
        default=None, ge=1, validate_default=True, description="unset: always num_replicas"
    )

    @property
    def is_scaled(self) -> bool:
        """Whether the number follows the load."""
        return self.max_replicas is not None

    @property
    def lowest(self) -> int:
        """Fewest replicas there ever are."""
        if self.max_replicas is None:
            return self.num_replicas
        return self.default_lowest if self.min_replicas is None else self.min_replicas

    @property
    def highest(self) -> int:
        """Most replicas there ever are."""
        return self.num_replicas if self.max_replicas is None else self.max_replicas

    @property
    def initial(self) -> int:
        """Replicas at start."""
        return min(max(self.num_replicas, self.lowest), self.highest)

    @field_validator("max_replicas")
    @classmethod
    def _check_range(cls, value: int | None, info: ValidationInfo) -> int | None:
        lowest = info.data.get("min_replicas")
        if lowest is not None and (value is None or value < lowest):
            raise ValueError(f"must be at least min_replicas {lowest}")
        return value


class TargetScalingConfig(Section):
    """When target replicas come and go, where ``max_replicas`` is set."""

    target_load: float = Field(
        default=0.7, gt=0, le=1, description="share of a replica's places, and pages, to be taken"
    )
    up_s: float = Field(default=5.0, ge=0, description="how long there must have been too few")
    down_s: float = Field(default=120.0, ge=0, description="how long there must have been too many")


class DrafterScalingConfig(Section):
    """When drafters come and go, where ``max_replicas`` is set; docs/pool.md says more."""

    min_gain: float = Field(
        default=0.05,
        gt=0,
        le=10,
        description="a drafter is added while 1% more of them promise so many % more tokens/s",
    )
    up_s: float = Field(default=1.0, ge=0, description="how long they must have promised that")
    down_s: float = Field(
        default=30.0, ge=0, description="how long one fewer must have been good enough"
    )
    to_zero_s: float = Field(
        default=60.0, ge=0, description="how long speculation must have been off everywhere"
    )
