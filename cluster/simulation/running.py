"""The sequences that a simulated replica runs, as columns."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluster.simulation.job import Job

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_INTEGERS = ("missing", "context", "left", "fed", "group", "asked", "link", "probed")
_FLOATS = ("luck", "fed_s", "last_s")


class Running:
    """One entry a sequence, oldest first; every column is a view ``[len(jobs)]``.

    Attributes:
        jobs: whose they are.
        missing: committed tokens that are not computed; 1 while it decodes.
        context: computed tokens.
        left: output tokens that are still to come.
        fed: positions that the drafter has, or will have; ``fed_s``: when they were last sent.
        group: that it belongs to.
        asked: draft tokens of the round under way; 0: it is not in it.
        link: which of the replica's drafters has its session.
        probed: 1 where it is drafted for in a probe.
        luck: how much better than others its guesses are, in log-odds.
        last_s: when its last tokens came.
    """

    missing: Integers
    context: Integers
    left: Integers
    fed: Integers
    group: Integers
    asked: Integers
    link: Integers
    probed: Integers
    luck: Floats
    fed_s: Floats
    last_s: Floats

    def __init__(self, capacity: int) -> None:
        self.jobs: list[Job] = []
        self._integers = np.zeros((len(_INTEGERS), capacity), dtype=np.int64)
        self._floats = np.zeros((len(_FLOATS), capacity))
        self._view()

    @property
    def num_context_tokens(self) -> int:
        """Of all of them."""
        return sum(self.context.tolist())

    def __len__(self) -> int:
        return len(self.jobs)

    def add(self, job: Job, **values: float) -> int:
        """A new entry, of whose columns those not given are 0; returns its index."""
        index = len(self.jobs)
        self._integers[:, index] = 0
        self._floats[:, index] = 0.0
        self.jobs.append(job)
        self._view()
        for name, value in values.items():
            getattr(self, name)[index] = value
        return index

    def keep(self, mask: Mask) -> None:
        """Takes out the entries where ``mask`` is false."""
        count = int(mask.sum())
        size = len(self.jobs)
        self._integers[:, :count] = self._integers[:, :size][:, mask]
        self._floats[:, :count] = self._floats[:, :size][:, mask]
        self.jobs = [job for job, is_kept in zip(self.jobs, mask, strict=True) if is_kept]
        self._view()

    def _view(self) -> None:
        size = len(self.jobs)
        for name, integers in zip(_INTEGERS, self._integers, strict=True):
            setattr(self, name, integers[:size])
        for name, floats in zip(_FLOATS, self._floats, strict=True):
            setattr(self, name, floats[:size])
