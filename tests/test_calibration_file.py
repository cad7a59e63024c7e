"""``calibration.json``: what is written is read, and what cannot be right is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import CheckpointError
from cluster.models.calibration_file import (
    FILE_NAME,
    CalibrationEntry,
    load_calibration,
    save_calibration,
)
from cluster.models.checkpoint import drafter_digest
from cluster.speculation.calibration import LogitMap, LogitScaling
from cluster.speculation.record import COUPLED, REJECTION, CalibrationKey

GREEDY = CalibrationKey(COUPLED, "greedy")
SAMPLED = CalibrationKey(REJECTION, "high")
FIRST = LogitScaling(
    (LogitMap((0.5, 1.5), (0.25, 0.5)), LogitMap((-1.0, 0.0, 2.0), (0.0, 1.0, 7.0)))
)
SECOND = LogitScaling((LogitMap.straight(2.0), LogitMap.straight(3.0, -1.0)))
THIRD = LogitScaling((LogitMap.straight(4.0, 1.0), LogitMap.straight(5.0, 2.0)))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of a drafter and a target; digests are taken of bytes, whatever these are."""
    for name in ("drafter", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"is": "{name}"}}')
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    return tmp_path / "drafter", tmp_path / "target"


def save(folders: tuple[Path, Path]) -> Path:
    return save_calibration(
        *folders,
        [
            CalibrationEntry(key=GREEDY, scaling=FIRST, num_rounds=9, metrics={"a": 1}),
            CalibrationEntry(key=SAMPLED, scaling=SECOND, num_rounds=8),
        ],
    )


def test_saved_is_loaded(folders: tuple[Path, Path]) -> None:
    path = save(folders)
    assert path == folders[0] / FILE_NAME
    calibration = load_calibration(*folders, num_positions=2)
    assert calibration.fitted == {GREEDY: FIRST, SAMPLED: SECOND}
    document = json.loads(path.read_text())
    assert document["entries"][0]["metrics"] == {"a": 1}
    assert list(folders[0].glob("*.partial")) == []


def test_other_fits_are_kept_and_the_same_one_is_replaced(folders: tuple[Path, Path]) -> None:
    path = save(folders)
    again = CalibrationEntry(key=SAMPLED, scaling=THIRD, num_rounds=7)
    save_calibration(*folders, [again])
    assert load_calibration(*folders).fitted == {GREEDY: FIRST, SAMPLED: THIRD}
    assert json.loads(path.read_text())["entries"][0]["metrics"] == {"a": 1}


def test_fits_for_another_drafter_are_not_kept(folders: tuple[Path, Path]) -> None:
    save(folders)
    (folders[0] / "model.safetensors").write_bytes(b"trained again")
    save_calibration(*folders, [CalibrationEntry(key=SAMPLED, scaling=THIRD, num_rounds=7)])
    assert load_calibration(*folders).fitted == {SAMPLED: THIRD}


def test_no_file_leaves_confidences_as_they_are(folders: tuple[Path, Path]) -> None:
    assert load_calibration(*folders).scaling(GREEDY, 3) == LogitScaling.identity(3)


def test_it_is_no_part_of_the_drafters_digest(folders: tuple[Path, Path]) -> None:
    before = drafter_digest(folders[0])
    save(folders)
    assert drafter_digest(folders[0]) == before


@pytest.mark.parametrize("name", ["drafter", "target"])
def test_another_model_is_refused(folders: tuple[Path, Path], name: str) -> None:
    path = save(folders)
    folder = folders[0] if name == "drafter" else folders[1]
    (folder / "model.safetensors").write_bytes(b"trained again")
    with pytest.raises(CheckpointError, match="dspark calibrate") as caught:
        load_calibration(*folders)
    assert caught.value.file == str(path)
    assert caught.value.key == f"{name}_digest"


def test_known_digests_are_believed(folders: tuple[Path, Path]) -> None:
    save(folders)
    with pytest.raises(CheckpointError, match="drafter_digest"):
        load_calibration(*folders, digests={"drafter": "0" * 64})


def put(document: Any, where: str, value: Any) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in where.split(".")]
    for part in parents:
        document = document[part]
    document[last] = value


@pytest.mark.parametrize(
    ("where", "value", "key"),
    [
        ("schema_version", 1, "schema_version"),
        ("entries", {}, "entries"),
        ("entries.0", 7, "entries.0"),
        ("entries.1.verifier", "guess", "entries.1.verifier"),
        ("entries.1.temperature_bucket", "hot", "entries.1.temperature_bucket"),
        ("entries.1.maps", [], "entries.1.maps"),
        ("entries.1.maps", "1", "entries.1.maps"),
        ("entries.1.maps", [{"raw": [0, 1], "calibrated": [0, 1]}], "entries.1.maps"),
        ("entries.1.maps.1", 1.0, "entries.1.maps.1"),
        ("entries.1.maps.1.raw", None, "entries.1.maps.1.raw"),
        ("entries.1.maps.1.raw", [1.0], "entries.1.maps.1.raw"),
        ("entries.1.maps.1.calibrated", [0, 1, 2], "entries.1.maps.1.calibrated"),
        ("entries.1.maps.1.raw.1", 0, "entries.1.maps.1.raw.1"),
        ("entries.1.maps.1.calibrated.1", -1.0, "entries.1.maps.1.calibrated.1"),
        ("entries.1.maps.0.calibrated.1", float("inf"), "entries.1.maps.0.calibrated.1"),
        ("entries.1.maps.0.calibrated.0", float("nan"), "entries.1.maps.0.calibrated.0"),
        ("entries.1.maps.0.raw.1", True, "entries.1.maps.0.raw.1"),
        ("entries.1.maps.0.raw.0", "0", "entries.1.maps.0.raw.0"),
        ("entries.1.maps.0.raw.1", 10**400, "entries.1.maps.0.raw.1"),
    ],
)
def test_what_cannot_be_right_is_refused(
    folders: tuple[Path, Path], where: str, value: Any, key: str
) -> None:
    path = save(folders)
    document = json.loads(path.read_text())
    put(document, where, value)
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError) as caught:
        load_calibration(*folders, num_positions=2)
    assert (caught.value.file, caught.value.key) == (str(path), key)


def test_a_fit_of_the_former_schema_is_refused_with_advice(folders: tuple[Path, Path]) -> None:
    path = save(folders)
    document = json.loads(path.read_text())
    document["schema_version"] = 2
    for entry in document["entries"]:
        del entry["maps"]
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="is 2, not 3; run `dspark calibrate` again"):
        load_calibration(*folders)


def test_a_fit_given_twice_is_refused(folders: tuple[Path, Path]) -> None:
    path = save(folders)
    document = json.loads(path.read_text())
    document["entries"].append(document["entries"][0])
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="repeats coupled greedy"):
        load_calibration(*folders)


def test_a_broken_file_is_refused(folders: tuple[Path, Path]) -> None:
    path = save(folders)
    path.write_text(path.read_text()[:50])
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_calibration(*folders)
