"""Budgets on calibrated confidences, and the records of what was verified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.config import SpeculativeConfig
from cluster.engine.planning import RoundPlanner
from cluster.engine.sampler import SampleOutput
from cluster.engine.scheduler import ScheduledSequence
from cluster.engine.sequence import Sequence
from cluster.request import Request, SamplingParams
from cluster.speculation.calibration import Calibration, LogitMap, LogitScaling
from cluster.speculation.cost_model import CostModel
from cluster.speculation.proposal import DraftProposal
from cluster.speculation.record import (
    COUPLED,
    REJECTION,
    CalibrationKey,
    VerificationRecord,
    calibration_key,
)
from cluster.speculation.verification import verify_rejection
from tests.engine_tools import make_config, make_engine, run
from tests.models import save_tiny_drafter, save_tiny_target

GREEDY = CalibrationKey(COUPLED, "greedy")
BLOCK = 4


def make_planner(calibration: Calibration | None = None, **overrides: object) -> RoundPlanner:
    config = SpeculativeConfig(model="unused", scheduler="prefix", **overrides)  # type: ignore[arg-type]
    # A token more costs a tenth of a step: a guess pays while its survival is above that.
    cost_model = CostModel({1: 1.0, 101: 11.0})
    return RoundPlanner(config, cost_model, calibration or Calibration())


def scaling(temperature: float, bias: float = 0.0) -> LogitScaling:
    return LogitScaling((LogitMap.straight(temperature, bias),) * BLOCK)


def make_sequence(request_id: str, confidences: tuple[float, ...], **sampling: object) -> Sequence:
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    request = Request(request_id=request_id, prompt_token_ids=(1, 2), sampling=params)
    sequence = Sequence.of(request, max_model_len=100, tokenizer=None)
    sequence.proposal = DraftProposal(tuple(range(5, 5 + len(confidences))), confidences)
    return sequence


def chosen(planner: RoundPlanner, *sequences: Sequence) -> list[int]:
    limits = {s: s.proposal.num_draft_tokens for s in sequences if s.proposal is not None}
    choice = planner.choose(
        limits, num_requests=len(sequences), num_base_tokens=len(sequences), num_context_tokens=0
    )
    return [len(choice.draft_token_ids[sequence]) for sequence in sequences]


def verified(sequence: Sequence, num_admitted: int, num_accepted: int) -> tuple[object, object]:
    tokens = tuple(range(5, 5 + num_admitted))
    sample = SampleOutput(tuple(range(num_accepted + 1)), (), ())
    return ScheduledSequence(sequence, 1, tokens), sample


def test_budget_follows_the_calibrated_confidence() -> None:
    sequence = make_sequence("a", (0.9,) * BLOCK, temperature=0.0)
    (raw,) = chosen(make_planner(), sequence)
    # Overconfident: logits ten times too large, so 0.9 means 0.55.
    (calibrated,) = chosen(make_planner(Calibration({GREEDY: scaling(10.0)})), sequence)
    assert raw == BLOCK
    assert 0 < calibrated < raw
    # A bias alone: odds of 9 become 1.2.
    (shifted,) = chosen(make_planner(Calibration({GREEDY: scaling(1.0, -2.0)})), sequence)
    assert shifted == calibrated


def test_each_request_gets_the_scaling_of_its_verifier() -> None:
    calibration = Calibration({CalibrationKey(REJECTION, "high"): scaling(50.0)})
    greedy = make_sequence("a", (0.9,) * BLOCK, temperature=0.0)
    seeded = make_sequence("b", (0.9,) * BLOCK, seed=7)
    drawn = make_sequence("c", (0.9,) * BLOCK)
    counts = chosen(make_planner(calibration), greedy, seeded, drawn)
    assert counts[0] == counts[1] == BLOCK
    assert counts[2] < BLOCK


def test_the_fixed_budget_takes_the_whole_block_whatever_the_confidence() -> None:
    planner = RoundPlanner(
        SpeculativeConfig(model="unused", scheduler="full"),
        CostModel({1: 1.0}),
        Calibration({GREEDY: scaling(0.1)}),
    )
    assert chosen(planner, make_sequence("a", (0.01,) * BLOCK, temperature=0.0)) == [BLOCK]


@pytest.mark.parametrize("is_online", [True, False])
def test_outcomes_move_later_budgets_and_only_online(is_online: bool) -> None:
    planner = make_planner(online_calibration=is_online)
    sequence = make_sequence("a", (0.9,) * BLOCK, temperature=0.0)
    assert chosen(planner, sequence) == [BLOCK]
    for _ in range(600):  # the first of the guesses is hardly ever right
        planner.observe(*verified(sequence, BLOCK, 0))  # type: ignore[arg-type]
    (after,) = chosen(planner, sequence)
    assert (after < BLOCK) == is_online
    assert (planner.calibration_drift > 1.5) == is_online


def test_rounds_that_admit_nothing_let_outcomes_age() -> None:
    planner = make_planner()
    sequence = make_sequence("a", (0.9,) * BLOCK, temperature=0.0)
    for num_admitted in [BLOCK] * 600 + [0] * 2600:
        planner.observe(*verified(sequence, num_admitted, 0))  # type: ignore[arg-type]
        if num_admitted > 0:
            worst = planner.calibration_drift
    assert worst > 1.5
    assert planner.calibration_drift == pytest.approx(1.0, abs=0.01)


def test_records_say_what_was_admitted_and_accepted() -> None:
    planner = make_planner()
    records: list[VerificationRecord] = []
    planner.set_observer(records.append)
    sequence = make_sequence("a", (0.9, 0.8, 0.7, 0.6), temperature=0.0)
    planner.observe(*verified(sequence, 3, 2))  # type: ignore[arg-type]
    sequence.proposal = None
    planner.observe(*verified(sequence, 0, 0))  # type: ignore[arg-type]  # a plain step
    assert records == [VerificationRecord(GREEDY, "a", BLOCK, (0.9, 0.8, 0.7), 2)]


def test_exact_acceptance_is_the_overlap_of_both_laws() -> None:
    torch.manual_seed(0)
    target = torch.rand(3, 3, 9).softmax(-1)
    draft = torch.rand(3, 2, 9).softmax(-1)
    columns = torch.arange(9).expand(3, 2, 9)
    verification = verify_rejection(
        target_probs=target,
        draft_token_ids=torch.zeros(3, 2, dtype=torch.int64),
        draft_prob_token_ids=columns,
        draft_prob_values=draft,
        num_draft_tokens=torch.tensor([2, 2, 2]),
        accept_uniforms=torch.rand(3, 2),
        recovery_noise=torch.rand(3, 9),
    )
    assert verification.acceptance is not None
    expected = torch.minimum(target[:, :2], draft).sum(-1)
    torch.testing.assert_close(verification.acceptance, expected)


def test_an_engine_reports_every_round(tmp_path: Path) -> None:
    """Greedy, seeded and drawn requests at once: one record each round, and they add up."""
    target = save_tiny_target(tmp_path / "target", scale=2.0)
    engine = make_engine(make_config(target, save_tiny_drafter(tmp_path / "drafter", target)))
    records: list[VerificationRecord] = []
    engine.observe_rounds(records.append)
    params = {
        "greedy": SamplingParams(temperature=0.0, max_tokens=24),
        "seeded": SamplingParams(seed=3, max_tokens=24),
        "drawn": SamplingParams(max_tokens=24),
    }
    requests = [
        Request(request_id=name, prompt_token_ids=(3, 4, 5), sampling=sampling)
        for name, sampling in params.items()
    ]
    done = run(engine, requests)
    for request in requests:
        name, sampling = request.request_id, request.sampling
        mine = [r for r in records if r.request_id == name]
        usage = done[name].usage
        assert usage is not None
        assert len(mine) == usage.speculation.num_drafts > 0
        assert sum(len(r.confidences) for r in mine) == usage.speculation.num_draft_tokens
        accepted = sum(r.num_accepted_tokens for r in mine)
        assert accepted >= usage.speculation.num_accepted_tokens  # the last is cut at the end
        key = calibration_key(sampling.temperature, is_seeded=sampling.seed is not None)
        for record in mine:
            assert record.key == key
            assert len(record.acceptance) == (len(record.confidences) if name == "drawn" else 0)
            assert all(0 < chance < 1 + 1e-6 for chance in record.acceptance)
    drawn = [r for r in records if r.request_id == "drawn"]
    chances = np.array([r.acceptance[0] for r in drawn])
    rate = np.mean([r.num_accepted_tokens > 0 for r in drawn])
    assert abs(rate - chances.mean()) < 4 * np.sqrt((chances * (1 - chances)).sum()) / len(drawn)
