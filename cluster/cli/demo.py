"""``dspark demo``: the whole cluster, a few prompts with and without speculation, a comparison."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cluster.cli.configuration import DEFAULT_CONFIG, read_configuration
from cluster.cli.demo_prompts import DemoPrompt, demo_prompts
from cluster.cli.rendering import TokenText, legend
from cluster.cli.running import RunningCluster, report_to_stderr
from cluster.config import ClusterConfig
from cluster.errors import DsparkError
from cluster.request import SpeculationStats

if TYPE_CHECKING:
    from cluster.rpc.client import Chunk, Client

_MAX_TOKENS = 96
_WARM_UP_TOKENS = 32
_START_TIMEOUT_S = 300.0
_PLAIN_WIDTH = 110  # columns of the table where there is no terminal to ask


@dataclass(frozen=True)
class _Answer:
    """One finished request; ``seconds`` from sending it to its last token."""

    token_ids: tuple[int, ...]
    stats: SpeculationStats
    seconds: float


@dataclass(frozen=True)
class _Comparison:
    """One prompt's answers: alone with and without speculation, and with it among others."""

    prompt: DemoPrompt
    speculative: _Answer
    plain: _Answer
    concurrent: _Answer

    @property
    def is_identical(self) -> bool:
        """Whether both speculative outputs are the plain one, token by token."""
        return self.speculative.token_ids == self.plain.token_ids == self.concurrent.token_ids


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds ``demo`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="start a cluster, compare outputs with and without speculation, stop it",
        description="Starts a cluster on free ports, continues a few functions of the standard "
        "library with and without speculation, compares the outputs token by token, and stops the "
        "cluster. Ends with 1 if any output differs.",
    )
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help=f"Serve configuration (default {DEFAULT_CONFIG})",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=_MAX_TOKENS,
        metavar="N",
        help=f"output tokens of each prompt (default {_MAX_TOKENS})",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ConfigError, CheckpointError: before anything was started.
        ClusterStateError: the cluster cannot start.
    """
    from cluster.rpc.client import Client

    _, document, _ = read_configuration(args.config)
    arguments = document["applications"][0]["args"]
    # Beside a cluster of the same configuration: any free port.
    arguments["router"] = {**arguments.get("router", {}), "port": 0}
    config = ClusterConfig.parse(arguments)
    show = _Quiet() if args.json else _Screen()
    with (
        RunningCluster(
            document, config, timeout_s=_START_TIMEOUT_S, report=report_to_stderr
        ) as cluster,
        Client(cluster.address) as client,
    ):
        status = client.status()
        comparisons, concurrent_s = _compare(client, demo_prompts(), args.max_tokens, show)
    summary = _summary(comparisons, concurrent_s)
    summary["shards"] = sum(len(replica.shards) for replica in status.replicas)
    drafters = {d.drafter_id for r in status.replicas for d in r.drafters if d.state == "ready"}
    summary["drafters"] = len(drafters)
    summary["startup_seconds"] = round(cluster.startup_s, 1)
    if args.json:
        print(json.dumps(summary))
    else:
        _print_summary(comparisons, summary)
    return 0 if summary["identical"] else 1


def _compare(
    client: Client, prompts: Sequence[DemoPrompt], max_tokens: int, show: _Quiet
) -> tuple[list[_Comparison], dict[str, float]]:
    """Runs every prompt alone, in both ways one after the other, then all of them at once.

    Returns:
        The comparisons, and the seconds that all prompts at once took, by way.
    """
    for speculation in (True, False):
        _ask(client, prompts[0], _WARM_UP_TOKENS, speculation)
    pairs: list[dict[bool, _Answer]] = []
    for index, prompt in enumerate(prompts):
        show.begin(index + 1, len(prompts), prompt)
        # Which way comes first changes from prompt to prompt, so that neither gains by it.
        order = (True, False) if index % 2 == 0 else (False, True)
        pairs.append(
            {
                way: _ask(client, prompt, max_tokens, way, show.chunk if way else None)
                for way in order
            }
        )
        show.end()
    at_once: dict[bool, list[_Answer]] = {}
    seconds: dict[bool, float] = {}
    for way in (True, False):
        started = time.monotonic()
        with ThreadPoolExecutor(max_workers=len(prompts)) as threads:
            at_once[way] = list(
                threads.map(lambda prompt: _ask(client, prompt, max_tokens, way), prompts)  # noqa: B023
            )
        seconds[way] = time.monotonic() - started
    comparisons = [
        _Comparison(prompt, pair[True], pair[False], together)
        for prompt, pair, together in zip(prompts, pairs, at_once[True], strict=True)
    ]
    return comparisons, {"speculative": seconds[True], "plain": seconds[False]}


def _ask(
    client: Client,
    prompt: DemoPrompt,
    max_tokens: int,
    speculation: bool,
    on_chunk: Callable[[Chunk], None] | None = None,
) -> _Answer:
    token_ids: list[int] = []
    stats: SpeculationStats | None = None
    started = time.monotonic()
    seconds = 0.0
    for chunk in client.generate(
        prompt.text,
        speculation=speculation,
        temperature=prompt.temperature,
        seed=prompt.seed,
        max_tokens=max_tokens,
    ):
        seconds = time.monotonic() - started
        token_ids += chunk.token_ids
        if chunk.usage is not None:
            stats = chunk.usage.speculation
        if on_chunk is not None:
            on_chunk(chunk)
    if stats is None:
        raise DsparkError(f"the answer to {prompt.name} has no end")
    return _Answer(tuple(token_ids), stats, seconds)


def _summary(comparisons: list[_Comparison], concurrent_s: dict[str, float]) -> dict[str, Any]:
    speculative = [comparison.speculative for comparison in comparisons]
    plain = [comparison.plain for comparison in comparisons]
    concurrent = [comparison.concurrent for comparison in comparisons]
    num_drafts = sum(answer.stats.num_drafts for answer in speculative)
    num_accepted = sum(answer.stats.num_accepted_tokens for answer in speculative)
    num_concurrent_tokens = sum(len(answer.token_ids) for answer in concurrent)
    return {
        "identical": all(comparison.is_identical for comparison in comparisons),
        "acceptance_length": round(1 + num_accepted / max(num_drafts, 1), 3),
        "tokens_per_second": {"speculative": _speed(speculative), "plain": _speed(plain)},
        "concurrent_tokens_per_second": {
            way: round(num_concurrent_tokens / seconds, 1) for way, seconds in concurrent_s.items()
        },
        "requests": 4 * len(comparisons),
        "prompts": len(comparisons),
        "output_tokens": sum(len(answer.token_ids) for answer in plain),
        "mismatches": [c.prompt.name for c in comparisons if not c.is_identical],
    }


def _speed(answers: Sequence[_Answer]) -> float:
    """Output tokens per second of one request at a time, over all of them."""
    num_tokens = sum(len(answer.token_ids) for answer in answers)
    return round(num_tokens / sum(answer.seconds for answer in answers), 1)


class _Quiet:
    """Shows nothing while the prompts run."""

    def begin(self, number: int, count: int, prompt: DemoPrompt) -> None:
        """A prompt begins."""

    def chunk(self, chunk: Chunk) -> None:
        """A piece of its speculative answer came."""

    def end(self) -> None:
        """Both answers are there."""


class _Screen(_Quiet):
    """Streams each speculative answer behind its prompt, its tokens told apart by source."""

    def __init__(self) -> None:
        self._colour = Console().is_terminal
        self._text = TokenText(colour=self._colour)
        print(legend(colour=self._colour), flush=True)

    def begin(self, number: int, count: int, prompt: DemoPrompt) -> None:
        """Prints the prompt."""
        sampled = prompt.kind
        if prompt.seed is not None:
            sampled += f" {prompt.seed}, temperature {prompt.temperature}"
        print(f"\n--- {number}/{count} {prompt.name} ({sampled}) ---\n{prompt.text}", end="")

    def chunk(self, chunk: Chunk) -> None:
        """Prints a piece at once."""
        shown = self._text.render(chunk.text, chunk.token_sources, chunk.text_lengths)
        print(shown, end="", flush=True)

    def end(self) -> None:
        """Ends the text's last line."""
        print(self._text.finish(), flush=True)


def _print_summary(comparisons: list[_Comparison], summary: dict[str, Any]) -> None:
    table = Table(title="\nOne request at a time, with and without speculation")
    table.add_column("prompt")
    table.add_column("sampling")
    for heading in ("tokens", "acceptance length", "tokens/s", "plain tokens/s"):
        table.add_column(heading, justify="right")
    table.add_column("same output")
    for comparison in comparisons:
        speculative = comparison.speculative
        table.add_row(
            comparison.prompt.name,
            comparison.prompt.kind,
            str(len(speculative.token_ids)),
            f"{speculative.stats.acceptance_length:.2f}",
            f"{_speed([speculative]):.0f}",
            f"{_speed([comparison.plain]):.0f}",
            "yes" if comparison.is_identical else "NO",
        )
    speeds = summary["tokens_per_second"]
    table.add_section()
    table.add_row(
        "all",
        "",
        str(summary["output_tokens"]),
        f"{summary['acceptance_length']:.2f}",
        f"{speeds['speculative']:.0f}",
        f"{speeds['plain']:.0f}",
        "yes" if summary["identical"] else "NO",
    )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    console.print(table)
    together = summary["concurrent_tokens_per_second"]
    console.print(
        f"All {summary['prompts']} at once: {together['speculative']:.0f} tokens/s with "
        f"speculation, {together['plain']:.0f} without.\n"
        f"{summary['shards']} target shards, {summary['drafters']} drafters, "
        f"{summary['requests']} requests; ready after {summary['startup_seconds']:.0f} s."
    )
    if summary["identical"]:
        console.print("Every output is the one that the target gives alone.")
    else:
        console.print(f"OUTPUTS DIFFER: {', '.join(summary['mismatches'])}")
