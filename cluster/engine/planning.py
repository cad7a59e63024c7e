"""How much of each proposal to verify, and what is learnt from how that went.

The engine's side of calibration: drafters send raw confidences, here they are calibrated, turned
into a budget, and compared with what the verifier said of the tokens they were about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.config import SpeculativeConfig
from cluster.engine.sampler import SampleOutput
from cluster.engine.scheduler import ScheduledSequence
from cluster.engine.sequence import Sequence
from cluster.request import SamplingParams
from cluster.speculation.budget import SearchBudget, make_budget, survival_of
from cluster.speculation.calibration import Calibration
from cluster.speculation.cost_model import CostModel
from cluster.speculation.online_calibration import OnlineCalibration
from cluster.speculation.record import CalibrationKey, VerificationRecord, calibration_key
from cluster.speculation.survival_profile import SurvivalProfile

RecordObserver = Callable[[VerificationRecord], None]


class RoundChoice(NamedTuple):
    """What of a round is verified: draft tokens by sequence, and how many should be accepted."""

    draft_token_ids: dict[Sequence, tuple[int, ...]]
    expected_accepted: float


class RoundPlanner:
    """Chooses each round's budget on calibrated confidences, and keeps the calibration right.

    Guarantees: what is chosen for a round depends on lengths, on that round's confidences in the
    way of its ``BudgetPlanner``, and on passes that were finished before; so rule 3 of DESIGN.md
    holds with online calibration as well (see ``online_calibration``).

    Args:
        config: scheduler and whether to calibrate online.
        cost_model: what a pass costs; kept current by the engine.
        calibration: the drafter's offline fit.
    """

    def __init__(
        self, config: SpeculativeConfig, cost_model: CostModel, calibration: Calibration
    ) -> None:
        self._cost_model = cost_model
        self.profile = SurvivalProfile()
        self._budget = make_budget(config.scheduler, self.profile)
        self._online = OnlineCalibration(calibration, is_fixed=not config.online_calibration)
        self._observer: RecordObserver | None = None

    def use_scheduler(self, scheduler: str) -> None:
        """Plans in another way from the next round on (``SpeculativeConfig.scheduler``)."""
        self._budget = make_budget(scheduler, self.profile)

    @property
    def calibration_error(self) -> float | None:
        """Windowed error of the calibrated survival; ``None`` before enough was verified."""
        return self._online.error

    @property
    def calibration_drift(self) -> float:
        """How far the online scaling is from its offline fit, as a factor; 1 is none."""
        return self._online.drift

    def set_observer(self, observer: RecordObserver | None) -> None:
        """Has every record passed to ``observer``, in the engine's thread (evaluation)."""
        self._observer = observer

    def choose(
        self,
        limits: dict[Sequence, int],
        *,
        num_requests: int,
        num_base_tokens: int,
        num_context_tokens: int,
    ) -> RoundChoice:
        """The drafted tokens of each proposal to verify in the next pass.

        Args:
            limits: sequences with a proposal, and how much of it the pass can hold.
            num_requests: sequences that sample in the pass, with and without a proposal.
            num_base_tokens: tokens that the pass has anyway.
            num_context_tokens: cached tokens of all sequences in the pass.
        """
        proposals = [s.proposal for s in limits if s.proposal is not None]
        widths = np.asarray(list(limits.values()), dtype=np.int64)
        confidences = self._calibrated(limits, widths)
        admitted = self._budget.plan(
            confidences,
            widths,
            cost_model=self._cost_model,
            num_requests=num_requests,
            num_base_tokens=num_base_tokens,
            num_context_tokens=num_context_tokens,
        )
        survival = survival_of(confidences, widths)
        if not isinstance(self._budget, SearchBudget):  # which does so itself
            self.profile.observe(survival, widths)
        is_admitted = np.arange(survival.shape[1]) < admitted[:, None]
        return RoundChoice(
            {
                sequence: proposal.draft_token_ids[:count]
                for sequence, proposal, count in zip(limits, proposals, admitted, strict=True)
            },
            float(survival[is_admitted].sum()),
        )

    def observe(self, entry: ScheduledSequence, sample: SampleOutput) -> None:
        """Learns what became of a proposal; to be called while the sequence still has it."""
        num_admitted = len(entry.draft_token_ids)
        proposal = entry.sequence.proposal
        if proposal is None:
            return
        record = VerificationRecord(
            key=_key(entry.sequence.request.sampling),
            request_id=entry.sequence.request.request_id,
            block_size=proposal.num_draft_tokens,
            confidences=proposal.confidences[:num_admitted],
            num_accepted_tokens=sample.num_accepted_tokens,
            acceptance=sample.acceptance,
        )
        self._online.observe(record)
        if self._observer is not None:
            self._observer(record)

    def _calibrated(
        self, limits: dict[Sequence, int], widths: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Calibrated confidences ``[R, K]``; zero behind each row's width."""
        shape = (len(widths), int(widths.max()))
        confidences = np.zeros(shape)
        rows_by_key: dict[CalibrationKey, list[int]] = {}
        for row, (sequence, width) in enumerate(limits.items()):
            if sequence.proposal is not None:
                confidences[row, :width] = sequence.proposal.confidences[:width]
                rows_by_key.setdefault(_key(sequence.request.sampling), []).append(row)
        for key, rows in rows_by_key.items():
            scaling = self._online.scaling(key, shape[1])
            confidences[rows] = scaling.apply(confidences[rows])
        return np.where(np.arange(shape[1]) < widths[:, None], confidences, 0.0)


def _key(params: SamplingParams) -> CalibrationKey:
    return calibration_key(params.temperature, is_seeded=params.seed is not None)
