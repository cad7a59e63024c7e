"""What happens next."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

Action = Callable[[], None]


class Events:
    """Simulated time, and what is to happen in it; at equal times in the order it was planned.

    Attributes:
        now: simulated seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Action]] = []
        self._count = 0

    def at(self, time: float, action: Action) -> None:
        """Plans ``action`` for ``time``, or for now where that is past."""
        self._count += 1
        heapq.heappush(self._heap, (max(time, self.now), self._count, action))

    def run(self, until: float = math.inf, goes_on: Callable[[], bool] = lambda: True) -> None:
        """Lets everything happen that is planned until then, and what comes of it.

        Args:
            goes_on: asked before each of it; what is planned is left undone once it says no.
        """
        while self._heap and self._heap[0][0] <= until and goes_on():
            self.now, _, action = heapq.heappop(self._heap)
            action()
        if until < math.inf:
            self.now = max(self.now, until)
