"""Whether a replica speculates, and with how many groups: decided on expected goodput."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field


class SpeculationMode(enum.StrEnum):
    """How a replica's passes are made."""

    PLAIN = "plain"  # nothing is drafted and nothing is sent to drafters
    SPECULATIVE = "speculative"  # a pass waits for its round of drafting
    GROUPED = "grouped"  # two groups of sequences: one is verified while the other is drafted for


class SwitchReason(enum.StrEnum):
    """Why a mode is in force, in one of few words."""

    UNKNOWN = "unknown"  # nothing is known yet
    GOODPUT = "goodput"  # it promises the most tokens per second
    IMPOSSIBLE = "impossible"  # the mode before it was possible no longer
    NO_DRAFTER = "no_drafter"  # none is ready
    NOT_CONFIGURED = "not_configured"


_SIBLINGS = {
    SpeculationMode.SPECULATIVE: SpeculationMode.GROUPED,
    SpeculationMode.GROUPED: SpeculationMode.SPECULATIVE,
}


@dataclass(frozen=True, kw_only=True)
class SwitchTiming:
    """How the switch behaves in time.

    Attributes:
        margin: another mode must promise this share more than the one in force.
        crowded_margin: while requests wait for a place, ways to draft must promise this share more
            than plain decoding. What brings as many tokens brings them unevenly, so that the
            slowest tenth of the users pay for a draw; and what waits is never over soon.
        averaging_s: time constant of the promises' averages, which evens out single steps.
        dwell_s: shortest time in a mode; doubles with every flip of the last ``calm_s``.
        max_dwell_s: where that ends.
        calm_s: after so long without a flip the shortest dwell holds again.
        evidence_s: what a mode has delivered is judged over about so much of its own time; and
        evidence_requests: how many tokens it brings, over as many requests' passes at least, of
            which each is chance.
        forget_s: what was learnt of a mode fades with this time constant while it is not in force.
        probe_s: shortest time between two probes.
        probe_share: of the time that probes may cost.
        doubt: plain passes are probed while speculating promises less than this share more.
    """

    margin: float = 0.03
    crowded_margin: float = 0.1
    averaging_s: float = 0.2
    dwell_s: float = 0.5
    max_dwell_s: float = 4.0
    calm_s: float = 20.0
    evidence_s: float = 2.0
    evidence_requests: float = 200.0
    forget_s: float = 60.0
    probe_s: float = 5.0
    probe_share: float = 0.005
    doubt: float = 0.3


@dataclass
class _Ratio:
    """Delivered over promised, old steps fading."""

    delivered: float = 0.0
    promised: float = 0.0
    evidence: float = 0.0  # of the steps that it is of; 1: as much as it is judged over
    updated: float = -math.inf

    def observe(
        self, delivered: float, promised: float, evidence: float, now: float, timing: SwitchTiming
    ) -> None:
        """One step more, which is so much evidence."""
        keep = self._kept(now, timing) * math.exp(-evidence)
        self.delivered = keep * self.delivered + delivered
        self.promised = keep * self.promised + promised
        self.evidence = keep * self.evidence + evidence
        self.updated = now

    def value(self, now: float, timing: SwitchTiming, *, prior: float = 1.0) -> float:
        """What is known of it; ``prior`` where nothing is."""
        if self.promised <= 0:
            return prior
        evidence = self._kept(now, timing) * self.evidence
        if evidence <= 0:
            return prior
        known = self.delivered / self.promised
        return (known * evidence + prior * _PRIOR_EVIDENCE) / (evidence + _PRIOR_EVIDENCE)

    def _kept(self, now: float, timing: SwitchTiming) -> float:
        return math.exp(-max(now - self.updated, 0.0) / timing.forget_s)


_PRIOR_EVIDENCE = 0.1  # that a mode delivers what it promises, from the beginning
_UNKNOWN = _Ratio()  # of what was never in force


@dataclass
class SpeculationSwitch:
    """Chooses the mode with the most goodput, with a margin, a dwell time and probing.

    *Promised* goodput comes from the cost model. What no model knows (drafters that share the
    target's processor, host work, a drafter that is worse than its confidences) shows as a
    difference between what a mode promises and what it delivers while it is in force; promises are
    corrected by that. The time that passes take is corrected mode by mode; how many tokens they
    bring is a matter of the text, and is the same for both ways to draft. What was learnt of a
    mode that is not in force fades, so that it gets another chance: a mode that keeps
    disappointing costs one short trial in a while.

    While nothing is drafted, acceptance and drafters' times grow old, and while all is drafted for
    nobody knows what plain passes would deliver: ``is_probe_due`` says when to draft for a few
    sequences, or to make a few passes plainly, so seldom that it costs ``probe_share`` at most.

    Pure: it is given the time (seconds of any one monotonic clock).

    Attributes:
        mode: in force; the first decision takes the one that promises the most.
        reason: why, in words for people; ``reason_code`` in one word for machines.
        num_flips: times that it went from plain to one of the others or back.
    """

    timing: SwitchTiming = field(default_factory=SwitchTiming)
    mode: SpeculationMode = SpeculationMode.SPECULATIVE
    reason: str = "nothing is known yet"
    reason_code: SwitchReason = SwitchReason.UNKNOWN
    num_flips: int = 0
    _entered: float | None = None
    _dwell_s: float = 0.0
    _last_change: float = -math.inf
    _averages: dict[SpeculationMode, float] = field(default_factory=dict)
    _averaged: float | None = None
    _pass_times: dict[SpeculationMode, _Ratio] = field(default_factory=dict)
    _tokens: dict[bool, _Ratio] = field(default_factory=dict)  # by whether it was drafted for them
    _seconds: dict[SpeculationMode, float] = field(default_factory=dict)
    _counted: float | None = None
    _last_probe: float = -math.inf
    _probe_cost_s: float = 0.0

    def decide(
        self,
        promised: Mapping[SpeculationMode, float],
        now: float,
        *,
        is_plain_allowed: bool = True,
        is_crowded: bool = False,
    ) -> SpeculationMode:
        """The mode for the next pass.

        Args:
            promised: tokens per second of PLAIN and of each other mode that is possible now.
            now: seconds.
            is_plain_allowed: False: one of the others is taken, whatever it promises.
            is_crowded: requests wait for a place.
        """
        self._count(now)
        is_first = self._entered is None
        if self._entered is None:
            self._entered, self._dwell_s = now, self.timing.dwell_s
        averages = self._average(promised, now)
        handicap = math.log1p(self.timing.crowded_margin) if is_crowded else 0.0
        choice = {
            mode: value if mode is SpeculationMode.PLAIN else value - handicap
            for mode, value in averages.items()
            if is_plain_allowed or mode is not SpeculationMode.PLAIN
        }
        best = max(choice, key=lambda mode: (choice[mode], mode is self.mode))
        if is_first:  # nothing is left that had to prove itself
            self.mode = best
        if self.mode not in choice:
            self._enter(best, now, f"{self.mode} is not possible now", is_forced=True)
            self.reason_code = SwitchReason.IMPOSSIBLE
            return self.mode
        self.reason_code = SwitchReason.GOODPUT
        gain = choice[best] - choice[self.mode]
        if best is not self.mode and gain > math.log1p(self.timing.margin):
            if now - self._entered >= self._dwell_s:
                promised_gain = math.expm1(averages[best] - averages[self.mode])
                reason = f"{best} promises {promised_gain:+.0%} tokens/s"
                self._enter(best, now, f"{reason}, and requests wait" if is_crowded else reason)
        else:
            drafting = [v for m, v in averages.items() if m is not SpeculationMode.PLAIN]
            gain = math.expm1(max(drafting) - averages[SpeculationMode.PLAIN])
            self.reason = f"speculating promises {gain:+.0%} tokens/s over plain decoding"
        return self.mode

    def force_plain(self, reason: str, now: float, code: SwitchReason) -> None:
        """Goes over to plain decoding at once, for a reason that is none of goodput."""
        self._count(now)
        if self.mode is not SpeculationMode.PLAIN:
            self._enter(SpeculationMode.PLAIN, now, reason, is_forced=True)
        self.reason, self.reason_code = reason, code

    def observe(
        self,
        mode: SpeculationMode,
        *,
        num_requests: float,
        tokens: float,
        seconds: float,
        promised_tokens: float,
        promised_seconds: float,
        now: float,
    ) -> None:
        """What a pass of so many requests delivered, and what was promised of just this pass."""
        if not 0 < seconds < math.inf or not 0 < promised_seconds < math.inf:
            return
        # A machine's hiccup is no news about a mode; what stays is learnt all the same.
        seconds = min(max(seconds, promised_seconds / 2), 2 * promised_seconds)
        timing = self.timing
        times = self._pass_times.setdefault(mode, _Ratio())
        share = seconds / timing.evidence_s
        times.observe(seconds, promised_seconds, share, now, timing)
        yields = self._tokens.setdefault(mode is not SpeculationMode.PLAIN, _Ratio())
        share = min(share, num_requests / timing.evidence_requests)
        yields.observe(tokens, promised_tokens, share, now, timing)

    def correction(self, mode: SpeculationMode, now: float) -> float:
        """Delivered over promised goodput of a mode, as far as is known; 1 where nothing is.

        Passes of a way to draft that was not in force lately are expected to be as much slower than
        promised as those of the other one: what slows one mostly slows both.
        """
        times, slower = self._pass_times, 1.0
        if mode in _SIBLINGS:
            slower = times.get(_SIBLINGS[mode], _UNKNOWN).value(now, self.timing)
        slower = times.get(mode, _UNKNOWN).value(now, self.timing, prior=slower)
        tokens = self._tokens.get(mode is not SpeculationMode.PLAIN, _UNKNOWN)
        return min(max(tokens.value(now, self.timing) / slower, 0.25), 4.0)

    def is_probe_due(self, now: float) -> bool:
        """Whether to try for a moment what is not in force: drafting, or plain passes."""
        if self.mode is not SpeculationMode.PLAIN:
            gain = self._averages.get(self.mode, math.inf)
            if gain > math.log1p(self.timing.doubt) or len(self._averages) == 1:
                return False
        wait_s = max(self.timing.probe_s, self._probe_cost_s / self.timing.probe_share)
        since = max(self._last_probe, self._entered or 0.0)
        return now - since >= wait_s

    def probed(self, cost_s: float, now: float) -> None:
        """A probe is over; ``cost_s`` is the time that it took from all sequences."""
        self._last_probe = now
        self._probe_cost_s = cost_s

    def seconds_in_mode(self, now: float) -> dict[SpeculationMode, float]:
        """Time spent in each mode so far."""
        self._count(now)
        return dict(self._seconds)

    def seconds_since_change(self, now: float) -> float:
        """Time since the mode in force was entered; 0 before the first decision."""
        return 0.0 if self._entered is None else now - self._entered

    def _average(
        self, promised: Mapping[SpeculationMode, float], now: float
    ) -> dict[SpeculationMode, float]:
        """Moving averages of the logarithms of corrected promises, of the modes possible now."""
        elapsed_s = math.inf if self._averaged is None else max(now - self._averaged, 0.0)
        self._averaged = now
        weight = 1.0 - math.exp(-elapsed_s / self.timing.averaging_s)
        current = {
            mode: math.log(goodput * self.correction(mode, now))
            for mode, goodput in promised.items()
            if goodput > 0
        }
        plain = current[SpeculationMode.PLAIN]
        # Relative to plain decoding, so that the load's own ups and downs cancel.
        for mode, value in current.items():
            relative = value - plain
            former = self._averages.get(mode, relative)
            self._averages[mode] = former + weight * (relative - former)
        return {mode: self._averages[mode] for mode in current}

    def _enter(
        self, mode: SpeculationMode, now: float, reason: str, *, is_forced: bool = False
    ) -> None:
        is_flip = SpeculationMode.PLAIN in (mode, self.mode)
        if is_forced:  # what forced it may be over soon
            self._dwell_s = 0.0
        elif now - self._last_change > self.timing.calm_s:
            self._dwell_s = self.timing.dwell_s
        else:
            doubled_s = max(2 * self._dwell_s, self.timing.dwell_s)
            self._dwell_s = min(doubled_s, self.timing.max_dwell_s)
        self._last_change = self._entered = now
        self.mode, self.reason = mode, reason
        self.num_flips += is_flip

    def _count(self, now: float) -> None:
        if self._counted is not None:
            spent = max(now - self._counted, 0.0)
            self._seconds[self.mode] = self._seconds.get(self.mode, 0.0) + spent
        self._counted = now
