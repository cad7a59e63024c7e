"""The process in which a surface is fuzzed: libFuzzer, through atheris, ends its process.

``python -m cluster.bench.fuzz_child explore SURFACE CORPUS COUNTS RUNS SEED SECONDS`` lets atheris
mutate the valid inputs of a surface, guided by the branches that are reached; most of the time it
is the surface's own mutator that changes fields. ``replay SURFACE CORPUS`` runs what was kept once
more, and prints the branch coverage of it as JSON. ``live SURFACE MESSAGES SEED`` sends messages to
live servers, and prints the figures.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import random
import sys
from collections import Counter
from pathlib import Path

from cluster.bench.fuzz_surfaces import SURFACES, Loaded

# An input may take so long; then it counts as a hang.
_HANG_S = 30
_MEMORY_MB = 2048
_MAX_BYTES = 4096
_STRUCTURED = 0.75  # of changes are to fields, the rest to bytes
_FROM_SEED = 0.25  # of changes are to a valid input, the rest to what has reached new branches
_COUNT_EVERY = 1000


def explore(
    name: str, corpus: Path, counts_path: Path, num_runs: int, seed: int, seconds: int
) -> None:
    """Does not return: atheris exits, with another status than 0 where something was found."""
    import atheris

    surface = SURFACES[name]
    with atheris.instrument_imports(include=list(surface.targets)):
        loaded = surface.load()
    for index, data in enumerate(loaded.seeds):
        (corpus / f"seed-{index}").write_bytes(data)
    counts: Counter[str] = Counter()

    def test_one(data: bytes) -> None:
        counts[loaded.check(data)] += 1
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
        *_dictionary(loaded, corpus.parent / "words.dict"),
        str(corpus),
    ]

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < _STRUCTURED:
            valid = rng.choice(loaded.seeds) if rng.random() < _FROM_SEED else data
            changed = loaded.mutate(valid, rng)
            if len(changed) <= max_size:
                return changed
        mutated: bytes = atheris.Mutate(data, max_size)
        return mutated

    def cross(data: bytes, other: bytes, max_size: int, seed: int) -> bytes:
        assert loaded.splice is not None
        spliced = loaded.splice(data, other, random.Random(seed))
        return spliced if len(spliced) <= max_size else data

    crossing = {} if loaded.splice is None else {"custom_crossover": cross}
    atheris.Setup([sys.argv[0], *arguments], test_one, custom_mutator=change, **crossing)
    atheris.Fuzz()


def _dictionary(loaded: Loaded, path: Path) -> list[str]:
    """The option that names it, where the surface has words."""
    if not loaded.words:
        return []
    words = ("".join(f"\\x{byte:02x}" for byte in word) for word in loaded.words)
    path.write_text("".join(f'"{word}"\n' for word in words))
    return [f"-dict={path}"]


def replay(name: str, corpus: Path) -> None:
    """Prints branches reached, branches there are, and inputs kept."""
    import coverage

    surface = SURFACES[name]
    files = [importlib.util.find_spec(module) for module in surface.targets]
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


def send_live(name: str, num_messages: int, seed: int) -> None:
    """Prints the figures of a surface's live run as JSON."""
    from cluster.bench.fuzz_sockets import fuzz_sockets

    logging.getLogger("cluster").setLevel(logging.ERROR)  # each broken message is a warning
    print(json.dumps(fuzz_sockets(name, num_messages, seed)))


if __name__ == "__main__":
    if sys.argv[1] == "live":
        send_live(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1] == "explore":
        runs, seed, seconds = map(int, sys.argv[5:8])
        explore(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), runs, seed, seconds)
    else:
        replay(sys.argv[2], Path(sys.argv[3]))
