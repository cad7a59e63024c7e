"""Suite ``verify_curve``: its batches and its figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bench import verify_curve
from cluster.bench.verify_curve import random_batches
from tests.models import save_tiny_target


def test_batches_are_those_of_the_suite_s_limits() -> None:
    batches = random_batches(300, seed=1)
    assert random_batches(300, seed=1) == batches
    for batch in batches:
        assert len(batch.query_lens) == len(batch.cached_lens) <= 16
        assert sum(batch.query_lens) <= 256
        lens = zip(batch.query_lens, batch.cached_lens, strict=True)
        assert all(1 <= query + cached <= 1024 for query, cached in lens)
    assert any(len(set(batch.query_lens)) > 1 for batch in batches), "no batch has a prompt's chunk"


def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_curve, "_TURNS", 1)
    target = save_tiny_target(tmp_path, max_position_embeddings=1024)
    figures = verify_curve.run(target=target, num_batches=5).figures
    assert figures["batches"] == 5
    assert 0 < figures["step_ms"]["least"] <= figures["step_ms"]["most"]
    for name in ("error_by_tokens", "error_by_tokens_and_context"):
        assert 0 <= figures[name]["median"] <= figures[name]["p90"]
