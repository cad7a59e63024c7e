"""How busy each replica is, in arrays that are kept up to date as reports come and requests go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.routing.replica_choice import queued_tokens

_FIRST_CAPACITY = 16


@dataclass(frozen=True)
class ReplicaLoad:
    """What a replica reports of itself.

    Attributes:
        num_queued_tokens: of all routers' requests: to be computed, and outputs expected.
        num_free_tokens: that fit into pages which nobody holds.
        num_routers: that are connected to it.
        mean_output_tokens: how long outputs are there; 0: not known.
    """

    num_queued_tokens: float = 0.0
    num_free_tokens: float = 0.0
    num_routers: int = 1
    mean_output_tokens: float = 0.0


class ReplicaLoads:
    """One entry a replica; its number, the slot, is handed out again when it is freed.

    Attributes:
        is_ready: may be chosen.
        is_refusing: has refused a request since its last report.
        queued: tokens (``queued_tokens``).
        free: tokens for which there are pages.
    """

    def __init__(self) -> None:
        self.is_ready = np.zeros(_FIRST_CAPACITY, dtype=np.bool_)
        self.is_refusing = np.zeros(_FIRST_CAPACITY, dtype=np.bool_)
        self.queued = np.zeros(_FIRST_CAPACITY)
        self.free = np.zeros(_FIRST_CAPACITY)
        self._reports: list[ReplicaLoad] = []
        self._reported: list[float] = []  # queued tokens, less what is known to be done since
        self._unreported: list[float] = []  # tokens sent since the last report
        self._unused: list[int] = []

    @property
    def num_slots(self) -> int:
        """All slots that were ever used are below it."""
        return len(self.is_ready)

    def add(self) -> int:
        """A slot for a replica that is not ready."""
        if self._unused:
            return self._unused.pop()
        slot = len(self._reports)
        self._reports.append(ReplicaLoad())
        self._reported.append(0.0)
        self._unreported.append(0.0)
        if slot == self.num_slots:
            for name in ("is_ready", "is_refusing", "queued", "free"):
                array = getattr(self, name)
                setattr(self, name, np.concatenate([array, np.zeros_like(array)]))
        return slot

    def remove(self, slot: int) -> None:
        """Frees a slot."""
        self.is_ready[slot] = False
        self._unreported[slot] = 0.0
        self.report(slot, ReplicaLoad())
        self._unused.append(slot)

    def report(self, slot: int, load: ReplicaLoad) -> None:
        """Takes what a replica reports."""
        self._reports[slot], self._reported[slot] = load, load.num_queued_tokens
        self.is_refusing[slot] = False
        self._refresh(slot)

    def change_unreported(self, slot: int, num_tokens: float) -> None:
        """More was sent to the replica, or less of that is not in its report."""
        self._unreported[slot] += num_tokens
        self._refresh(slot)

    def change_reported(self, slot: int, num_tokens: float) -> None:
        """Corrects the last report by what is known since."""
        self._reported[slot] = max(self._reported[slot] + num_tokens, 0.0)
        self._refresh(slot)

    def mean_output_tokens(self, slot: int) -> float:
        """How long outputs are there; 0: not known."""
        return self._reports[slot].mean_output_tokens

    def _refresh(self, slot: int) -> None:
        load, unreported = self._reports[slot], self._unreported[slot]
        self.queued[slot] = queued_tokens(self._reported[slot], unreported, load.num_routers)
        self.free[slot] = load.num_free_tokens - unreported * max(load.num_routers, 1)
