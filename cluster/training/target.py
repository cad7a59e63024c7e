"""Trains the small target: a Qwen3 causal LM of about 7M parameters on the standard library.

``python -m cluster.training.target --out deployments/models/stdlib-7m --minutes 56``

An interrupted run goes on from its last checkpoint when started again with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cluster.training.corpus import TokenStream, load_documents
from cluster.training.optimization import Budget, Optimizers, learning_rate_factor
from cluster.training.parallel import Worker, run_workers
from cluster.training.resume import load_training_state, save_training_state, write_summary
from cluster.training.tokenizer import save_tokenizer, train_tokenizer

SEQUENCE_LENGTH = 1024
# Attention is nearly half of a CPU step at 1024 tokens: most of the budget runs at half of that.
SHORT_PHASE = 0.65
HELDOUT_WINDOWS = 16


def build_target(vocab_size: int, eos_token_id: int, pad_token_id: int) -> Qwen3ForCausalLM:
    """The target with random weights, fp32, from the global random state."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def halve(tokens: torch.Tensor) -> torch.Tensor:
    """Cuts windows ``[batch, 2n + 1]`` into ``[2 * batch, n + 1]``, the halves sharing a token."""
    middle = tokens.shape[1] // 2
    return torch.cat([tokens[:, : middle + 1], tokens[:, middle:]])


def language_model_loss(model: Qwen3ForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats over int64 ``[batch, length]`` tokens."""
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: Qwen3ForCausalLM, stream: TokenStream, windows: int | None = None) -> float:
    """Mean loss in nats a token over ``windows`` evenly spread held-out windows (all if None)."""
    model.eval()
    total = stream.windows_per_epoch
    count = total if windows is None else min(windows, total)
    losses = [
        language_model_loss(model, stream.window(index * total // count)[None])
        for index in range(count)
    ]
    model.train()
    return float(torch.stack(losses).mean())


def export_target(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Writes config, generation config and bf16 safetensors, each replaced atomically."""
    partial = folder / ".partial"
    copy = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    copy.save_pretrained(partial)
    for path in partial.iterdir():
        os.replace(path, folder / path.name)
    partial.rmdir()


def prepare_tokenizer(out: Path) -> None:
    """Trains the tokenizer into folder ``out`` unless it holds one."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tokenizer.json").exists():
        training, _ = load_documents()
        save_tokenizer(train_tokenizer(document.text for document in training), out)


def train(arguments: argparse.Namespace, worker: Worker) -> None:
    """One worker's part of the training that ``arguments`` (see ``parse_arguments``) describe."""
    torch.manual_seed(arguments.seed)
    out = Path(arguments.out)
    training, heldout = load_documents()
    tokenizer = AutoTokenizer.from_pretrained(out)
    stream = TokenStream(training, tokenizer, SEQUENCE_LENGTH + 1, arguments.seed)
    heldout_stream = TokenStream(heldout, tokenizer, SEQUENCE_LENGTH + 1, shuffle=False)

    model = build_target(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    optimizers = Optimizers(model, adamw_names=("embed_tokens", "lm_head"))
    budget = Budget(arguments.minutes, arguments.steps)
    state_folder = Path(arguments.state or f"{out}-state")
    step = load_training_state(state_folder, model, optimizers, budget)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if worker.leads:
        print(f"{parameters} parameters, {stream.num_tokens} training tokens, step {step}")

    last_log = last_save = time.monotonic()
    logged_step = step
    while (progress := worker.agree(budget.progress(step))) < 1.0:
        with torch.autocast("cpu", torch.bfloat16):
            tokens = worker.share(stream.batch(step, arguments.batch))
            if progress < SHORT_PHASE:
                tokens = halve(tokens)
            loss = language_model_loss(model, tokens)
        loss.backward()
        worker.average_gradients(model.parameters())
        norm = optimizers.step(learning_rate_factor(progress))
        step += 1
        if not worker.leads:
            continue
        now = time.monotonic()
        if step % arguments.log_every == 0:
            seen = step * arguments.batch * SEQUENCE_LENGTH
            rate = (step - logged_step) * arguments.batch * SEQUENCE_LENGTH / (now - last_log)
            print(
                f"step {step} progress {progress:.3f} loss {loss.item():.4f} norm {norm:.2f} "
                f"tokens {seen} tokens/s {rate:.0f}",
                flush=True,
            )
            last_log, logged_step = now, step
        if now - last_save > arguments.save_seconds:
            save_training_state(state_folder, step, model, optimizers, budget)
            export_target(model, tokenizer, out)
            with torch.autocast("cpu", torch.bfloat16):
                value = heldout_loss(model, heldout_stream, HELDOUT_WINDOWS)
            print(f"step {step} heldout {value:.4f}", flush=True)
            last_save = time.monotonic()
    if not worker.leads:
        return
    save_training_state(state_folder, step, model, optimizers, budget)
    export_target(model, tokenizer, out)
    summary: dict[str, Any] = {
        "parameters": parameters,
        "steps": step,
        "tokens_seen": step * arguments.batch * SEQUENCE_LENGTH,
        "corpus_tokens": stream.num_tokens,
        "heldout_tokens": heldout_stream.num_tokens,
        "heldout_loss": heldout_loss(model, heldout_stream),
        "minutes": budget.spent_seconds / 60.0,
    }
    write_summary(out, summary)
    print(json.dumps(summary), flush=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of ``python -m cluster.training.target``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="folder of the Hugging Face checkpoint")
    parser.add_argument("--state", help="folder of the resumable state (default: OUT-state)")
    parser.add_argument("--minutes", type=float, default=56.0, help="wall-clock budget")
    parser.add_argument("--steps", type=int, help="budget in steps instead of minutes")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--processes", type=int, default=2, help="workers, a thread each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=10, help="steps between log lines")
    parser.add_argument("--save-seconds", type=float, default=240.0, help="between checkpoints")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parsed = parse_arguments()
    prepare_tokenizer(Path(parsed.out))
    run_workers(train, parsed)
