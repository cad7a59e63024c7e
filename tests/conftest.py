"""What every test run shares: the environment, and which markers this machine can run."""

import atexit
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

# Before torch, transformers and Ray are imported, and inherited by the processes that tests start.
for name, value in {
    # The models of the tests are tiny: more threads only compete with the actors beside them.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # A test that reaches for the network fails at once and the same everywhere.
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(name, value)

# What a run measures of this machine is not for the user's own clusters.
if "DSPARK_CACHE_DIR" not in os.environ:
    os.environ["DSPARK_CACHE_DIR"] = tempfile.mkdtemp(prefix="dspark-cache-")
    atexit.register(shutil.rmtree, os.environ["DSPARK_CACHE_DIR"], ignore_errors=True)
    # But kernels are named by all that they are made of, and take a minute to compile.
    _kernels = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dspark/kernels"
    _kernels.mkdir(parents=True, exist_ok=True)
    (Path(os.environ["DSPARK_CACHE_DIR"]) / "kernels").symlink_to(_kernels)

# How long an example takes says how busy the machine is, not whether it holds.
hypothesis.settings.register_profile(
    "any-machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any-machine")

SHARED = Path(os.environ.get("DSPARK_SHARED") or Path(__file__).resolve().parents[2] / "shared")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow too")
    parser.addoption(
        "--full", action="store_true", help="run slow tests too, and their largest forms: hours"
    )


@functools.cache
def _starts_clusters(path: Path) -> bool:
    return "pytest.mark.cluster" in path.read_text(encoding="utf-8")


class _OneClusterAtATime(LoadFileScheduling):
    """`--dist loadfile`, with all files that start Ray clusters in one process.

    Two clusters at once would want the same ports, and more memory and time than a test expects.
    """

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "clusters" if _starts_clusters(self.config.rootpath / file) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return _OneClusterAtATime(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, the tests whose markers ask for what this machine does not have."""
    if hasattr(config, "workerinput"):  # of xdist, which hands them out in this order
        items.sort(key=lambda item: not _starts_clusters(item.path))
    for item in items:
        for marker, missing in _REQUIREMENTS.items():
            if item.get_closest_marker(marker) and (reason := missing(config)):
                item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))
                break


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """An engine sets its process's number of threads, which other tests would compute with too.

    Two test processes of two threads each on two cores are many times slower: OpenMP's threads wait
    for each other by spinning.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture
def whole_streams() -> Iterator[None]:
    """Fails the test where a router sends a client tokens twice, or leaves some out.

    The chunks that a client hands on do not show that: it takes none that does not fit.
    """
    from tests.raw_chunks import refused_chunks  # gRPC, which not every test process needs

    with refused_chunks() as refused:
        yield
    assert not refused


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of prompts, traces and tools beside the checkout; for tests marked `shared`."""
    return SHARED


# Each returns why tests with its marker cannot run here, or None. Asked once, and only when a test
# carries the marker, since looking for a GPU imports torch.


def _slow_missing(config: pytest.Config) -> str | None:
    is_wanted = config.getoption("--run-slow") or config.getoption("--full")
    return None if is_wanted else "left out without --run-slow"


def _full_missing(config: pytest.Config) -> str | None:
    return None if config.getoption("--full") else "left out without --full"


@functools.cache
def _gpu_missing(_config: pytest.Config) -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def _root_missing(_config: pytest.Config) -> str | None:
    return None if os.geteuid() == 0 else "not running as root"


@functools.cache
def _netlab_missing(_config: pytest.Config) -> str | None:
    from cluster.bench.lab.network import why_unavailable

    return why_unavailable()


def _shared_missing(_config: pytest.Config) -> str | None:
    return None if SHARED.is_dir() else f"{SHARED} is not there; $DSPARK_SHARED names another place"


def _helm_missing(_config: pytest.Config) -> str | None:
    from tests.helm_tools import install_helm_3

    found = install_helm_3()
    return found if isinstance(found, str) else None


def _prometheus_missing(_config: pytest.Config) -> str | None:
    from tests.prometheus_tools import install_prometheus

    found = install_prometheus()
    return found if isinstance(found, str) else None


def _image_missing(_config: pytest.Config) -> str | None:
    if "DSPARK_BASE_IMAGE" not in os.environ:
        return "$DSPARK_BASE_IMAGE names no base to build on (docs/deploy.md)"
    return None if shutil.which("buildah") else "no buildah"


def _browser_missing(_config: pytest.Config) -> str | None:
    from tests.browser_tools import CHROMIUM

    return None if CHROMIUM else "no Chromium; $DSPARK_CHROMIUM names one that is not in the PATH"


_REQUIREMENTS: dict[str, Callable[[pytest.Config], str | None]] = {
    "full": _full_missing,
    "slow": _slow_missing,
    "gpu": _gpu_missing,
    "root": _root_missing,
    "netlab": _netlab_missing,
    "shared": _shared_missing,
    "helm": _helm_missing,
    "image": _image_missing,
    "browser": _browser_missing,
    "prometheus": _prometheus_missing,
}
