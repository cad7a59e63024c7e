"""The commands in README and docs, as a shell would read them."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "helm/dspark/README.md", *ROOT.glob("docs/**/*.md")])

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.M | re.S)
_SPAN = re.compile(r"`([^`]+)`")
_SHELL = ("", "sh", "bash", "console")
# What a block without a language may begin with to be commands, and no drawing or output.
_PROGRAMS = frozenset(
    shlex.split(
        "buildah 'c=$(buildah' curl debootstrap docker dspark git helm kubectl make pip python"
        " ray serve vllm"
    )
)
# Of an inline span: `dspark status` is a command, `dspark` itself and `make` a name.
_INLINE = ("dspark", "make", "ray", "serve")


@dataclass(frozen=True)
class Command:
    """One command of a page, and where it is; its words are without comments."""

    page: str
    line: int
    words: tuple[str, ...]
    is_inline: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def commands() -> list[Command]:
    """Every command of every page, environment settings and prompts (`$`) taken off."""
    return [command for page in PAGES for command in commands_of(page)]


def commands_of(page: Path) -> Iterator[Command]:
    """Those of one page, in order."""
    name = str(page.relative_to(ROOT))
    text = page.read_text()
    for fence in _FENCE.finditer(text):
        if fence[2] not in _SHELL:
            continue
        first = text.count("\n", 0, fence.start(3)) + 1
        found, others = [], []
        for offset, line in _logical_lines(fence[3]):
            for part in re.split(r"\s&&\s|\s\|\s", line):
                if words := _words(part):
                    command = Command(name, first + offset, words, False)
                    (found if program(words[0]) in _PROGRAMS else others).append(command)
        # A block without a command is a drawing or output; one with commands has nothing else.
        assert not (found and others), f"no program is known by this name: {others[0]}"
        yield from found
    # Spans may go over a line's end; fences are blanked, so that lines keep their numbers.
    prose = _FENCE.sub(lambda fence: re.sub(r"[^\n]", " ", fence[0]), text)
    for span in _SPAN.finditer(prose):
        words = _words(" ".join(span[1].split()))
        if len(words) > 1 and program(words[0]) in _INLINE:
            yield Command(name, prose.count("\n", 0, span.start()) + 1, words, True)


def blocks_of(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every fenced block; the language may be empty."""
    for fence in _FENCE.finditer(page.read_text()):
        yield fence[2], textwrap.dedent(fence[3])


def program(word: str) -> str:
    """`.venv/bin/dspark` is dspark, `python3.11` python."""
    return re.sub(r"(?<=python)[\d.]+$", "", word.rpartition("/")[2])


def paths_named(page: Path) -> Iterator[tuple[int, str]]:
    """(line, path) of every span that looks like a file or folder of this repository.

    Patterns (`*`) are left out: they say what is taken of what is there.
    """
    tops = "cluster|deployments|docs|helm|protos|tests"
    for number, line in enumerate(page.read_text().splitlines(), 1):
        for span in _SPAN.findall(line):
            if re.fullmatch(rf"(?:{tops})(?:/[\w.{{}},-]+)+/?", span):
                yield number, span


def links_of(page: Path) -> Iterator[tuple[int, str]]:
    """(line, target) of every Markdown link and image that is no web address."""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", line):
            if "://" not in target:
                yield number, target


def _logical_lines(block: str) -> Iterator[tuple[int, str]]:
    """(offset, line), continued and quoted lines as one."""
    pending, start = "", 0
    for offset, line in enumerate(block.splitlines()):
        start = offset if not pending else start
        pending += line.strip()
        if pending.endswith("\\"):
            pending = pending[:-1]
        elif pending.count("'") % 2:
            pending += "\n"
        else:
            yield start, pending
            pending = ""
    assert not pending, f"a command does not end: {pending}"


def _words(line: str) -> tuple[str, ...]:
    try:
        words = shlex.split(line.removeprefix("$ "), comments=True)
    except ValueError:  # prose with an apostrophe
        return ()
    while words and re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    if ">" in words:
        words = words[: words.index(">")]
    return tuple(words)
