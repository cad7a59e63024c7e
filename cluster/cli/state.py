"""What ``dspark up`` leaves behind for the other commands: one small file about one cluster."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from cluster.cli.processes import Process, end_processes, find_process
from cluster.errors import ClusterStateError

DEFAULT_ADDRESS = "127.0.0.1:50051"


@dataclass(frozen=True)
class ClusterState:
    """A cluster that ``up`` started.

    Attributes:
        process: the ``dspark up`` that holds it; the cluster ends with that process.
        config: path of its configuration file.
        address: ``host:port`` of its router; empty until every part is ready.
        ray_address: ``host:port`` of its Ray cluster, known with ``address``.
        temp_dir: folder of Ray's files, known with ``address``.
        children: the processes that it started here, known once every part is ready.
    """

    process: Process
    config: str
    address: str = ""
    ray_address: str = ""
    temp_dir: str = ""
    children: tuple[Process, ...] = ()

    @property
    def is_ready(self) -> bool:
        """Whether every part was ready once."""
        return bool(self.address)

    @property
    def is_alive(self) -> bool:
        """Whether the process that holds the cluster lives."""
        return find_process(self.process.pid) == self.process


def state_dir() -> Path:
    """The folder of the state file and logs: ``$DSPARK_STATE_DIR``, else below the user's own."""
    if chosen := os.environ.get("DSPARK_STATE_DIR"):
        return Path(chosen)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "dspark"


def read_state() -> ClusterState | None:
    """The cluster of the state file, alive or not; ``None`` without a file.

    Raises:
        ClusterStateError: the file is not one of ours.
    """
    path = _state_path()
    try:
        values = json.loads(path.read_text())
        return ClusterState(
            process=Process(*values["process"]),
            config=values["config"],
            address=values["address"],
            ray_address=values["ray_address"],
            temp_dir=values["temp_dir"],
            children=tuple(Process(*child) for child in values["children"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterStateError(f"{path} cannot be read ({error}); remove it") from None


def write_state(state: ClusterState) -> None:
    """Replaces the state file, in one step."""
    path = _state_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(dataclasses.asdict(state)))
    new.replace(path)


def remove_state() -> None:
    """Removes the state file, if there is one."""
    _state_path().unlink(missing_ok=True)


def end_orphans(state: ClusterState) -> None:
    """Clears up behind an ``up`` that has ended; only one that was killed has left anything.

    Raises:
        ClusterStateError: a process of it does not end.
    """
    if remaining := end_processes(state.children):
        pids = ", ".join(str(process.pid) for process in remaining)
        raise ClusterStateError(f"these processes have not ended: {pids}")
    if state.temp_dir:
        shutil.rmtree(state.temp_dir, ignore_errors=True)
    remove_state()


def default_address() -> str:
    """Where clients look for the router when no ``--address`` is given."""
    state = read_state()
    return state.address if state is not None and state.is_ready else DEFAULT_ADDRESS


def _state_path() -> Path:
    return state_dir() / "cluster.json"
