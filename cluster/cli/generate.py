"""``dspark generate``: streams one completion from a running cluster."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from cluster.cli.rendering import TokenText, legend
from cluster.cli.state import DEFAULT_ADDRESS, default_address
from cluster.request import Priority, SamplingParams, SpeculationMode, SpeculationParams, Usage


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds ``generate`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="stream a completion from a running cluster",
        description="Streams a completion over gRPC. On a terminal accepted, recovered, bonus and "
        "target tokens have different colours.",
    )
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue; - reads it from stdin")
    add_address(parser)
    parser.add_argument("--max-tokens", type=int, default=256, help="most output tokens (256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (1.0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus mass kept (1.0)")
    parser.add_argument("--top-k", type=int, default=0, help="most likely tokens kept, 0: all (0)")
    parser.add_argument("--seed", type=int, help="makes a sampled output reproducible")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends the output; repeatable"
    )
    parser.add_argument(
        "--no-speculation", action="store_true", help="decode with the target alone"
    )
    parser.add_argument(
        "--priority",
        choices=[priority.name.lower() for priority in Priority],
        default="default",
        help="who may wait for whom (default)",
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="deadline of the request")
    return parser


def add_address(parser: argparse.ArgumentParser) -> None:
    """Adds ``--address``, as every client command has it."""
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help=f"the router's (default: what `up` started, else {DEFAULT_ADDRESS})",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command. Raises: what the cluster answers, as cluster.errors."""
    from cluster.rpc.client import Client

    sampling = SamplingParams(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        stop=tuple(args.stop),
        max_tokens=args.max_tokens,
    )
    mode = SpeculationMode.OFF if args.no_speculation else SpeculationMode.AUTO
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    colour = sys.stdout.isatty()
    if colour and not args.json:
        print(legend(colour=True), file=sys.stderr)
    rendered = TokenText(colour=colour)
    gathered: dict[str, Any] = {"text": "", "token_ids": [], "token_sources": []}
    with Client(args.address or default_address()) as client:
        for chunk in client.generate(
            prompt,
            sampling=sampling,
            speculation=SpeculationParams(mode=mode),
            timeout_s=args.timeout,
            priority=Priority[args.priority.upper()],
        ):
            if args.json:
                gathered["text"] += chunk.text
                gathered["token_ids"] += chunk.token_ids
                gathered["token_sources"] += [source.name.lower() for source in chunk.token_sources]
            else:
                shown = chunk.text
                if colour:
                    shown = rendered.render(chunk.text, chunk.token_sources, chunk.text_lengths)
                print(shown, end="", flush=True)
            if chunk.finish_reason is not None:
                gathered["finish_reason"] = chunk.finish_reason.name.lower()
                gathered["usage"] = _usage(chunk.usage)
    if args.json:
        print(json.dumps(gathered))
    else:
        print(rendered.finish() if colour else "")
    return 0


def _usage(usage: Usage | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_prompt_tokens": usage.cached_prompt_tokens,
        "num_drafts": usage.speculation.num_drafts,
        "num_draft_tokens": usage.speculation.num_draft_tokens,
        "num_accepted_tokens": usage.speculation.num_accepted_tokens,
        "acceptance_length": round(usage.speculation.acceptance_length, 3),
    }
