"""Where an engine's verify curve comes from, and how it gets better while nothing is asked."""

from __future__ import annotations

import logging

from cluster.config import TargetConfig
from cluster.engine.cache_folder import cache_folder
from cluster.engine.curve_files import CurveCache, read_curve
from cluster.engine.machine import curve_origin
from cluster.engine.profile import CurveProfiler, StepProbe

logger = logging.getLogger(__name__)


class CurveKeeper:
    """Has a curve at once, and a thorough one later.

    A paced target keeps to a curve: it is that one. A configured file is used as it is. Otherwise a
    curve of this target, layout and machine is taken from the cache; where there is none, a quick
    profile of about a second is made. Then every point of the grid is measured while the engine is
    idle, pass by pass, and the result is cached.

    Args:
        probe: measures steps; none may be under way.
        config: of the target.
        target_digest: of the target's files; unset: nothing is looked up in the cache or put there.

    Raises:
        ConfigError: the configured file is no curve; names the file and the key.
    """

    def __init__(self, probe: StepProbe, config: TargetConfig, target_digest: str | None) -> None:
        self._cache = (
            CurveCache(cache_folder("verify-curves")) if target_digest is not None else None
        )
        self._profiler: CurveProfiler | None = None
        if probe.pace is not None:
            self.curve = probe.pace.curve
            probe.warm_up()
            probe.pace.pace.forget()
            return
        if config.verify_curve is not None:
            self.curve = read_curve(config.verify_curve)
            probe.warm_up()
            return
        origin = None
        if target_digest is not None:
            origin = curve_origin(config, target_digest, probe.execution)
        self._profiler = CurveProfiler(probe, origin)
        cached = None
        if self._cache is not None and origin is not None:
            cached = self._cache.load(origin)
        if cached is not None and cached.origin is not None:
            logger.info("serving with the verify curve of %s", cached.origin.measured_at)
            probe.warm_up()
        self.curve = cached or self._profiler.profile_quickly()

    @property
    def is_mid_visit(self) -> bool:
        """Whether the next ``improve`` should follow at once, as it measures the same again."""
        return self._profiler is not None and self._profiler.is_mid_visit

    def improve(self) -> bool:
        """Spends at most one pass on the curve; only while no request is being served.

        Returns:
            Whether ``curve`` is a new one now, which is saved as well.
        """
        if self._profiler is None:
            return False
        curve = self._profiler.continue_visit()
        if curve is None:
            return False
        self.curve = curve
        self._profiler = None
        if self._cache is not None:
            self._cache.save(curve)
        return True
