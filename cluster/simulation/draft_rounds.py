"""Which sequences a simulated replica drafts for, and with which of its drafters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cluster.simulation.draft_links import SimulatedRound
from cluster.simulation.drafting import Drafting
from cluster.simulation.sequence import SimulatedSequence
from cluster.speculation.speculation_policy import OrderKind, RoundOrder
from cluster.speculation.switch import SpeculationMode

_MAX_INLINE_FEATURES = 16  # of a round; a sequence that lacks more joins one round later
_PROBED_SEQUENCES = 4


class DraftRounds:
    """Sends a group's round as the policy orders it, to drafters that have their features.

    Args:
        running: whose ``fed``, ``asked``, ``link`` and ``is_probed`` it keeps.
        answered: called when a round has all its answers.
    """

    def __init__(
        self,
        drafting: Drafting,
        running: Sequence[SimulatedSequence],
        answered: Callable[[], None],
    ) -> None:
        self._drafting = drafting
        self._running = running
        self._answered = answered

    def assign(self, sequences: Iterable[SimulatedSequence]) -> None:
        """Gives each a drafter."""
        links = self._drafting.links
        num_links = len(links.links)
        if num_links == 0:
            return
        for sequence in sequences:
            sequence.link = -1
            used = [other.link for other in self._running]
            sequence.link = links.choose([used.count(index) for index in range(num_links)])

    def start(self, group: int, order: RoundOrder, now: float) -> SimulatedRound | None:
        """Starts the group's next round, if somebody can be in it."""
        members = [sequence for sequence in self._running if sequence.group == group]
        if order.kind is OrderKind.PROBE:
            members = self._probed(members)
        else:
            self._end_probe()
        if order.kind is OrderKind.NOTHING or not self._drafting.links.links:
            return None
        return self._send(group, members, order, now)

    def _probed(self, members: list[SimulatedSequence]) -> list[SimulatedSequence]:
        """Those that are drafted for in a probe; chosen when it begins."""
        if not any(sequence.is_probed for sequence in self._running):
            able = [s for s in members if s.missing == 1 and s.left > 1]
            able.sort(key=lambda sequence: sequence.context)
            for sequence in able[:_PROBED_SEQUENCES]:
                sequence.is_probed = True
        return [sequence for sequence in members if sequence.is_probed]

    def _end_probe(self) -> None:
        is_plain = self._drafting.policy.mode is SpeculationMode.PLAIN
        for sequence in self._running:
            if sequence.is_probed and is_plain:
                sequence.fed = 0  # its session is closed
            sequence.is_probed = False

    def _send(
        self, group: int, members: Iterable[SimulatedSequence], order: RoundOrder, now: float
    ) -> SimulatedRound | None:
        drafting = self._drafting
        block = drafting.max_tokens
        max_inline = max(_MAX_INLINE_FEATURES, block + 1)
        longest = block if order.max_tokens is None else order.max_tokens
        asked = []
        for sequence in members:
            lacking = sequence.context - sequence.fed
            if lacking <= 0:
                continue
            if sequence.fed == 0 or lacking > max_inline or sequence.missing > 1:
                sequence.fed, sequence.fed_s = sequence.context, now
                continue
            width = min(longest, sequence.left - 1)
            if width > 0 and now - sequence.fed_s >= drafting.links.network_s:
                sequence.fed, sequence.asked = sequence.context, width
                asked.append((sequence.link, width))
        round = None
        if asked:
            wait_s = min(order.wait_s, drafting.timeout_s)
            round = drafting.links.send(asked, wait_s, self._answered)
        drafting.policy.sent(group, len(asked), max((width for _, width in asked), default=0))
        return round
