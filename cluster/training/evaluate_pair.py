"""Measures a target and its DSpark drafter on held-out code; prints one JSON object.

``python -m cluster.training.evaluate_pair --target DIR --drafter DIR``

Weights are computed with in fp32. Acceptance comes from real rounds: a block is drafted, verified
with the project's own verifiers, and the next round starts where the last one ended.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.models.checkpoint import load_drafter
from cluster.models.dspark import DSparkDrafter
from cluster.training.corpus import TokenStream, load_documents
from cluster.training.features import FeatureTarget
from cluster.training.resume import read_summary
from cluster.training.speculate import SpeculativeSession
from cluster.training.target import SEQUENCE_LENGTH, heldout_loss

TEMPERATURES = (0.0, 1.0)


def acceptance(
    target: FeatureTarget,
    drafter: DSparkDrafter,
    prompts: Sequence[list[int]],
    temperature: float,
    max_tokens: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Generates ``max_tokens`` tokens after each prompt and counts what was accepted.

    Returns:
        ``acceptance_length`` (accepted + 1, mean over rounds), ``conditional_acceptance`` (by
        position: the part of rounds that accepted everything before it and it as well) and
        ``rounds``.
    """
    generator = torch.Generator().manual_seed(seed)
    counts: list[int] = []
    for prompt in prompts:
        session = SpeculativeSession(target, drafter, prompt, temperature, generator)
        while len(session.token_ids) < len(prompt) + max_tokens:
            counts.append(session.round())
    reached = [
        sum(count >= position for count in counts)
        for position in range(drafter.config.block_size + 1)
    ]
    return {
        "temperature": temperature,
        "acceptance_length": round(sum(counts) / len(counts) + 1, 3),
        "conditional_acceptance": [
            round(after / before, 3) if before else 0.0 for before, after in pairwise(reached)
        ],
        "rounds": len(counts),
    }


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures that ``main`` prints."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    model = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=torch.float32)
    drafter = load_drafter(arguments.drafter)
    _, heldout = load_documents()
    figures: dict[str, Any] = {
        "heldout_loss": round(
            heldout_loss(
                model, TokenStream(heldout, tokenizer, SEQUENCE_LENGTH + 1, shuffle=False)
            ),
            4,
        ),
        "target_training": read_summary(Path(arguments.target)),
        "drafter_training": read_summary(Path(arguments.drafter)),
    }
    stream = TokenStream(heldout, tokenizer, arguments.prompt_tokens, shuffle=False)
    stride = max(1, stream.windows_per_epoch // arguments.prompts)
    prompts = [stream.window(index * stride).tolist() for index in range(arguments.prompts)]
    target = FeatureTarget(model, drafter.config.target_layer_ids)
    figures["rows"] = [
        {
            "method": "dspark",
            "dataset": "stdlib-heldout",
            **acceptance(target, drafter, prompts, temperature, arguments.max_tokens),
        }
        for temperature in TEMPERATURES
    ]
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``python -m cluster.training.evaluate_pair``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True, help="folder of the target's checkpoint")
    parser.add_argument("--drafter", required=True, help="folder of the drafter's checkpoint")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=128, help="generated after each prompt")
    print(json.dumps(evaluate(parser.parse_args(arguments)), indent=2))


if __name__ == "__main__":
    main()
