"""What the commands that measure drafters have in common."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from cluster.bench.drafter_choice import DrafterChoice
    from cluster.bench.evaluation import Settings

DEFAULT_TARGET = "deployments/models/stdlib-7m"
DEFAULT_DRAFTER = "dspark=deployments/models/stdlib-7m-dspark"

_TABLE_WIDTH = 160


def add_rounds(
    parser: argparse.ArgumentParser, *, prompts: int, prompt_tokens: int, max_tokens: int
) -> None:
    """Adds the target, the temperatures and how rounds are run; the numbers are defaults."""
    parser.add_argument("--target", default=DEFAULT_TARGET, metavar="DIR")
    parser.add_argument(
        "--temperature",
        action="append",
        type=sampling_temperature,
        metavar="T",
        help="of sampling, 0 for greedy; repeatable (default 0 and 1)",
    )
    parser.add_argument(
        "--prompts",
        type=positive,
        default=prompts,
        metavar="N",
        help=f"most prompts of a data set (default {prompts})",
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=max_tokens,
        metavar="N",
        help=f"longest output (default {max_tokens})",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=positive,
        default=prompt_tokens,
        metavar="N",
        help=f"length of prompts of code (default {prompt_tokens})",
    )
    parser.add_argument(
        "--concurrency", type=positive, default=64, metavar="N", help="requests at once"
    )
    parser.add_argument(
        "--num-speculative-tokens",
        type=positive,
        default=7,
        metavar="N",
        help="block of methods whose checkpoint has none: eagle3, draft_model, ngram",
    )
    parser.add_argument(
        "--draft-top-k",
        type=positive,
        default=1024,
        metavar="N",
        help="entries of a draft distribution, as `speculative.draft_top_k` (default 1024)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="that target and drafter are computed in (default float32)",
    )


def sampling_temperature(text: str) -> float:
    """A sampling temperature, for argparse."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def sampling_seed(text: str) -> int:
    """A seed of random streams, for argparse."""
    seed = int(text)
    if seed < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {seed}")
    return seed


def positive(text: str) -> int:
    """A number of things, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def temperatures_of(args: argparse.Namespace) -> list[float]:
    """The sampling temperatures that ``add_rounds`` has read."""
    return args.temperature or [0.0, 1.0]


def target_of(args: argparse.Namespace) -> str:
    """The target that ``add_rounds`` has read.

    Raises:
        ConfigError: there is no such folder.
        CheckpointError: there is no such model on the hub.
    """
    from cluster.errors import ConfigError
    from cluster.models.hub import local_folder

    if not local_folder(args.target).is_dir():
        raise ConfigError("--target", f"no such folder: {args.target}")
    return str(args.target)


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that ``add_rounds`` has read.

    Raises:
        ConfigError: there is no such device here.
    """
    from cluster.bench.evaluation import Settings
    from cluster.engine.machine import check_device

    check_device("--device", args.device)
    return Settings(
        max_tokens=args.max_tokens,
        concurrency=args.concurrency,
        num_speculative_tokens=args.num_speculative_tokens,
        draft_top_k=args.draft_top_k,
        device=args.device,
        dtype=args.dtype,
    )


def drafters_of(texts: list[str] | None) -> list[DrafterChoice]:
    """The drafters named on the command line, the shipped one where there is none.

    Raises:
        ConfigError: one cannot be read, or two have one name.
    """
    from cluster.bench.drafter_choice import DrafterChoice
    from cluster.errors import ConfigError

    choices = [DrafterChoice.parse(text) for text in texts or [DEFAULT_DRAFTER]]
    names = [choice.name for choice in choices]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError("--drafter", f"two are called {name!r}; use NAME=METHOD:DIR")
    return choices


def wide_console() -> Console:
    """A console on which a table by position fits, where the terminal does not say its width."""
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, width=_TABLE_WIDTH)


def note(text: str) -> None:
    """Says on standard error what goes on."""
    print(text, file=sys.stderr, flush=True)
