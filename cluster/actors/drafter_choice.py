"""Which drafter a running cluster uses: as it was started, or as it was swapped since.

What is swapped to is in the ``user_config`` of the deployments ``Drafter`` and ``TargetReplica``:
``{"speculative": {…}}``, or ``{"speculative": null}`` for plain decoding. Serve hands a change of
it to the replicas that run, in ``reconfigure``, and starts new ones with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayTaskError

from cluster.config import ClusterConfig, SpeculativeConfig
from cluster.errors import ConfigError

_RETRY_S = 0.2

_logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, kw_only=True)
class DrafterInUse:
    """What a target replica or a drafter answers when it is asked how far a swap is.

    Attributes:
        wanted: what it was told to use last.
        in_use: what it uses now; differs from ``wanted`` until that is loaded.
        error: why it cannot use what is wanted, else empty.
    """

    wanted: SpeculativeConfig | None
    in_use: SpeculativeConfig | None
    error: str = ""


class DrafterChoice:
    """Carries out one swap after the other in the background.

    Guarantees: ``want`` returns at once and never raises; what is in use stays in use until what
    is wanted can take its place, and for good where that fails; of several wishes the last wins.

    Args:
        config: what the replica has started with.
        use: goes over to a configuration's drafter, which may be the one in use. Returns False
            where that must wait: it is called again until it returns True, raises, or something
            else is wanted.
    """

    def __init__(
        self, config: ClusterConfig, use: Callable[[ClusterConfig], Awaitable[bool]]
    ) -> None:
        self._wanted = config
        self._in_use = config.speculative
        self._error = ""
        self._use = use
        self._changed = asyncio.Event()

    def state(self) -> DrafterInUse:
        """How far it is."""
        return DrafterInUse(wanted=self._wanted.speculative, in_use=self._in_use, error=self._error)

    def want(self, user_config: Any) -> None:
        """Takes the ``user_config`` that Serve hands over."""
        try:
            self._wanted = with_user_config(self._wanted, user_config)
        except ConfigError as error:  # who raises in `reconfigure` is replaced by Serve
            _logger.error("the drafter stays as it is: %s", error)
            self._error = str(error)
            return
        self._error = ""
        self._changed.set()

    async def run(self) -> None:
        """Carries out what is wanted, until it is cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            config = self._wanted
            try:
                while not (is_used := await self._use(config)) and self._wanted is config:
                    await asyncio.sleep(_RETRY_S)
            except Exception as error:  # whatever it was, what is in use goes on
                _logger.exception("the drafter stays as it is")
                if self._wanted is config:
                    self._error = _describe(error)
                continue
            if is_used and config.speculative != self._in_use:
                self._in_use = config.speculative
                _logger.info("in use: %s", to_user_config(config.speculative))


def to_user_config(speculative: SpeculativeConfig | None) -> dict[str, Any]:
    """The ``user_config`` that tells replicas to use it."""
    if speculative is None:
        return {"speculative": None}
    return {"speculative": speculative.model_dump(mode="json", exclude_unset=True)}


def with_user_config(config: ClusterConfig, user_config: Any) -> ClusterConfig:
    """The configuration with the drafter of ``user_config``; unset: as it is.

    Raises:
        ConfigError: ``user_config`` is not what ``to_user_config`` makes.
    """
    if user_config is None:
        return config
    if not isinstance(user_config, dict) or user_config.keys() != {"speculative"}:
        raise ConfigError("user_config", "must be a mapping with the one key 'speculative'")
    return ClusterConfig.parse({**config.model_dump(exclude_unset=True), **user_config})


def starting_config(config: ClusterConfig) -> ClusterConfig:
    """The configuration that this replica of a deployment is to start with.

    Args:
        config: that the application was built with.
    """
    # Serve calls `reconfigure` only behind the constructor, which would load the former drafter.
    return with_user_config(config, serve.get_replica_context()._deployment_config.user_config)


def _describe(error: Exception) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {cause}"
