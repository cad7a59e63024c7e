"""Suite ``gpu-steps``: what a step costs on a CUDA device, against reading its weights once.

The target is a Qwen3 of Qwen3-8B's shape with random bf16 weights, made on the spot. A step is a
whole one, from flattening to sampled tokens. The device's bandwidth is that of a large copy on it,
bytes read and bytes written together.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from cluster.bench.report import Report
from cluster.config import ClusterConfig
from cluster.engine.local_shards import local_shards
from cluster.engine.pages import PagePool
from cluster.engine.profile import StepProbe
from cluster.errors import ConfigError

_BAR = 1.25
_COPIED_BYTES = 2**31
_MAX_MODEL_LEN = 4096
# Batch tokens and cached tokens, sequences of up to 8 tokens each.
_SIZES = (
    *((1, 150), (1, 900), (2, 300), (4, 300), (8, 300), (8, 900), (16, 600), (32, 1200)),
    *((64, 2400), (64, 20000), (128, 4800), (256, 9600), (512, 0), (2048, 0)),
)


def run(*, num_layers: int = 36, repeats: int = 15, note: Callable[[str], None]) -> Report:
    """Runs the suite; passes where a step of one token takes at most 1.25 times its floor.

    Args:
        num_layers: Qwen3-8B has 36.
        repeats: of each size, of which the median counts.

    Raises:
        ConfigError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ConfigError("target.device", "this machine, or its build of torch, has no CUDA")
    bandwidth = _copy_bandwidth()
    with tempfile.TemporaryDirectory() as folder:
        total, read = _write_random_target(Path(folder), num_layers)
        note(f"wrote {total / 1e9:.1f} GB of weights")
        start = time.monotonic()
        values: dict[str, Any] = {
            "model": folder,
            "dtype": "bfloat16",
            "device": "cuda",
            "max_num_seqs": 64,
            "max_num_batched_tokens": 2048,
            "max_model_len": _MAX_MODEL_LEN,
            "kv_cache_memory_mb": 20_000,
        }
        config = ClusterConfig.parse({"target": values})
        with local_shards(config) as runner:
            note(f"ready after {time.monotonic() - start:.0f} s: {runner.shard.execution}")
            pages = PagePool(runner.shard.num_pages, runner.shard.page_size)
            probe = StepProbe(runner, pages, config.target, _MAX_MODEL_LEN)
            probe.warm_up()
            rows = [_row(probe, tokens, context, repeats) for tokens, context in _SIZES]
    ratio = rows[0]["seconds"] / (total / bandwidth)
    return Report(
        suite="gpu-steps",
        figures={
            "device": torch.cuda.get_device_name(),
            "bandwidth": bandwidth,
            "weight_bytes": total,
            "weight_bytes_read": read,
            "over_weights": round(ratio, 3),
            "over_weights_read": round(rows[0]["seconds"] / (read / bandwidth), 3),
            "rows": rows,
        },
        passed=ratio <= _BAR,
    )


def _row(probe: StepProbe, tokens: int, context: int, repeats: int) -> dict[str, Any]:
    shape = probe.shape(tokens, context)
    if shape is None:
        raise ValueError(f"no batch has {tokens} tokens with {context} cached")
    times = [probe.measure(shape) for _ in range(repeats)]
    return {
        "tokens": tokens,
        "context_tokens": context,
        "sequences": len(shape.query_lens),
        "seconds": statistics.median(times),
        "least_seconds": min(times),
    }


def _copy_bandwidth() -> float:
    """Bytes a second of a copy on the device, read and written ones together."""
    source = torch.randint(0, 255, (_COPIED_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * _COPIED_BYTES / statistics.median(times)


def _write_random_target(folder: Path, num_layers: int) -> tuple[int, int]:
    """Writes the checkpoint; bytes of all weights, and of those that a step reads whole (of the
    embedding it reads a row a token)."""
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=_MAX_MODEL_LEN,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    return total, total - embedding.numel() * embedding.element_size()
