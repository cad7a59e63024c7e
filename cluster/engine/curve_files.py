"""Verify curves in files: the ones that users name, and the cache of what was measured before.

The cache lets a restart serve at once. It is a folder of small JSON files, one for each target,
layout and machine; nothing in it is needed, and all of it may be removed at any time. Free of
torch, for the CLI.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

from cluster.errors import ConfigError
from cluster.speculation.verify_curve import CurveOrigin, VerifyCurve

logger = logging.getLogger(__name__)

_MAX_CACHED_CURVES = 64


def read_curve(path: str | Path) -> VerifyCurve:
    """Reads a curve that ``write_curve`` wrote.

    Raises:
        ConfigError: the file cannot be read, or a value in it is wrong; names both.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return VerifyCurve.from_dict(values)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(str(path), f"is not JSON: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.key}", error.message) from None


def write_curve(path: str | Path, curve: VerifyCurve) -> None:
    """Writes a curve in one step: readers see the old file or the new one.

    Raises:
        ConfigError: the file cannot be written; names it.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(curve.to_dict(), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(str(path), f"cannot be written: {error.strerror}") from None


class CurveCache:
    """The measured curves of this machine.

    Guarantees: never raises because of what lies in the folder or because it cannot be written;
    a file that is broken or of another origin is not used, and a warning names it; holds at most
    64 curves, those that were written last.

    Args:
        folder: need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, origin: CurveOrigin) -> Path:
        """Where the curve of an origin lies."""
        identity = json.dumps(origin.identity, sort_keys=True)
        return self._folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"

    def load(self, origin: CurveOrigin) -> VerifyCurve | None:
        """The curve that was measured on the like of ``origin``, or ``None``."""
        path = self.path(origin)
        if not path.exists():
            return None
        try:
            curve = read_curve(path)
        except ConfigError as error:
            logger.warning("ignoring a broken verify curve: %s", error)
            return None
        if curve.origin is None or curve.origin.identity != origin.identity:
            logger.warning("ignoring a verify curve of another origin: %s", path)
            return None
        return curve

    def save(self, curve: VerifyCurve) -> None:
        """Keeps a curve that has an origin; drops the oldest where there are too many."""
        if curve.origin is None:
            raise ValueError("a curve without an origin cannot be found again")
        try:
            write_curve(self.path(curve.origin), curve)
            files = sorted(self._folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
            for file in files[:-_MAX_CACHED_CURVES]:
                file.unlink(missing_ok=True)
        except (ConfigError, OSError) as error:
            logger.warning("the verify curve is not cached: %s", error)
