"""What starting a process costs: no garbage collector meanwhile, and nothing that it needs not."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.garbage import preload, without_collection


def test_it_is_off_inside_and_back_behind_an_error() -> None:
    def fail() -> None:
        with without_collection():
            assert not gc.isenabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert gc.isenabled()


def test_where_it_was_off_it_stays_off() -> None:
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_was_preloaded_is_never_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "many_things.py").write_text("import gc\nWAS_ON = gc.isenabled()\nTHINGS = [[]]\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        preload("many_things")
        module = sys.modules["many_things"]
        assert not module.WAS_ON
        assert gc.isenabled()
        assert not any(held is module.THINGS for held in gc.get_objects())
        made_since: list[list[int]] = [[]]
        preload("many_things")  # which is there: what was made since may go
        assert any(held is made_since for held in gc.get_objects())
    finally:
        gc.unfreeze()
        sys.modules.pop("many_things", None)


def test_what_cannot_be_preloaded_leaves_the_collector_on() -> None:
    with pytest.raises(ModuleNotFoundError):
        preload("cluster.not_there")
    assert gc.isenabled()


def test_a_router_imports_no_network() -> None:
    """Those of transformers are half of what its start would cost, and a third of its memory."""
    program = """
import sys
import cluster.chat.template, cluster.rpc.router
import cluster.engine.target_config, cluster.models.checkpoint
assert "transformers.modeling_utils" not in sys.modules
import cluster.engine.worker
assert "transformers.modeling_utils" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=240)
