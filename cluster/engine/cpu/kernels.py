"""Builds and loads the kernels of this folder, ``torch.ops.dspark_cpu``.

They are compiled once for a machine, with its own compiler and for its own processor, and kept in
the cache folder. Nothing needs them: without a compiler the engine computes by PyTorch's operators.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from cluster.engine.cache_folder import cache_folder
from cluster.engine.machine import processor_flags, processor_name
from cluster.engine.operator_shapes import SHAPES

logger = logging.getLogger(__name__)

_DTYPES = (torch.bfloat16, torch.float32)
_FOLDER = Path(__file__).parent
_SOURCES = ("linear.cpp", "attention.cpp")
_HEADERS = ("block_products.h", "tiles.h")
# Sums may be reordered, so that they use vectors; -ffast-math itself would change how all of the
# process rounds.
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fopenmp",
    "-DAT_PARALLEL_OPENMP=1",
    "-shared",
    "-fPIC",
)
_BUILD_TIMEOUT_S = 600
_MAX_KEPT = 16  # builds for other processors or versions


@functools.cache
def load_kernels() -> bool:
    """Loads the kernels, after compiling them where this was not done yet (up to a minute).

    Returns:
        Whether they can be used; if not, the reason is logged.
    """
    try:
        torch.ops.load_library(_built())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning("computing without kernels of our own: %s", error)
        return False
    for name, shape in SHAPES.items():
        torch.library.register_fake(f"dspark_cpu::{name}", shape)
    return True


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors like these can be computed with the kernels, which are loaded then."""
    return device.type == "cpu" and dtype in _DTYPES and load_kernels()


def can_pack(dtype: torch.dtype) -> bool:
    """Whether the loaded kernels have linear layers of packed weights of ``dtype``.

    bf16: with AVX512-BF16, or AVX2 and FMA; float32: with AVX2 and FMA, without AVX512.
    """
    return dtype in _DTYPES and bool(torch.ops.dspark_cpu.packs(dtype))


def _built() -> Path:
    """The library's file. Processes that start together build it once.

    Raises:
        OSError: no compiler, or the cache cannot be written.
        subprocess.SubprocessError: the compiler fails.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (c++, or $CXX) is installed")
    folder = cache_folder("kernels")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{_identity(compiler)}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when its holder dies
        if not library.exists():
            for left in folder.glob("*.partial"):  # by a build that was killed; we hold the lock
                left.unlink(missing_ok=True)
            partial = library.with_suffix(f".{platform.node()}-{os.getpid()}.partial")
            _compile(compiler, partial)
            partial.replace(library)
            # A library that is loaded stays so when its file is gone.
            builds = sorted(folder.glob("*.so"), key=lambda file: file.stat().st_mtime)
            for old in builds[:-_MAX_KEPT]:
                old.unlink(missing_ok=True)
    return library


def _compile(compiler: str, output: Path) -> None:
    from torch.utils import cpp_extension  # which brings setuptools along

    command = [compiler, *_FLAGS]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [str(_FOLDER / name) for name in _SOURCES]
    command += ["-o", str(output)]
    command += [f"-L{path}" for path in cpp_extension.library_paths()]
    command += ["-lc10", "-ltorch_cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        output.unlink(missing_ok=True)
        raise OSError(f"{compiler} failed: {done.stderr.strip()[-2000:]}")


def _identity(compiler: str) -> str:
    """Of everything that the library depends on."""
    digest = hashlib.sha256()
    for name in (*_SOURCES, *_HEADERS):
        digest.update((_FOLDER / name).read_bytes())
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    machine = (processor_name(), processor_flags(), *platform.libc_ver())
    parts = (torch.__version__, *machine, version, *_FLAGS)
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()[:32]
