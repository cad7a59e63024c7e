"""One request of the workload."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Job:
    """A request, and what became of it; times in simulated seconds.

    Attributes:
        number: unique, in the order of arrival.
        num_prompt_tokens, num_output_tokens: at least 1 each.
        user: of a closed loop; -1 in an open one.
        num_made: output tokens so far.
        started_s: when a replica began to compute it.
        first_token_s, ended_s: not a number before.
        slot: the router's name of its replica.
    """

    number: int
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    user: int = -1
    num_made: int = 0
    started_s: float = math.nan
    first_token_s: float = math.nan
    ended_s: float = math.nan
    slot: int = -1
