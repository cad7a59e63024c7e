"""``calibration.json`` beside a drafter's weights: the scaling of its confidences' logits.

The file belongs to one drafter and one target and says which, by digest; it is no part of the
drafter's own digest, so calibrating again does not make another drafter of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from cluster.models.checkpoint import drafter_digest, target_digest
from cluster.models.hub import local_folder
from cluster.models.json_files import read_json
from cluster.speculation.calibration import Calibration, LogitMap, LogitScaling
from cluster.speculation.record import BUCKETS, VERIFIERS, CalibrationKey

FILE_NAME = "calibration.json"
SCHEMA_VERSION = 3  # 1 and 2 had a temperature for each position, 2 a bias too

_LARGEST = 1e6
_ADVICE = "run `dspark calibrate` again, or remove the file"


@dataclass(frozen=True, kw_only=True)
class CalibrationEntry:
    """The fit of one verifier and temperature bucket.

    Attributes:
        num_rounds: verified blocks that it was fitted on.
        metrics: what was measured before and after, for readers; JSON values.
    """

    key: CalibrationKey
    scaling: LogitScaling
    num_rounds: int
    metrics: Mapping[str, Any] = field(default_factory=dict)


def save_calibration(
    drafter: str | Path, target: str | Path, entries: Sequence[CalibrationEntry]
) -> Path:
    """Writes the file into the drafter's folder, in place of the one there, atomically.

    What that one has for other verifiers and buckets is kept, if it is usable for this pair.

    Returns:
        Its path.

    Raises:
        CheckpointError: a folder's digest cannot be taken, or the file cannot be written.
    """
    path = local_folder(drafter) / FILE_NAME
    digests = {"drafter": drafter_digest(drafter), "target": target_digest(target)}
    written = {
        entry.key: {
            "verifier": entry.key.verifier,
            "temperature_bucket": entry.key.bucket,
            "maps": [asdict(line) for line in entry.scaling.maps],
            "num_rounds": entry.num_rounds,
            "metrics": dict(entry.metrics),
        }
        for entry in entries
    }
    for key, kept in _usable_entries(path, drafter, target, digests).items():
        written.setdefault(key, kept)
    document = {
        "schema_version": SCHEMA_VERSION,
        **{f"{name}_digest": digest for name, digest in digests.items()},
        "entries": [written[key] for key in sorted(written)],
    }
    partial = path.with_name(FILE_NAME + ".partial")
    try:
        partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(str(path), None, f"cannot be written: {error.strerror}") from error
    return path


def load_calibration(
    drafter: str | Path,
    target: str | Path,
    *,
    num_positions: int | None = None,
    digests: Mapping[str, str] | None = None,
) -> Calibration:
    """The calibration of a drafter for a target; an empty one where there is no file.

    Args:
        num_positions: positions that every entry must have; unset: any number.
        digests: of ``drafter`` and ``target`` where they are known already; else they are taken
            from the files, if there is a calibration to compare them with.

    Raises:
        CheckpointError: naming file and key: it is not JSON, of another schema, for another
            drafter or target, or has a key, a length or a value that cannot be right.
    """
    path = local_folder(drafter) / FILE_NAME
    if not path.exists():
        return Calibration()
    document = read_json(path)
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        message = f"is {version}, not {SCHEMA_VERSION}; {_ADVICE}"
        raise CheckpointError(str(path), "schema_version", message)
    known = digests or {}
    for key, compute, folder in (
        ("drafter", drafter_digest, drafter),
        ("target", target_digest, target),
    ):
        if document.get(f"{key}_digest") != (known.get(key) or compute(folder)):
            message = f"is not that of {folder}: it was fitted for another {key}; {_ADVICE}"
            raise CheckpointError(str(path), f"{key}_digest", message)
    entries = document.get("entries")
    if not isinstance(entries, list):
        raise CheckpointError(str(path), "entries", "must be a list")
    fitted: dict[CalibrationKey, LogitScaling] = {}
    for index, entry in enumerate(entries):
        name = f"entries.{index}"
        fit_key, scaling = _read_entry(path, name, entry, num_positions)
        if fit_key in fitted:
            raise CheckpointError(str(path), name, f"repeats {fit_key.verifier} {fit_key.bucket}")
        fitted[fit_key] = scaling
    return Calibration(fitted)


def drop_stale_calibration(drafter: str | Path) -> None:
    """Removes the file where it is for other weights than those beside it now: it is of no use,
    and would be refused.

    Raises:
        CheckpointError: the drafter's digest cannot be taken.
    """
    path = local_folder(drafter) / FILE_NAME
    if not path.exists():
        return
    try:
        fitted_for = read_json(path).get("drafter_digest")
    except CheckpointError:
        fitted_for = None
    if fitted_for != drafter_digest(drafter):
        path.unlink(missing_ok=True)


def _usable_entries(
    path: Path, drafter: str | Path, target: str | Path, digests: Mapping[str, str]
) -> dict[CalibrationKey, dict[str, Any]]:
    """Entries of the file at ``path`` as they stand there; none where it cannot be used."""
    try:
        fitted = load_calibration(drafter, target, digests=digests).fitted
    except CheckpointError:
        return {}
    return dict(zip(fitted, read_json(path)["entries"], strict=True)) if fitted else {}


def _read_entry(
    path: Path, name: str, entry: Any, num_positions: int | None
) -> tuple[CalibrationKey, LogitScaling]:
    if not isinstance(entry, dict):
        raise CheckpointError(str(path), name, "must be an object")
    for key, known in (("verifier", VERIFIERS), ("temperature_bucket", BUCKETS)):
        if entry.get(key) not in known:
            message = f"is {entry.get(key)!r}, not one of {', '.join(known)}"
            raise CheckpointError(str(path), f"{name}.{key}", message)
    maps = entry.get("maps")
    if not isinstance(maps, list) or not maps:
        raise CheckpointError(str(path), f"{name}.maps", "must be a list of maps")
    if num_positions is not None and len(maps) != num_positions:
        message = f"has {len(maps)} maps for a drafter of {num_positions} positions"
        raise CheckpointError(str(path), f"{name}.maps", message)
    fit_key = CalibrationKey(entry["verifier"], entry["temperature_bucket"])
    lines = (_read_map(path, f"{name}.maps.{index}", line) for index, line in enumerate(maps))
    return fit_key, LogitScaling(tuple(lines))


def _read_map(path: Path, where: str, line: Any) -> LogitMap:
    if not isinstance(line, dict):
        raise CheckpointError(str(path), where, "must be an object")
    raw, calibrated = (
        _read_rising(path, f"{where}.{key}", line.get(key)) for key in ("raw", "calibrated")
    )
    if len(calibrated) != len(raw):
        message = f"has {len(calibrated)} values beside {len(raw)} raw ones"
        raise CheckpointError(str(path), f"{where}.calibrated", message)
    return LogitMap(raw, calibrated)


def _read_rising(path: Path, where: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) < 2:
        raise CheckpointError(str(path), where, "must be a list of two numbers or more")
    for index, value in enumerate(values):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= _LARGEST:
            message = f"is {value!r}, not a number within {_LARGEST:g}"
            raise CheckpointError(str(path), f"{where}.{index}", message)
        if index and value <= values[index - 1]:
            message = f"is {value!r}, not above the one before"
            raise CheckpointError(str(path), f"{where}.{index}", message)
    return tuple(map(float, values))
