"""``dspark keys``: API keys for clients."""

from __future__ import annotations

import argparse
import json
from typing import Any

import yaml

from cluster.section import parse_section
from cluster.security.api_keys import ApiKey, hash_key, make_key


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds ``keys`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "keys",
        help="make an API key for clients",
        description="Makes a key, and prints it once, with the entry of it for the file that "
        "`security.api_keys_file` names. Only a hash of the key is in the entry.",
    )
    parser.add_argument("action", choices=["create"])
    parser.add_argument("name", metavar="NAME", help="whose key it is, for logs and counters")
    parser.add_argument("--requests-per-second", type=float, metavar="N", help="unset: no limit")
    parser.add_argument("--max-concurrent-requests", type=int, metavar="N", help="unset: no limit")
    parser.add_argument(
        "--max-queued-tokens",
        type=int,
        metavar="N",
        help="prompts and longest outputs of its requests at a time; unset: no limit",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command. Raises: ConfigError: a name or limit that the file may not hold."""
    key = make_key()
    limits = {
        name: getattr(args, name)
        for name in ("requests_per_second", "max_concurrent_requests", "max_queued_tokens")
        if getattr(args, name) is not None
    }
    values = {"name": args.name, "sha256": hash_key(key), **limits}
    entry = parse_section(ApiKey, values).model_dump(exclude_unset=True)
    if args.json:
        print(json.dumps({"key": key, "entry": entry}))
        return 0
    print(f"The key of {args.name}, which is not shown again:\n\n  {key}\n")
    print("Its entry, to go under `keys:` in the file of security.api_keys_file:\n")
    print(yaml.safe_dump([entry], sort_keys=False), end="")
    return 0
