"""Python's garbage collector, where it would only cost time.

It looks for cycles among all that a process holds, again and again while objects are made.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Nothing is collected in this process while the block runs; where the collector was off
    before, it stays off."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def preload(module: str) -> None:
    """Imports a module that brings torch and transformers along, a million objects that stay.

    Nothing is collected meanwhile, and all that there is behind it is taken to stay: the collector
    never looks at it again, so that no later collection holds up a step for it. So this belongs at
    a process's start; where the module is there already, nothing happens.
    """
    if module in sys.modules:
        return
    with without_collection():
        importlib.import_module(module)
    gc.freeze()
