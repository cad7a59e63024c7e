"""Blocking work beside an actor's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


async def in_own_thread(work: Callable[[], _T]) -> _T:
    """Runs ``work`` in a thread that ends with it.

    A thread that has computed keeps OpenMP's workers for as long as it lives. With more of them in
    a process than it has cores, OpenMP lets none wait actively, and every operation of every thread
    begins with waking them up: twice the time of a small model's step.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="work")
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, work)
    finally:
        executor.shutdown(wait=False)
