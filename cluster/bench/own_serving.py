"""Our side of a comparison: how it is configured, and the whole cluster in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from cluster.bench.drafter_choice import DrafterChoice
from cluster.errors import DsparkError

_APPLICATION = {"name": "dspark", "import_path": "cluster.actors.app:build", "route_prefix": None}
_STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class OwnSettings:
    """How our side serves.

    Attributes:
        target: checkpoint folder.
        drafter: unset: plain decoding.
        num_threads, drafter_threads: of target and drafter.
        scheduler: ``speculative.scheduler``.
        num_speculative_tokens: for methods whose checkpoint has no block.
        verify_curve: file of ``profile_curve``; unset: measured at each start.
        enforce_eager: whether layers run one by one.
        num_replicas: of the target.
        replica_choice: ``router.replica_choice``.
        overrides: more keys of a configuration, by section; they win.
    """

    target: str
    drafter: DrafterChoice | None
    dtype: str = "bfloat16"
    num_threads: int = 2
    drafter_threads: int = 1
    scheduler: str = "prefix"
    num_speculative_tokens: int = 7
    draft_top_k: int = 64
    max_model_len: int = 1024
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    kv_cache_memory_mb: int = 2048
    verify_curve: str | None = None
    enforce_eager: bool = False
    num_replicas: int = 1
    replica_choice: str = "prefix"
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """The ``args`` of a configuration."""
        values: dict[str, Any] = {
            "target": {
                "model": str(Path(self.target).resolve()),
                "num_replicas": self.num_replicas,
                "dtype": self.dtype,
                "num_threads": self.num_threads,
                "max_model_len": self.max_model_len,
                "max_num_seqs": self.max_num_seqs,
                "max_num_batched_tokens": self.max_num_batched_tokens,
                "kv_cache_memory_mb": self.kv_cache_memory_mb,
                "verify_curve": self.verify_curve,
                "enforce_eager": self.enforce_eager,
            },
            "drafter": {
                "dtype": self.dtype,
                "num_threads": self.drafter_threads,
                "enforce_eager": self.enforce_eager,
            },
            "router": {"port": 0, "replica_choice": self.replica_choice},
        }
        if self.drafter is not None:
            section = self.drafter.speculative(self.num_speculative_tokens, self.draft_top_k)
            section |= {"scheduler": self.scheduler, "online_calibration": True}
            if self.drafter.model is not None:
                section["model"] = str(Path(self.drafter.model).resolve())
            values["speculative"] = section
        for name, keys in self.overrides.items():
            values[name] = {**values.get(name, {}), **keys}
        return values

    def document(self) -> dict[str, Any]:
        """A Ray Serve configuration, as ``dspark up`` takes it."""
        return {
            "proxy_location": "Disabled",
            "applications": [{**_APPLICATION, "args": self.values()}],
        }


def profile_curve(settings: OwnSettings, folder: Path, repeats: int) -> OwnSettings:
    """The settings with a verify curve of their target, measured once in a process of its own.

    So every start serves with the same thorough curve, and measures none while it is idle.

    Args:
        folder: for the curve and the log.
        repeats: of each point.

    Raises:
        DsparkError: it cannot be measured; names the log.
    """
    curve, log = folder / "verify-curve.json", folder / "profile.log"
    options = {
        "--dtype": settings.dtype,
        "--num-threads": settings.num_threads,
        "--max-model-len": settings.max_model_len,
        "--max-num-seqs": settings.max_num_seqs,
        "--max-num-batched-tokens": settings.max_num_batched_tokens,
        "--kv-cache-memory-mb": settings.kv_cache_memory_mb,
        "--repeats": repeats,
        "--out": curve,
    }
    command = [sys.executable, "-m", "cluster.cli", "profile", settings.target]
    command += [str(part) for option in options.items() for part in option]
    if settings.enforce_eager:
        command.append("--enforce-eager")
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=file, check=False)
    if done.returncode != 0:
        raise DsparkError(f"the verify curve cannot be measured (log: {log})")
    return replace(settings, verify_curve=str(curve))


class OwnCluster:
    """``dspark up`` while a ``with`` block runs, beside any other cluster of this machine.

    It is started for each measurement rather than stopped with a signal in between: its watchdogs
    would take a stop for a failure.

    Args:
        settings: what it serves.
        folder: for its configuration, state and log.

    Raises:
        DsparkError: it does not start; names the log.
    """

    def __init__(self, settings: OwnSettings, folder: Path) -> None:
        self.address = ""
        self.ray_address = ""
        self._config = folder / "cluster.yaml"
        self._config.write_text(yaml.safe_dump(settings.document()), encoding="utf-8")
        self._log = folder / "cluster.log"
        self._environment = {**os.environ, "DSPARK_STATE_DIR": str(folder / "state")}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "cluster.cli", "up", str(self._config), "--json"]
        with self._log.open("a") as log:
            process = subprocess.Popen(
                command, env=self._environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self._process = process
        line = process.stdout.readline() if process.stdout is not None else ""
        ready = json.loads(line) if line else {}
        if "address" not in ready:
            self._stop()
            raise DsparkError(f"the cluster does not start: {ready.get('error')} ({self._log})")
        self.address = ready["address"]
        self.ray_address = ready["ray_address"]
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
