"""Trains a DSpark drafter against a target, on the standard library.

``python -m cluster.training.drafter --target deployments/models/stdlib-7m \\
--out deployments/models/stdlib-7m-dspark --minutes 45``

Target features are computed on the fly and never stored. Embedding and output head are copied
from the target and stay frozen. An interrupted run goes on from its last checkpoint when started
again with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cluster.models.checkpoint import build_drafter as build_network
from cluster.models.checkpoint import save_drafter
from cluster.models.dspark import DSparkConfig, DSparkDrafter
from cluster.training.corpus import TokenStream, load_documents
from cluster.training.drafter_loss import block_loss, sample_anchors
from cluster.training.features import FeatureTarget
from cluster.training.optimization import Budget, Optimizers, learning_rate_factor
from cluster.training.parallel import Worker, run_workers
from cluster.training.resume import load_training_state, save_training_state, write_summary

SEQUENCE_LENGTH = 1024
# As in target training: attention makes long sequences dear, so most of the budget is short.
SHORT_PHASE = 0.65
HELDOUT_WINDOWS = 16


def build_drafter(
    target: PreTrainedModel,
    mask_token_id: int,
    block_size: int = 7,
    num_layers: int = 2,
    markov_rank: int = 64,
    num_anchors: int = 128,
    target_layer_ids: Sequence[int] | None = None,
) -> DSparkDrafter:
    """A drafter of the target's width with random weights, embedding and head the target's.

    ``target_layer_ids`` defaults to four layers spread over the target, the last one included.
    """
    config = target.config
    layers = config.num_hidden_layers
    if target_layer_ids is None:
        target_layer_ids = sorted({layers * part // 4 - 1 for part in range(1, 5)})
    drafter = build_network(
        DSparkConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=dict(config.rope_parameters),
            block_size=block_size,
            target_layer_ids=tuple(target_layer_ids),
            num_target_layers=layers,
            mask_token_id=mask_token_id,
            num_anchors=num_anchors,
            markov_rank=markov_rank,
            enable_confidence_head=True,
            confidence_head_with_markov=markov_rank > 0,
        )
    )
    with torch.no_grad():
        drafter.embed_tokens.weight.copy_(target.get_input_embeddings().weight)
        drafter.lm_head.weight.copy_(target.get_output_embeddings().weight)
    drafter.embed_tokens.requires_grad_(False)
    drafter.lm_head.requires_grad_(False)
    return drafter


@torch.no_grad()
def heldout_acceptance(
    drafter: DSparkDrafter, target: FeatureTarget, stream: TokenStream, windows: int
) -> tuple[float, list[float]]:
    """Teacher-forced figures on evenly spread held-out windows.

    Returns:
        ``(acceptance length at temperature 1, acceptance Σ min(p, q) of each position)``.
    """
    lengths, positions = [], []
    generator = torch.Generator().manual_seed(0)
    total = stream.windows_per_epoch
    for index in range(windows):
        tokens = stream.window(index * total // windows)[None]
        anchors = sample_anchors(
            1, tokens.shape[1], drafter.config.block_size, drafter.config.num_anchors, generator
        )
        loss = block_loss(drafter, tokens, *target.run(tokens), anchors)
        lengths.append(loss.expected_length())
        positions.append(loss.acceptance.mean(dim=(0, 1)))
    return float(torch.stack(lengths).mean()), torch.stack(positions).mean(dim=0).tolist()


def train(arguments: argparse.Namespace, worker: Worker) -> None:
    """One worker's part of the training that ``arguments`` (see ``parse_arguments``) describe."""
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    model = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=torch.float32)
    training, heldout = load_documents()
    stream = TokenStream(training, tokenizer, SEQUENCE_LENGTH, arguments.seed)
    heldout_stream = TokenStream(heldout, tokenizer, SEQUENCE_LENGTH, shuffle=False)

    drafter = build_drafter(model, tokenizer.mask_token_id, num_anchors=arguments.anchors)
    target = FeatureTarget(model, drafter.config.target_layer_ids)
    optimizers = Optimizers(drafter, adamw_names=("markov_head", "confidence_head"))
    budget = Budget(arguments.minutes, arguments.steps)
    out = Path(arguments.out)
    state_folder = Path(arguments.state or f"{out}-state")
    step = load_training_state(state_folder, drafter, optimizers, budget)
    parameters = sum(parameter.numel() for parameter in drafter.parameters())
    if worker.leads:
        print(f"{parameters} parameters, step {step}", flush=True)

    last_log = last_save = time.monotonic()
    logged_step = step
    block_size = drafter.config.block_size
    while (progress := worker.agree(budget.progress(step))) < 1.0:
        tokens = worker.share(stream.batch(step, arguments.batch))
        anchors_each = arguments.anchors
        if progress < SHORT_PHASE:
            tokens = tokens.reshape(-1, SEQUENCE_LENGTH // 2)
            anchors_each //= 2
        generator = torch.Generator().manual_seed(step * worker.count + worker.rank)
        rows, length = tokens.shape
        anchors = sample_anchors(rows, length, block_size, anchors_each, generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = block_loss(drafter, tokens, *target.run(tokens), anchors)
        loss.total.backward()
        worker.average_gradients(drafter.parameters())
        norm = optimizers.step(learning_rate_factor(progress))
        step += 1
        if not worker.leads:
            continue
        now = time.monotonic()
        if step % arguments.log_every == 0:
            print(
                f"step {step} progress {progress:.3f} loss {loss.total.item():.4f} "
                f"norm {norm:.2f} acceptance length {loss.expected_length().item():.3f} "
                f"seconds/step {(now - last_log) / (step - logged_step):.2f}",
                flush=True,
            )
            last_log, logged_step = now, step
        if now - last_save > arguments.save_seconds:
            save_training_state(state_folder, step, drafter, optimizers, budget)
            save_drafter(drafter, out)
            tau, rates = heldout_acceptance(drafter, target, heldout_stream, HELDOUT_WINDOWS)
            print(f"step {step} heldout {tau:.3f} {[round(r, 3) for r in rates]}", flush=True)
            last_save = time.monotonic()
    if not worker.leads:
        return
    save_training_state(state_folder, step, drafter, optimizers, budget)
    save_drafter(drafter, out)
    tau, rates = heldout_acceptance(
        drafter, target, heldout_stream, heldout_stream.windows_per_epoch
    )
    summary: dict[str, Any] = {
        "parameters": parameters,
        "steps": step,
        "tokens_seen": step * arguments.batch * SEQUENCE_LENGTH,
        "anchors_seen": step * arguments.batch * arguments.anchors,
        "heldout_acceptance_length": tau,
        "heldout_acceptance": rates,
        "minutes": budget.spent_seconds / 60.0,
    }
    write_summary(out, summary)
    print(json.dumps(summary), flush=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of ``python -m cluster.training.drafter``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True, help="folder of the target's checkpoint")
    parser.add_argument("--out", required=True, help="folder of the drafter's checkpoint")
    parser.add_argument("--state", help="folder of the resumable state (default: OUT-state)")
    parser.add_argument("--minutes", type=float, default=45.0, help="wall-clock budget")
    parser.add_argument("--steps", type=int, help="budget in steps instead of minutes")
    parser.add_argument("--batch", type=int, default=4, help="sequences of 1024 tokens a step")
    parser.add_argument("--anchors", type=int, default=128, help="anchors a sequence")
    parser.add_argument("--processes", type=int, default=2, help="workers, a thread each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=10, help="steps between log lines")
    parser.add_argument("--save-seconds", type=float, default=180.0, help="between checkpoints")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_workers(train, parse_arguments())
