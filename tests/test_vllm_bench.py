"""vLLM's own ``vllm bench serve``, unchanged, against this project's HTTP API."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api_tools import ApiServer, serving
from tests.engine_tools import make_config
from tests.models import DRAFTER, TARGET

PEER_VENV = os.environ.get("DSPARK_PEER_VENV")
NUM_PROMPTS, NUM_TOKENS = 8, 16

pytestmark = pytest.mark.skipif(
    PEER_VENV is None, reason="$DSPARK_PEER_VENV names no environment with vLLM (docs/bench.md)"
)


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    with serving(make_config(TARGET, DRAFTER, max_model_len=512), chat_template="chatml") as server:
        yield server


@pytest.mark.parametrize(
    ("backend", "path"), [("openai", "completions"), ("openai-chat", "chat/completions")]
)
def test_it_runs_to_its_end(server: ApiServer, backend: str, path: str, tmp_path: Path) -> None:
    arguments = {
        "backend": backend,
        "base-url": server.url,
        "endpoint": f"/v1/{path}",
        "model": "stdlib-7m",
        "tokenizer": TARGET,
        "temperature": 0,
        "dataset-name": "random",
        "random-input-len": 32,
        "random-output-len": NUM_TOKENS,
        "num-prompts": NUM_PROMPTS,
        "max-concurrency": 4,
        "result-dir": tmp_path,
        "result-filename": "result.json",
    }
    options = [f"--{name}={value}" for name, value in arguments.items()]
    command = [f"{PEER_VENV}/bin/vllm", "bench", "serve", "--save-result", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (NUM_PROMPTS, 0)
    assert result["total_output_tokens"] == NUM_PROMPTS * NUM_TOKENS
    # It finds speculation in our metrics, by vLLM's names.
    assert result["spec_decode_num_drafts"] > 0
