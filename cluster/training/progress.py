"""How far a long piece of work is: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

_LOG_SECONDS = 30.0

_logger = logging.getLogger(__name__)


class Progress:
    """Counts from ``start`` to ``total`` on standard error; ``quiet`` shows nothing."""

    def __init__(self, name: str, total: int | None, quiet: bool = False, start: int = 0) -> None:
        """``total`` is ``None`` where it is not known."""
        self._name = name
        self._total = total
        self._count = start
        self._quiet = quiet
        self._last_log = time.monotonic()
        self._bar: tqdm[None] | None = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, desc=name, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Counts ``count`` more."""
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if not self._quiet and now - self._last_log > _LOG_SECONDS:
            _logger.info("%s: %d of %s", self._name, self._count, self._total or "?")
            self._last_log = now

    def note(self, text: str) -> None:
        """A line of text, above the bar or in the log."""
        self._last_log = time.monotonic()
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif not self._quiet:
            _logger.info("%s", text)
