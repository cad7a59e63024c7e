"""What README and docs say to type and to open is there, and is taken by what would read it."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import itertools
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cluster import cli
from cluster.serve_config import load_serve_config
from cluster.training.config import load_train_config
from tests.doc_tools import (
    PAGES,
    ROOT,
    Command,
    blocks_of,
    commands,
    links_of,
    paths_named,
    program,
)

COMMANDS = commands()
# Programs whose commands nothing here can read, and where what they do is tried instead.
ELSEWHERE = {
    "buildah": "tests/test_image.py builds by it; root and a base image",
    "debootstrap": "makes that base image: root, and a mirror of Debian's",
    "kubectl": "needs a Kubernetes; tests/test_helm_release.py has an API server of ours",
    "pip": "the peer's packages: an index, and gigabytes",
    "vllm": "vLLM's client, run by hand as docs/bench.md says: gigabytes to install",
    "serve": "Ray Serve's; tests/test_helm_serve.py hands Serve a file like those",
}
# Placeholders that stand for a number, or for one of few words.
PLACEHOLDERS = {"N": "1", "M": "1", "SUITE": "load", "COMMAND": "up"}


the_parser = functools.cache(cli.make_parser)


def dspark(command: Command) -> None:
    """The real command line takes it."""
    words = [word.strip("[]") for word in command.words[1:]]
    words = [PLACEHOLDERS.get(word, word) for word in words]
    if command.is_inline:  # prose leaves out what is required
        parser = parser_of(words)
        for word in words:
            if word.startswith("--"):
                assert word in parser._option_string_actions, f"{word} is not known"
        return
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            args = the_parser().parse_args(words)
    except SystemExit:
        pytest.fail(told.getvalue())
    path = Path(getattr(args, "config", None) or "CONFIG")
    if not (ROOT / path).is_file():  # a placeholder, or the reader's own
        return
    if words[0] == "train":
        load_train_config(ROOT / path, tuple(args.set))
    elif words[0] in ("up", "swap", "demo"):
        load_serve_config(ROOT / path)


def make(command: Command) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    wanted = [word for word in command.words[1:] if "=" not in word]
    assert set(wanted) <= set(targets)


def python(command: Command) -> None:
    words = command.words[1:]
    if words[0] == "-c":
        compile(words[1], str(command), "exec")
    elif words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None
    else:
        assert (ROOT / words[0]).is_file()


def helm(command: Command) -> None:
    words = list(command.words[1:])
    assert words[0] in ("install", "upgrade", "template", "test", "uninstall", "rollback")
    if words[0] in ("install", "upgrade", "template"):
        assert (ROOT / words[2] / "Chart.yaml").is_file()
    values = yaml.safe_load((ROOT / "helm/dspark/values.yaml").read_text())
    for flag, value in itertools.pairwise(words):
        if flag == "--set":
            held = values
            for key in value.partition("=")[0].split("."):
                assert key in held, f"{value} is not in values.yaml"
                held = held[key]


def docker(command: Command) -> None:
    words = command.words[1:]
    assert words[0] == "build"
    assert (ROOT / words[words.index("-f") + 1]).is_file()


def ray(command: Command) -> None:
    from ray.scripts.scripts import cli as ray_cli

    name, *words = command.words[1:]
    ray_cli.commands[name].make_context(name, words)


def curl(command: Command) -> None:
    """Its paths are served."""
    paths = (ROOT / "docs/api.md").read_text()
    for word in command.words[1:]:
        if match := re.fullmatch(r"https?://[^/]+(/.*)", word):
            assert f"{match[1]}`" in paths, f"docs/api.md has no {match[1]}"


READERS: dict[str, Callable[[Command], None]] = {
    "curl": curl,
    "docker": docker,
    "dspark": dspark,
    "helm": helm,
    "make": make,
    "python": python,
    "ray": ray,
}


def parser_of(words: list[str]) -> argparse.ArgumentParser:
    """That of the command, or of its subcommand, which the words begin with."""
    parser = the_parser()
    for word in words:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                if word in action.choices:
                    parser = action.choices[word]
                else:
                    assert word.startswith("-") or parser.prog.count(" "), f"no {word}"
    return parser


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_taken_by_what_reads_it(command: Command) -> None:
    name = program(command.words[0])
    if name.startswith("c=$("):
        name = name.removeprefix("c=$(")
    if name in ELSEWHERE:
        return
    READERS[name](command)  # an unknown program needs a reader, or a reason
    for word in command.words:
        if re.match(r"(cluster|deployments|docs|helm|protos|tests)/", word):
            assert (ROOT / word).exists(), f"there is no {word}"


def test_commands_are_found_on_many_pages() -> None:
    assert len(COMMANDS) > 80
    assert len({command.page for command in COMMANDS}) > 15
    assert {program(command.words[0]) for command in COMMANDS} >= {"dspark", "make", "helm"}


@pytest.mark.parametrize("words", ["dspark up --detatch", "dspark genrate x", "make demmo"])
def test_a_wrong_command_is_found(words: str) -> None:
    for is_inline in (False, True):
        command = Command("page", 1, tuple(shlex.split(words)), is_inline)
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            READERS[program(command.words[0])](command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    missing = [
        f"{number}: {path}"
        for number, path in paths_named(page)
        if not all(list(ROOT.glob(one.rstrip("/"))) for one in alternatives(path))
    ]
    for number, target in links_of(page):
        if not (page.parent / target).exists():
            missing.append(f"{number}: {target}")
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_on_a_page_is_valid(page: Path, tmp_path: Path) -> None:
    for language, text in blocks_of(page):
        if language == "python":
            compile(text, str(page), "exec")
        elif language == "json":
            json.loads(text)
        elif language == "yaml":
            if "applications" in yaml.safe_load(text):
                path = tmp_path / "serve.yaml"
                path.write_text(text)
                load_serve_config(path)
        else:
            assert language in ("", "sh", "bash"), f"nothing here reads {language}"


def alternatives(path: str) -> list[str]:
    """`a/{b,c}` as `a/b` and `a/c`, and a placeholder (`NAME`) as any name."""
    path = re.sub(r"\b[A-Z]{2,}\b(?=\.|$)", "*", path)
    match = re.search(r"\{([^}]*)\}", path)
    if match is None:
        return [path]
    return [path[: match.start()] + one + path[match.end() :] for one in match[1].split(",")]
