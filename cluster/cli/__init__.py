"""``dspark``: the command line. One command a module; each has ``add_parser`` and ``run``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence

from cluster import __version__
from cluster.cli import (
    bench,
    calibrate,
    demo,
    down,
    eval,
    generate,
    keys,
    profile,
    simulate,
    status,
    swap,
    train,
    up,
)
from cluster.errors import CheckpointError, ConfigError, DataError, DsparkError, InvalidRequestError

_COMMANDS = (
    up,
    down,
    generate,
    status,
    demo,
    bench,
    train,
    profile,
    simulate,
    swap,
    eval,
    calibrate,
    keys,
)
_EXIT_FAILURE = 1
_EXIT_USAGE = 2
_USAGE_ERRORS = (ConfigError, CheckpointError, DataError, InvalidRequestError)


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="dspark", description="Speculative decoding for large language models on Ray."
    )
    parser.add_argument("--version", action="version", version=f"dspark {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in _COMMANDS:
        command = module.add_parser(commands)
        command.add_argument(
            "--json", action="store_true", help="print exactly one JSON object on standard output"
        )
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0 success, 2 bad usage or configuration, 1 otherwise.
    """
    args = make_parser().parse_args(argv)
    try:
        return args.run(args)
    except DsparkError as error:
        print(f"dspark: {error}", file=sys.stderr)
        if args.json:
            print(json.dumps({"error": str(error)}))
        return _EXIT_USAGE if isinstance(error, _USAGE_ERRORS) else _EXIT_FAILURE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_FAILURE
