"""Generate the Python modules of `cluster/v1` from `protos/cluster/v1/*.proto`.

With `--check` nothing is written, and the exit status is 1 when `cluster/v1` is out of date.
"""

import argparse
import filecmp
import importlib.resources
import shutil
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

PROTO_ROOT = Path(__file__).resolve().parent
REPOSITORY = PROTO_ROOT.parent
PACKAGE = Path("cluster", "v1")
INIT = '"""Generated from protos/cluster/v1 by `make protos`; do not edit."""\n'


def generate(destination: Path) -> None:
    """Write the package's modules, `.pyi` included, below `destination`."""
    proto_files = sorted((PROTO_ROOT / PACKAGE).glob("*.proto"))
    if not proto_files:
        raise SystemExit(f"no .proto files in {PROTO_ROOT / PACKAGE}")
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={PROTO_ROOT}",
            f"--proto_path={importlib.resources.files('grpc_tools') / '_proto'}",
            f"--python_out={destination}",
            f"--pyi_out={destination}",
            f"--grpc_python_out={destination}",
            *(str(path) for path in proto_files),
        ]
    )
    if status != 0:
        raise SystemExit(f"protoc failed with status {status}")
    (destination / PACKAGE / "__init__.py").write_text(INIT, encoding="utf-8")


def modules(package: Path) -> set[str]:
    """The names of the package's source files, without what Python caches beside them."""
    return {path.name for path in package.glob("*") if path.is_file()}


def stale_modules(fresh: Path, committed: Path) -> list[str]:
    """The files that are missing from `committed`, differ from `fresh`, or should be gone."""
    names = sorted(modules(fresh) | modules(committed))
    _, different, missing = filecmp.cmpfiles(fresh, committed, names, shallow=False)
    return sorted(different + missing)


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate cluster/v1 from the .proto files.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    arguments = parser.parse_args()

    committed = REPOSITORY / PACKAGE
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        fresh = Path(directory) / PACKAGE
        stale = stale_modules(fresh, committed)
        if arguments.check:
            for name in stale:
                print(f"out of date: {PACKAGE / name}", file=sys.stderr)
            if stale:
                print("run `make protos` and commit the result", file=sys.stderr)
            return 1 if stale else 0
        committed.mkdir(parents=True, exist_ok=True)
        for name in stale:
            if (fresh / name).exists():
                shutil.copyfile(fresh / name, committed / name)
            else:
                (committed / name).unlink()
            print(f"updated: {PACKAGE / name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
