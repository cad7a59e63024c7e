"""Where this user's machine keeps what is made once and used again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(part: str) -> Path:
    """The folder of one kind of things, which need not exist yet.

    It lies in ``$DSPARK_CACHE_DIR``, else below the user's own cache. All that is in it may be
    removed at any time.
    """
    if chosen := os.environ.get("DSPARK_CACHE_DIR"):
        return Path(chosen) / part
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dspark" / part
