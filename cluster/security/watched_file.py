"""Files that are read again when they change."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

_Content = TypeVar("_Content")
_Stamp = tuple[tuple[int, int, int], ...]

LOOK_INTERVAL_S = 1.0


class WatchedFiles(Generic[_Content]):
    """What was made of some files, made anew when one of them has changed. Thread-safe.

    Looks only when it is asked, and at most every ``LOOK_INTERVAL_S``: there is no thread. A change
    that cannot be used leaves what was in force, and is tried again at the next look. Files are
    compared by inode, size and time, so that Kubernetes' swapped links are seen.

    Args:
        paths: of the files.
        load: reads them; raises where they cannot be used.
        on_error: told why a change was not taken, once for each change.
        clock: monotonic seconds.

    Raises:
        Exception: what ``load`` raises at first.
    """

    def __init__(
        self,
        paths: Sequence[str],
        load: Callable[[], _Content],
        *,
        on_error: Callable[[Exception], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = tuple(paths)
        self._load = load
        self._on_error = on_error
        self._clock = clock
        self._lock = threading.Lock()
        self._stamp = self._look()  # before reading: what changes meanwhile is read again
        self._failed_stamp: _Stamp | None = None
        self._content = load()
        self._looked_at = clock()

    def get(self) -> _Content:
        """What is in force now."""
        with self._lock:
            now = self._clock()
            if now - self._looked_at < LOOK_INTERVAL_S:
                return self._content
            self._looked_at = now
            stamp = self._look()
            if stamp == self._stamp:
                return self._content
            try:
                self._content = self._load()
            except Exception as error:  # whatever is wrong, what was in force goes on
                if stamp != self._failed_stamp:
                    self._on_error(error)
                self._failed_stamp = stamp
            else:
                self._stamp, self._failed_stamp = stamp, None
            return self._content

    def _look(self) -> _Stamp:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: str) -> tuple[int, int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (status.st_ino, status.st_size, status.st_mtime_ns)
