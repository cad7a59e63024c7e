"""Paced devices: passes that end when a profile says that a device would have ended them.

So a machine with few cores behaves, in time, as one with a device for every part (DESIGN.md, many
devices on one machine). What a pass really takes counts inside its time; where that is longer, the
pass ends late and is counted as an *overrun*: a paced figure with many of them is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.engine.profile_files import read_profile
from cluster.errors import ConfigError
from cluster.pace_config import PaceConfig
from cluster.speculation.draft_curve import DraftCurve
from cluster.speculation.verify_curve import VerifyCurve


@dataclass(frozen=True)
class PaceStats:
    """What is paced, and how well that went.

    Attributes:
        profile: the device profile's name.
        time_scale: all its times were stretched by this.
        num_passes: paced so far; ``num_overruns`` of them took longer than they should have.
        worst_overrun: largest ratio of the time that a pass took and should have taken; at least 1.
    """

    profile: str
    time_scale: float
    num_passes: int = 0
    num_overruns: int = 0
    worst_overrun: float = 1.0


@dataclass(frozen=True)
class PacedPass:
    """A pass on the device; seconds of the pace's clock."""

    start: float
    end: float


class Pace:
    """A device, or a pipeline of them, that passes go through in order, each stage one at a time.

    One thread uses it. Waiting sleeps: it holds neither a core nor Python's lock, and ends within
    about a tenth of a millisecond of its time on an idle machine.

    Args:
        profile: the profile's name; ``time_scale``: that its times were stretched by. Both are only
            reported.
        num_stages: each takes an equal share of a pass.
        clock, sleep: of the time that is waited for, in seconds.
    """

    def __init__(
        self,
        profile: str,
        time_scale: float,
        *,
        num_stages: int = 1,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._stats = PaceStats(profile, time_scale)
        self._free_at = [0.0] * num_stages
        self._clock = clock
        self._sleep = sleep

    @property
    def stats(self) -> PaceStats:
        """Of all passes that have ended since the start or ``forget``."""
        return self._stats

    def begin(self, seconds: float) -> PacedPass:
        """Gives the device a pass of ``seconds``, now, behind those that it has."""
        start = now = max(self._clock(), self._free_at[0])
        for stage, free_at in enumerate(self._free_at):
            now = max(now, free_at) + seconds / len(self._free_at)
            self._free_at[stage] = now
        return PacedPass(start, now)

    def end(self, paced: PacedPass) -> None:
        """Waits until the device has done a pass; to be called when its real work is done."""
        now = self._clock()
        is_late = now > paced.end
        if is_late:
            self._free_at[-1] = max(self._free_at[-1], now)
        else:
            self._sleep(paced.end - now)
        stats = self._stats
        self._stats = PaceStats(
            stats.profile,
            stats.time_scale,
            stats.num_passes + 1,
            stats.num_overruns + is_late,
            max(stats.worst_overrun, (now - paced.start) / (paced.end - paced.start)),
        )

    def forget(self) -> None:
        """Starts counting anew."""
        self._stats = PaceStats(self._stats.profile, self._stats.time_scale)


@dataclass(frozen=True)
class TargetPace:
    """A target's pace, and the curve that it keeps."""

    pace: Pace
    curve: VerifyCurve


@dataclass(frozen=True)
class DraftPace:
    """A drafter's pace, and the curve that it keeps."""

    pace: Pace
    curve: DraftCurve


def target_pace(config: PaceConfig | None, num_stages: int) -> TargetPace | None:
    """What paces a target's steps, if anything does.

    Raises:
        ConfigError: the profile cannot be read, or has no target.
    """
    if config is None:
        return None
    profile = read_profile(config.profile)
    if profile.target is None:
        raise ConfigError("target.pace.profile", f"{config.profile} has no target")
    pace = Pace(profile.name, config.time_scale, num_stages=num_stages)
    return TargetPace(pace, profile.target.scaled(config.time_scale))


def draft_pace(config: PaceConfig | None) -> DraftPace | None:
    """What paces a drafter's passes, if anything does.

    Raises:
        ConfigError: the profile cannot be read, or has no drafter.
    """
    if config is None:
        return None
    profile = read_profile(config.profile)
    if profile.drafter is None:
        raise ConfigError("drafter.pace.profile", f"{config.profile} has no drafter")
    pace = Pace(profile.name, config.time_scale)
    return DraftPace(pace, profile.drafter.scaled(config.time_scale))
