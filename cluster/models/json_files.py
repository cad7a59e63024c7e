"""Small JSON files of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        CheckpointError: the file is missing, unreadable or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(str(path), None, "no such file") from error
    except OSError as error:
        raise CheckpointError(str(path), None, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(str(path), None, f"is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(str(path), None, "must hold one JSON object")
    return data
