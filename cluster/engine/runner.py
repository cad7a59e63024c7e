"""Runs passes through all shards: rank 0's ``Runner`` and the other ranks' ``follow``.

Rank 0 starts a pass with ``launch`` and takes its logits with ``collect``, oldest first. With S
pipeline stages up to S passes are under way at once, so that every stage has work.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from cluster.engine.mesh import Mesh
from cluster.engine.pace import PacedPass, TargetPace
from cluster.engine.step_input import StepInput
from cluster.engine.target import TargetShard


class _Command(enum.IntEnum):
    FORWARD = 1
    COLLECT = 2
    IDLE = 3
    STOP = 4
    USE_FEATURES = 5


class _UnderWay(NamedTuple):
    """A pass that was launched; ``hidden`` is there already where there is one stage."""

    step: StepInput
    hidden: torch.Tensor | None
    paced: PacedPass | None


class Runner:
    """Rank 0's side. ``launch`` and ``collect`` raise when the group is broken.

    Args:
        shard: rank 0's.
        pace: ``collect`` returns when the paced device, all stages of it, would have done the pass.
    """

    def __init__(self, shard: TargetShard, pace: TargetPace | None = None) -> None:
        self.shard = shard
        self.pace = pace
        self._mesh = shard.mesh
        self._under_way: deque[_UnderWay] = deque()

    @property
    def num_stages(self) -> int:
        """Passes that can be under way at once."""
        return self._mesh.num_stages if self._mesh else 1

    def launch(self, step: StepInput) -> None:
        """Starts a pass; with one stage it is computed here and now."""
        paced = None
        if self.pace is not None:
            seconds = self.pace.curve.seconds(step.num_tokens, step.num_context_tokens)
            paced = self.pace.pace.begin(float(seconds))
        if self._mesh is not None:
            self._tell(_Command.FORWARD, step.pack(), range(1, self._mesh.world_size))
        hidden = self.shard.forward(step)
        self._under_way.append(_UnderWay(step, hidden if self.num_stages == 1 else None, paced))

    def collect(self) -> torch.Tensor:
        """Waits for the oldest pass under way.

        Returns:
            ``[R, vocab_size]`` float32 logits of its ``logit_rows``.
        """
        step, hidden, paced = self._under_way.popleft()
        if hidden is None:
            mesh = self._mesh
            if mesh is not None:
                self._tell(_Command.COLLECT, None, range(1, mesh.tensor_parallel_size))
            hidden = self.shard.receive_rows(step)
        if len(step.logit_rows) == 0:
            logits = torch.zeros(0, self.shard.vocab_size)
        else:
            logits = self.shard.logits(hidden)
        if self.pace is not None and paced is not None:
            self.pace.pace.end(paced)
        return logits

    def use_staged_features(self) -> bool:
        """Has all shards go over to what is staged on each of them; no pass may be under way.

        Returns:
            Whether the features that are cached stay valid.
        """
        if self._under_way:
            raise RuntimeError("features cannot change under a pass")
        if self._mesh is not None:
            self._tell(_Command.USE_FEATURES, None, range(1, self._mesh.world_size))
        return self.shard.use_staged_features()

    def keep_alive(self) -> None:
        """Tells idle shards that rank 0 is there; to be called well within the group's timeout."""
        if self._mesh is not None:
            self._tell(_Command.IDLE, None, range(1, self._mesh.world_size))

    def stop(self) -> None:
        """Lets the other shards' ``follow`` return."""
        if self._mesh is not None:
            self._tell(_Command.STOP, None, range(1, self._mesh.world_size))

    def _tell(self, command: _Command, payload: np.ndarray | None, ranks: range) -> None:
        if self._mesh is None or not ranks:
            return
        head = np.asarray([command], dtype=np.int64)
        message = head if payload is None else np.concatenate([head, payload])
        self._mesh.send_control(message, ranks)


def follow(shard: TargetShard, mesh: Mesh) -> None:
    """Does what rank 0 says until it says stop.

    Raises:
        RuntimeError: the group is broken; the replica must be rebuilt.
    """
    under_way: deque[StepInput] = deque()
    while True:
        message = mesh.receive_control()
        command = _Command(int(message[0]))
        if command is _Command.STOP:
            return
        if command is _Command.IDLE:
            continue
        if command is _Command.USE_FEATURES:
            shard.use_staged_features()
        elif command is _Command.FORWARD:
            step = StepInput.unpack(message[1:])
            hidden = shard.forward(step)
            if not mesh.is_first_stage:
                continue
            if mesh.num_stages > 1:
                under_way.append(step)
            elif len(step.logit_rows):
                shard.logits(hidden)
        elif command is _Command.COLLECT:
            step = under_way.popleft()
            hidden = shard.receive_rows(step)
            if len(step.logit_rows):
                shard.logits(hidden)
