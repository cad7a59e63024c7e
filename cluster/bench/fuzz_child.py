"""The process in which a surface is fuzzed: libFuzzer, through atheris, ends its process.

``python -m cluster.bench.fuzz_child explore SURFACE CORPUS COUNTS RUNS SEED SECONDS`` lets atheris
mutate the valid inputs of a surface, guided by the branches that are reached; most of the time the
surface's own mutator changes fields first. ``replay SURFACE CORPUS`` runs what was kept once more,
and prints the branch coverage of it as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections import Counter
from pathlib import Path

from cluster.bench.fuzz_surfaces import SURFACES

# An input may take so long; then it counts as a hang.
_HANG_S = 10
_MEMORY_MB = 2048
_MAX_BYTES = 4096
_STRUCTURED = 0.75  # of changes are to fields, the rest to bytes
_COUNT_EVERY = 1000


def explore(
    name: str, corpus: Path, counts_path: Path, num_runs: int, seed: int, seconds: int
) -> None:
    """Does not return: atheris exits, with another status than 0 where something was found."""
    import atheris

    surface = SURFACES[name]
    with atheris.instrument_imports(include=list(surface.modules)):
        check, seeds, mutate = surface.load()
    for index, data in enumerate(seeds):
        (corpus / f"seed-{index}").write_bytes(data)
    counts: Counter[str] = Counter()

    def test_one(data: bytes) -> None:
        counts[check(data)] += 1
        if counts.total() % _COUNT_EVERY == 0:
            counts_path.write_text(json.dumps(counts))

    arguments = [
        f"-runs={num_runs}",
        f"-seed={seed}",
        f"-timeout={_HANG_S}",
        f"-rss_limit_mb={_MEMORY_MB}",
        f"-max_len={_MAX_BYTES}",
        f"-max_total_time={seconds}",
        f"-artifact_prefix={corpus.parent}/",
        "-len_control=0",
        "-print_final_stats=1",
        str(corpus),
    ]

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < _STRUCTURED:
            changed = mutate(data, rng)
            if len(changed) <= max_size:
                return changed
        mutated: bytes = atheris.Mutate(data, max_size)
        return mutated

    atheris.Setup([sys.argv[0], *arguments], test_one, custom_mutator=change)
    atheris.Fuzz()


def replay(name: str, corpus: Path) -> None:
    """Prints branches reached, branches there are, and inputs kept."""
    import coverage

    surface = SURFACES[name]
    files = [importlib.util.find_spec(module) for module in surface.modules]
    paths = [spec.origin for spec in files if spec is not None and spec.origin is not None]
    # Modules that finding them has imported are read again, with their definitions.
    for module in list(sys.modules):
        if module.startswith("cluster.") and not module.startswith("cluster.bench"):
            del sys.modules[module]
    measured = coverage.Coverage(branch=True, include=paths, data_file=None)
    measured.start()
    check = surface.load().check
    inputs = [path.read_bytes() for path in sorted(corpus.iterdir())]
    for data in inputs:
        check(data)
    measured.stop()
    report = corpus.parent / "coverage.json"
    measured.json_report(outfile=str(report))
    totals = json.loads(report.read_text())["totals"]
    result = {
        "branches": totals["covered_branches"],
        "all_branches": totals["num_branches"],
        "corpus": len(inputs),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1] == "explore":
        runs, seed, seconds = map(int, sys.argv[5:8])
        explore(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), runs, seed, seconds)
    else:
        replay(sys.argv[2], Path(sys.argv[3]))
