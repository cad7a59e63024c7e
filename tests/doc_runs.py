"""What of the pages is typed by a test, shortened, and what another test runs instead."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster import cli
from tests.doc_tools import ROOT, Command, program
from tests.models import save_tiny_target

_TARGET = "deployments/models/stdlib-7m"
_DRAFTER = "dspark=deployments/models/stdlib-7m-dspark"
_PROMPT = "'def read_json(path):' --max-tokens 64 --temperature 0"
EXAMPLE = "deployments/training/prompts-example.yaml"
PREDICTION = "docs/predictions/frontier-h100-8b-a10.json"

# What the pages leave to the reader, as words and parts of words, and what a test has there.
PLACES = {
    "…": "",
    "CONFIG": EXAMPLE,
    "COMMAND": "up",
    "CSV": "trace.csv",
    "DIR": _TARGET,
    "FLEET": "deployments/fleets/conversations-h100-70b.yaml",
    "M": "2",
    "N": "2",
    "NAME=METHOD:DIR": f"mine={_DRAFTER.replace('=', ':')}",
    "OUT/stdlib-7m": _TARGET,
    "SUITE": "load",
    "TARGET": _TARGET,
    "azure_conv.csv": "trace.csv",
    "dspark=...": _DRAFTER,
    "dspark=DIR": _DRAFTER,
    "dspark=OUT/stdlib-7m-dspark": _DRAFTER,
    "dspark=models/my-drafter": _DRAFTER,
    "dspark=runs/prompts-example": _DRAFTER,
    "models/my-model": _TARGET,
}


@dataclass(frozen=True)
class Here:
    """A command that a test types, as it stands on the page but for its sizes.

    Attributes:
        says: regular expressions, separated by spaces, that are each found in what it prints.
        short: options in place of the page's of the same name, or besides them.
        fill: what prose leaves out where it names the command only.
        leaves: files that it writes, besides those that its options name.
        has_bar: it may end with 1, as figures of so short a run may miss the suite's bar.
        is_quick: it takes a second or two.
        on_cluster: it needs the one that `dspark up` has started.
    """

    says: str
    short: str = ""
    fill: str = ""
    leaves: tuple[str, ...] = ()
    has_bar: bool = False
    is_quick: bool = False
    on_cluster: bool = False


@dataclass(frozen=True)
class ByTest:
    """A command that cannot be typed like this, why, and the test that runs what it would."""

    why: str
    test: str


_EAGER = "--enforce-eager --dtype float32 --num-threads 1"  # else compiled first: a minute
_BATCH = "--prompt-tokens 16 --max-tokens 16 --concurrency 2"
_PACE = "deployments/profiles/epyc-134m.yaml"
_TURNS = (
    "--turns 2 --seconds 0.3 --warm-up 0.1 --concurrency 2 --time-scale 1"
    " --prompt-tokens 32 --max-tokens 32 --out turns"
)
_ROUNDS = "--rounds 20 --heldout-rounds 20 --prompts 8 --max-tokens 16"
_FILES = f"{_ROUNDS} --training-data fit.jsonl --heldout-data judge.jsonl"
_CLUSTER = "tests/test_docs_cluster.py"
_CLI = "tests/test_cli.py::test_the_life_of_a_cluster"
_NEWCOMER = f"{_CLUSTER}::test_a_newcomer_streams_text_in_three_commands"
_IMAGE = "tests/test_image.py::test_the_image_serves_as_non_root"
_SERVE = "tests/test_helm_serve.py::test_the_laptop_profile_serves"
_MAKE = "tests/test_docs_commands.py::test_make_knows_how"
_HELM = "tests/test_docs_commands.py::test_the_chart_is_installed_and_tested"
_PEER = "tests/test_docs_commands.py::test_the_peer_s_requirements_and_name"
_CHAOS = "root, network namespaces, and minutes of paced time"

# By how a command begins; the longest beginning counts.
PLANS: dict[str, Here | ByTest] = {
    # ------------------------------------------------------------------ here, without a cluster
    "dspark COMMAND --help": Here("usage: --detach --json", is_quick=True),
    "dspark bench": Here("usage: frontier simulator", fill="--help", is_quick=True),
    "dspark bench SUITE --help": Here("usage: --server --json", is_quick=True),
    "dspark keys create": Here("not.shown.again sha256:", fill="NAME", is_quick=True),
    "dspark eval": Here("dspark.*", "--prompts 1 --max-tokens 16"),
    "dspark calibrate": Here(
        "coupled rejection",
        _FILES,
        leaves=("deployments/models/stdlib-7m-dspark/calibration.json",),
    ),
    "dspark profile": Here(
        "batch.tokens milliseconds.a.step",
        f"{_EAGER} --tokens 1,8 --contexts 0 --repeats 1",
        fill=_TARGET,
    ),
    "dspark train": Here(
        ".",
        "--set optimization.epochs=1 --set data.sampling.max_tokens=8 --set drafter.num_anchors=4",
        fill=EXAMPLE,
        leaves=("runs/prompts-example/model.safetensors", "runs/prompts-example/training.json"),
    ),
    "dspark simulate": Here(
        "tokens|adaptive", fill="deployments/fleets/conversations-h100-70b.yaml --step 2:4"
    ),
    "dspark simulate FLEET": Here("tokens", "--step 2:4", is_quick=True),
    "dspark simulate FLEET --concurrency": Here(
        "figures", "--duration 4 --warm-up 1", is_quick=True
    ),
    "dspark simulate deployments/fleets/frontier-h100-8b-a10.yaml": Here(
        "figures rows adaptive", "--duration 4 --warm-up 1 --concurrency 2 --concurrency 4"
    ),
    "dspark bench load": Here(
        "output_tokens_per_second|throughput", f"{_EAGER} {_BATCH} --waves 1 --min-requests 2"
    ),
    "dspark bench load --trace": Here("requests", f"{_EAGER} --requests 3 --rate 20 --context 64"),
    "dspark bench drafters": Here("acceptance_length dspark", "--prompts 1 --max-tokens 16"),
    "dspark bench parity": Here("prompts mismatches within_epsilon", "--prompts 1 --max-tokens 8"),
    "dspark bench calibration": Here("ece_before ece_after auc", _ROUNDS, has_bar=True),
    "dspark bench widen": Here(
        "equality parameters",
        "--hidden-size 512 --intermediate-size 800 --num-layers 10 --num-heads 16"
        " --num-kv-heads 8 --head-dim 32 --drafter-layers 3 --prompts 1 --out widened"
        f" --target {_TARGET} --drafter {_DRAFTER.partition('=')[2]}",
        leaves=("widened/target/config.json", "widened/drafter/config.json"),
    ),
    "dspark bench frontier": Here(
        "adaptive plain over_fixed",
        f"{_EAGER} {_TURNS} --drafter-threads 1 --json --profile {_PACE}",
        has_bar=True,
    ),
    "dspark bench burst": Here(
        "p95_ratio flips recovered",
        f"{_EAGER} --runs 1 --light-s 2 --burst-s 2 --after-s 2 --max-num-seqs 4 --max-tokens 16"
        " --time-scale 1 --drafter-threads 1",
        has_bar=True,
    ),
    "dspark bench pipeline": Here(
        "delay_ratio grouping_ratio per_device",
        f"{_EAGER} {_TURNS} --profile {_PACE}",
        has_bar=True,
    ),
    "dspark bench verify_curve": Here("error_by_tokens", "--target tiny --batches 3", has_bar=True),
    "dspark bench router --trace": Here(
        "hit_rate_random pick",
        "--conversations 120 --runs 1 --replicas 2 --pick-replicas 10",
        has_bar=True,
    ),
    "dspark bench simulator --trace": Here(
        "trace_seconds",
        f"--predicted {PREDICTION} --measured frontier.json --replicas 2",
    ),
    "dspark bench simulator": Here(
        "worst_error",
        fill=f"--predicted {PREDICTION} --measured frontier.json",
    ),
    "dspark bench fuzz": Here("messages", "--surface config --messages 50 --live 2"),
    "python -m venv": Here("", "--without-pip", leaves=("peer-venv/pyvenv.cfg",)),
    # --------------------------------------------------------------------------- on the cluster
    "dspark generate": Here("\\w+", fill=_PROMPT, on_cluster=True),
    "dspark status": Here("shard|replicas drafter", on_cluster=True),
    "dspark bench load --server": Here(
        "requests failed", f"{_BATCH} --waves 1 --min-requests 2", on_cluster=True
    ),
    "dspark swap": Here("ngram", fill="my.yaml", on_cluster=True),
    "curl": Here("vllm:num_requests_running dspark:", on_cluster=True),
    "python docs/examples/openai_stream.py": Here("\\w+", on_cluster=True),
    # ------------------------------------------------------------------- typed by tests as it is
    "dspark up": ByTest("it does not return; --detach starts the same, and waits", _CLI),
    "dspark up --detach": ByTest("it starts the cluster of the others", _NEWCOMER),
    "dspark down": ByTest("it stops the cluster of the others", _NEWCOMER),
    "helm install *": ByTest("with the address of a server of ours", _HELM),
    "helm test *": ByTest("with the address of a server of ours", _HELM),
    "python -c *": ByTest("about a package that is too large; a stand-in has its metadata", _PEER),
    # ------------------------------------------------------------------------ run by other tests
    "dspark up my.yaml*": ByTest("a second cluster; starts a copy of local.yaml", _CLI),
    "dspark up deployments/two-pools.yaml": ByTest(
        "GPUs; the file is read", "tests/test_config.py::test_what_is_shipped_is_valid"
    ),
    "dspark demo *": ByTest(
        "a cluster of its own", "tests/test_cli.py::test_the_demo_shows_that_nothing_changes"
    ),
    "dspark train CONFIG --set parallel.num_workers=8 *": ByTest(
        "8 GPUs; two workers on CPUs",
        "tests/test_training_ray.py::test_workers_on_ray_survive_the_loss_of_one",
    ),
    "dspark train deployments/training/stdlib-7m-dspark.yaml *": ByTest(
        "hours; a tiny run, killed and gone on with",
        "tests/test_training_loop.py::test_a_killed_run_ends_with_the_unbroken_runs_weights",
    ),
    "dspark bench overhead": ByTest(
        "five starts of a cluster; with a tiny model",
        "tests/test_bench_speed.py::test_overhead_of_a_tiny_cluster",
    ),
    "dspark bench speed*": ByTest(
        "vLLM; with a process in its place",
        "tests/test_bench_steps.py::test_steps_are_compared_without_those_that_wake_up",
    ),
    "dspark bench gpu-steps": ByTest(
        "a GPU; the target's steps on one",
        "tests/test_cuda.py::test_outputs_with_graphs_agree_with_transformers",
    ),
    "dspark bench router --cluster": ByTest(
        "a start for each run; its conversations at one cluster",
        f"{_CLUSTER}::test_conversations_go_on_at_a_cluster",
    ),
    "dspark bench pool": ByTest(
        "minutes of paced time; a pool that goes to zero and comes back, with --full",
        "tests/test_pool_cluster.py::test_drafters_come_when_it_pays_and_go_when_it_is_off",
    ),
    "dspark bench chaos": ByTest(_CHAOS, "tests/test_chaos.py::test_three_minutes_of_chaos"),
    "dspark bench drafter-loss": ByTest(_CHAOS, "tests/test_chaos.py::test_drafters_lost_and_late"),
    "make install": ByTest("has been done by who runs this; make says what it would do", _MAKE),
    "make lint": ByTest("minutes, and a step of CI; make says what it would do", _MAKE),
    "make test": ByTest("what runs this; make says what it would do", _MAKE),
    "make test-all": ByTest("what runs this, for longer; make says what it would do", _MAKE),
    "make demo": ByTest(
        "dspark demo", "tests/test_cli.py::test_the_demo_shows_that_nothing_changes"
    ),
    "make docs": ByTest(
        "writes tracked files; that they are fresh is checked",
        "tests/test_docs_commands.py::test_generated_pages_are_fresh",
    ),
    "make chart": ByTest(
        "writes tracked files; that they are fresh is checked",
        "tests/test_helm_chart.py::test_generated_parts_are_fresh",
    ),
    "make comparison *": ByTest(
        "hours; the suite that it ends with",
        "tests/test_evaluation.py::test_the_suite_leaves_rows_differences_and_pictures",
    ),
    "pip install *": ByTest("an index, and gigabytes; what is read of the package", _PEER),
    "vllm bench serve *": ByTest(
        "vLLM; our own suite asks the same door",
        f"{_CLUSTER}::test_a_command_does_on_a_cluster_what_its_page_says",
    ),
    "python -m cluster.training.target *": ByTest(
        "an hour; a tiny run, interrupted and gone on with",
        "tests/test_training.py::test_resumed_target_run_equals_unbroken_run",
    ),
    "python -m pytest tests/test_image.py": ByTest("a test itself", _IMAGE),
    "docker build *": ByTest("a registry; buildah builds the same file", _IMAGE),
    "buildah *": ByTest("root, and a base image", _IMAGE),
    "c=$(buildah *": ByTest("root, and a base image", _IMAGE),
    "debootstrap *": ByTest("root, and a mirror of Debian's; what is built on it", _IMAGE),
    "kubectl *": ByTest("a Kubernetes; an API server of ours takes the objects", _HELM),
    "ray drain-node *": ByTest(
        "a node of several; one in network namespaces",
        "tests/test_node_faults.py::test_a_drained_node_loses_no_request",
    ),
    "ray start *": ByTest(
        "a second host; hosts in network namespaces join so",
        "tests/test_chaos.py::test_three_minutes_of_chaos",
    ),
    "serve deploy": ByTest("a Ray with a dashboard; Serve is handed a file like those", _SERVE),
    "serve status": ByTest("a Ray with a dashboard; Serve is handed a file like those", _SERVE),
}


def plan_of(command: Command) -> Here | ByTest | None:
    """How it is run; None: nobody has said."""
    start = _start_of(command)
    return None if start is None else PLANS[start]


def typed(command: Command) -> tuple[str, ...]:
    """The words that a test types: places filled, sizes as the plan says."""
    start = _start_of(command)
    assert start is not None
    plan = PLANS[start]
    assert isinstance(plan, Here)
    given = [word.strip("[]") for word in command.words[1:]]
    if len(command.words) == len(start.split()):
        given += shlex.split(plan.fill)
    short = shlex.split(plan.short)
    replaced = {word for word in short if word.startswith("--")} - {"--set"}
    words = [program(command.words[0])]
    while given:
        word = given.pop(0)
        if word in replaced:
            if given and not given[0].startswith("--"):
                given.pop(0)
            continue
        place = PLACES.get(word, re.sub(r"^/tmp/", "", word))
        words += [place] if place else []
    return (*words, *short)


def _start_of(command: Command) -> str | None:
    line = " ".join([program(command.words[0]), *command.words[1:]])
    starts = [start for start in PLANS if _is_start(start, line)]
    return max(starts, key=len, default=None)


def _is_start(start: str, line: str) -> bool:
    if isinstance(PLANS[start], Here):
        return f"{line} ".startswith(f"{start} ")
    return line.startswith(start[:-1]) if start.endswith("*") else line == start


# ---------------------------------------------------------------------------------------- typing


def fill_folder(folder: Path) -> None:
    """Puts there what a reader who follows the pages has beside him."""
    shutil.copytree(ROOT / "deployments", folder / "deployments")
    (folder / "docs").symlink_to(ROOT / "docs")
    document = yaml.safe_load((ROOT / "deployments/local.yaml").read_text())
    args = document["applications"][0]["args"]
    args["target"]["model"] = _TARGET
    # What a cluster that runs as deployments/local.yaml says may swap to.
    args["speculative"] = {"method": "ngram", "num_speculative_tokens": 3}
    (folder / "my.yaml").write_text(yaml.safe_dump(document))
    prompts = (folder / EXAMPLE).with_suffix(".jsonl").read_text().splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(prompts))
    (folder / "fit.jsonl").write_text("".join(prompts[::2]))
    (folder / "judge.jsonl").write_text("".join(prompts[1::2]))
    save_tiny_target(folder / "tiny", max_position_embeddings=1024)
    shutil.copy(ROOT / PREDICTION, folder / "frontier.json")
    rows = [f"2023-11-16 18:17:0{second}.5,{400 + second},{20 + second}" for second in range(5)]
    (folder / "trace.csv").write_text(
        "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, ""])
    )


def type_here(words: tuple[str, ...], plan: Here, folder: Path) -> str:
    """Types it in that folder, checks what the plan says, and returns what it prints."""
    started = time.time() - 0.1  # files' times are coarse
    with contextlib.chdir(folder):
        status, printed, complaint = (_dspark if words[0] == "dspark" else _process)(words)
    assert status == 0 or (plan.has_bar and status == 1), complaint
    for pattern in plan.says.split():
        assert re.search(pattern, printed), f"no {pattern} in {printed}"
    options = itertools.pairwise(words)
    names = [name for option, name in options if option in ("--out", "--plot")]
    for name in (*names, *plan.leaves):
        path = folder / name
        files = [path, *path.glob("*")]
        assert max(file.stat().st_mtime for file in files) >= started, f"{name} is not of this run"
    return printed


def _dspark(words: tuple[str, ...]) -> tuple[int, str, str]:
    printed, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
        try:
            status = cli.main(words[1:])
        except SystemExit as end:  # --help
            status = int(end.code or 0)
    return status, printed.getvalue(), complaint.getvalue()


def _process(words: tuple[str, ...]) -> tuple[int, str, str]:
    command = [sys.executable if words[0] == "python" else words[0], *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    return done.returncode, done.stdout, done.stderr
