"""Which sequences a simulated replica drafts for, and with which of its drafters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cluster.simulation.draft_links import SimulatedRound
from cluster.simulation.drafting import Drafting
from cluster.simulation.running import Running
from cluster.speculation.speculation_policy import OrderKind, RoundOrder
from cluster.speculation.switch import SpeculationMode

Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_MAX_INLINE_FEATURES = 16  # of a round; a sequence that lacks more joins one round later
_PROBED_SEQUENCES = 4


class DraftRounds:
    """Sends a group's round as the policy orders it, to drafters that have their features.

    Args:
        running: whose ``fed``, ``asked``, ``link`` and ``probed`` it keeps.
        answered: called when a round has all its answers.
    """

    def __init__(self, drafting: Drafting, running: Running, answered: Callable[[], None]) -> None:
        self._drafting = drafting
        self._running = running
        self._answered = answered

    def assign(self, rows: Integers) -> None:
        """Gives sequences a drafter each."""
        links, run = self._drafting.links, self._running
        if not links.links:
            return
        if len(links.links) == 1:
            run.link[rows] = 0
            return
        for row in rows.tolist():
            others = np.arange(len(run)) != row
            counts = np.bincount(run.link[others & (run.link >= 0)], minlength=len(links.links))
            run.link[row] = links.choose(counts)

    def start(
        self, group: int, member: Mask, order: RoundOrder, now: float
    ) -> SimulatedRound | None:
        """Starts the group's next round, if somebody can be in it.

        Args:
            member: ``[sequences]`` of the group.
        """
        policy, run = self._drafting.policy, self._running
        if order.kind is OrderKind.PROBE:
            if not any(run.probed.tolist()):
                able = np.flatnonzero(member & (run.missing == 1) & (run.left > 1))
                chosen = able[np.argsort(run.context[able], kind="stable")[:_PROBED_SEQUENCES]]
                run.probed[chosen] = 1
            member = member & (run.probed == 1)
        elif any(run.probed.tolist()):
            if policy.mode is SpeculationMode.PLAIN:
                run.fed[run.probed == 1] = 0  # their sessions are closed
            run.probed[:] = 0
        if order.kind is OrderKind.NOTHING or not self._drafting.links.links:
            return None
        return self._send(group, member, order, now)

    def _send(
        self, group: int, member: Mask, order: RoundOrder, now: float
    ) -> SimulatedRound | None:
        drafting, run = self._drafting, self._running
        block = drafting.max_tokens
        max_inline = max(_MAX_INLINE_FEATURES, block + 1)
        lacking = run.context - run.fed
        in_bulk = (run.fed == 0) | (lacking > max_inline) | (run.missing > 1)
        in_bulk &= member & (lacking > 0)
        widths = np.minimum(block if order.max_tokens is None else order.max_tokens, run.left - 1)
        is_there = now - run.fed_s >= drafting.links.network_s
        joins = member & ~in_bulk & (lacking > 0) & is_there & (widths > 0)
        run.fed[in_bulk] = run.context[in_bulk]
        run.fed_s[in_bulk] = now
        run.fed[joins] = run.context[joins]
        rows = np.flatnonzero(joins)
        round, num_tokens = None, 0
        if len(rows):
            asked = widths[rows]
            num_tokens = max(asked.tolist())
            run.asked[rows] = asked
            wait_s = min(order.wait_s, drafting.timeout_s)
            round = drafting.links.send(run.link[rows], asked, wait_s, self._answered)
        drafting.policy.sent(group, len(rows), num_tokens)
        return round
