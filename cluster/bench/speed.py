"""Suite ``speed``: our engine and cluster against vLLM on the same checkpoint, prompts and cores.

Three parts. *steps*: plain decode steps of both engines in process. *throughput*: our whole
cluster, drafter and router included, against the peer's server at its best of plain, n-gram and
draft-model decoding. *formula*: our time per token at concurrency 1 against (draft time + verify
time) / acceptance length, each term measured alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.bench.load_prompts import PromptSource
from cluster.bench.load_shape import LoadShape
from cluster.bench.own_serving import OwnSettings, profile_curve
from cluster.bench.paired import paired_ratio
from cluster.bench.peer import PeerSettings
from cluster.bench.plain_steps import compare_steps, start_own_steps
from cluster.bench.report import Report
from cluster.bench.served_load import (
    OURS,
    SideResults,
    measure_in_turn,
    peer_servers,
)
from cluster.engine.target_config import load_tokenizer
from cluster.errors import DsparkError

PARTS = ("steps", "throughput", "formula")
PLAIN, NGRAM, DRAFT_MODEL = "plain", "ngram", "draft_model"
# Least ratio of throughput by concurrency; least share of the formula's speed; longest step.
_THROUGHPUT_BARS = {1: 1.8, 2: 1.6, 4: 1.4, 8: 1.1, 16: 1.0, 32: 1.0}
_STEP_BAR, _STEP_BAR_HIGH = 1.0, 1.03
_FORMULA_BAR = 1.15
_ACCEPTANCE_LENGTHS = (2, 3, 4)
_FORMULA_PROMPTS = 6
_DIGITS = 4

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """What the suite measures.

    Attributes:
        own, peer: the two sides.
        peer_modes: the peer's ``--speculative-config`` by mode, ``None`` for plain decoding.
        parts: of ``PARTS``.
        data: prompts, as ``load_prompt_set``.
        runs: paired runs.
        batches, contexts, steps: of the plain steps; ``steps`` counted ones in each run.
        curve_repeats: of each point of our verify curve.
        shape: of the load.
        folder: exists; takes logs, and the figures of each part as soon as they are there.
    """

    own: OwnSettings
    peer: PeerSettings
    peer_modes: Mapping[str, Mapping[str, Any] | None]
    folder: Path
    parts: tuple[str, ...] = PARTS
    data: str = "stdlib-heldout"
    runs: int = 5
    batches: tuple[int, ...] = (1, 4, 8, 16, 32)
    contexts: tuple[int, ...] = (150, 900)
    steps: int = 8
    curve_repeats: int = 5
    shape: LoadShape = field(default_factory=LoadShape)


def run(settings: SpeedSettings, note: Note) -> Report:
    """Runs the parts; passes where every figure that was measured holds its bar.

    Raises:
        ConfigError: there is no peer in the virtual environment, or ours cannot be served so.
        DsparkError: a side cannot be started, or a request failed.
    """
    figures: dict[str, Any] = {"plain_step": [], "throughput": []}
    bars = []
    if "steps" in settings.parts:
        figures["plain_step"] = _plain_steps(settings, note)
        bars += [
            row["ratio"] <= _STEP_BAR and row["ratio_high"] <= _STEP_BAR_HIGH
            for row in figures["plain_step"]
        ]
        _keep(settings, figures)
    if "throughput" in settings.parts or "formula" in settings.parts:
        note("measuring our verify curve")
        own = profile_curve(settings.own, settings.folder, settings.curve_repeats)
        settings = replace(settings, own=own)
        sides, figures["peer_failures"] = _served(settings, note)
        figures["throughput"] = throughput_rows(sides)
        figures["sides"] = side_rows(sides)
        bars += [row["ratio"] >= row["bar"] for row in figures["throughput"]]
        _keep(settings, figures)
        if "formula" in settings.parts:
            figures["formula"] = _formula(settings, sides[OURS], note)
            bars.append(figures["formula"]["ratio"] <= _FORMULA_BAR)
    return Report(suite="speed", figures=figures, passed=all(bars))


def throughput_rows(sides: Mapping[str, SideResults]) -> list[dict[str, Any]]:
    """Ours against the peer's best mode, by concurrency, and what other acceptance would give.

    ``ratio_at_N`` is the ratio with the measured time of a round and an acceptance length of N, but
    at most the budget + 1 of that concurrency, beyond which no length can be.
    """
    peers = [name for name in sides if name != OURS]
    rows = []
    for concurrency in sides[OURS].by_concurrency:
        medians = {p: statistics.median(sides[p].throughputs(concurrency)) for p in peers}
        best = max(peers, key=lambda mode: medians[mode])
        ours, peer = sides[OURS].throughputs(concurrency), sides[best].throughputs(concurrency)
        row: dict[str, Any] = {"concurrency": concurrency, **paired_ratio(ours, peer)}
        own = sides[OURS].median_figures(concurrency)
        length, budget = own["tokens_per_pass"] or 1.0, own["budget"] or 0.0
        row |= {
            "bar": _THROUGHPUT_BARS.get(concurrency, 1.0),
            "peer_mode": best,
            **{f"peer_{mode}": round(value, 2) for mode, value in medians.items()},
            "tokens_per_pass": own["tokens_per_pass"],
            "budget": own["budget"],
            "round_ms": round(1e3 * concurrency * length / row["ours"], _DIGITS),
        }
        for other in _ACCEPTANCE_LENGTHS:
            reached = min(float(other), 1 + budget)
            row[f"ratio_at_{other}"] = round(row["ratio"] * reached / length, _DIGITS)
        rows.append(row)
    return rows


def side_rows(sides: Mapping[str, SideResults]) -> list[dict[str, Any]]:
    """All load figures of every side, a row for each concurrency."""
    return [
        {"side": name, "concurrency": concurrency, **results.median_figures(concurrency)}
        for name, results in sides.items()
        for concurrency in results.by_concurrency
    ]


def formula_figures(
    *, time_per_token_s: float, tokens_per_pass: float, draft_s: float, verify_s: float
) -> dict[str, Any]:
    """Measured time per token against (draft time + verify time) / acceptance length."""
    expected_s = (draft_s + verify_s) / tokens_per_pass
    return {
        "draft_ms": round(1e3 * draft_s, _DIGITS),
        "verify_ms": round(1e3 * verify_s, _DIGITS),
        "acceptance_length": round(tokens_per_pass, _DIGITS),
        "expected_ms": round(1e3 * expected_s, _DIGITS),
        "measured_ms": round(1e3 * time_per_token_s, _DIGITS),
        "ratio": round(time_per_token_s / expected_s, _DIGITS),
    }


def _keep(settings: SpeedSettings, figures: Mapping[str, Any]) -> None:
    """So that what took long is there, whatever becomes of the parts behind it."""
    path = settings.folder / "figures-so-far.json"
    path.write_text(json.dumps(figures) + "\n", encoding="utf-8")


def _plain_steps(settings: SpeedSettings, note: Note) -> list[dict[str, Any]]:
    count = sum(settings.batches) * len(settings.contexts)
    prompts = _prompts(settings, count=count, num_tokens=max(settings.contexts))
    # One budget of a pass, so that both sides reach the first step with the same contexts.
    tokens = settings.peer.max_num_batched_tokens
    own = replace(settings.own, max_num_batched_tokens=tokens)
    note("starting both engines")
    with (
        settings.peer.start_steps(settings.folder / "peer-steps.log") as peer_server,
        start_own_steps(own, settings.folder / "own-steps.log") as own_server,
    ):
        return compare_steps(
            own_server,
            peer_server,
            prompts,
            batches=settings.batches,
            contexts=settings.contexts,
            runs=settings.runs,
            steps=settings.steps,
            note=note,
        )


def _served(settings: SpeedSettings, note: Note) -> tuple[dict[str, SideResults], dict[str, str]]:
    shape, runs = settings.shape, settings.runs
    prompts = _prompts(settings, count=shape.num_prompts(runs), num_tokens=shape.prompt_tokens)
    with peer_servers(settings.peer, settings.peer_modes, settings.folder, note) as started:
        servers, failures = started
        sides = measure_in_turn(
            settings.own, servers, prompts, shape, runs=runs, folder=settings.folder, note=note
        )
    return sides, failures


def _formula(settings: SpeedSettings, ours: SideResults, note: Note) -> dict[str, Any]:
    """Needs the results at concurrency 1, and nothing that runs beside it."""
    note("measuring the terms of a round alone")
    figures = ours.median_figures(1)
    shape = settings.shape
    prompts = _prompts(settings, count=_FORMULA_PROMPTS, num_tokens=shape.prompt_tokens)
    argument = {
        "values": settings.own.values(),
        "prompts": [prompts.take() for _ in range(_FORMULA_PROMPTS)],
        "max_tokens": shape.max_tokens,
        "verify_tokens": 1 + round(figures["budget"] or 0),
    }
    done = subprocess.run(
        [sys.executable, "-m", "cluster.bench.round_terms", json.dumps(argument)],
        env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise DsparkError(f"the terms of a round: {done.stderr.strip().splitlines()[-1:]}")
    return formula_figures(
        time_per_token_s=1 / figures["throughput"],
        tokens_per_pass=figures["tokens_per_pass"],
        **json.loads(done.stdout),
    )


def _prompts(settings: SpeedSettings, *, count: int, num_tokens: int) -> PromptSource:
    tokenizer = load_tokenizer(settings.own.target)
    return PromptSource(settings.data, tokenizer, count=count, num_tokens=num_tokens)
