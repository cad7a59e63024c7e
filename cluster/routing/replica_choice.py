"""Filter, score, pick: where a request goes, from what is known of each replica.

Everything is counted in tokens that a replica computes. What it has queued makes a request wait,
and what it lacks of the prompt makes the request longer, by the same time for each token. So the
two can be added: a cached prefix is worth as many queued tokens as it saves, and no more. That is
why following prefixes does not pile up a queue.

Arrays have one entry a replica.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Tokens = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ChoicePolicy:
    """How replicas are scored.

    Attributes:
        queue_weight: of a token that is queued.
        prefix_weight: of a token of the prompt that would have to be computed.
        tie_share: scores that are no further apart than this share of the prompt's tokens are
            equal, and the choice among them is random, so that routers which see the same do not
            all do the same.
    """

    queue_weight: float = 1.0
    prefix_weight: float = 1.0
    tie_share: float = 0.05


POLICIES = {
    "prefix": ChoicePolicy(),
    "queue": ChoicePolicy(prefix_weight=0.0),
    "random": ChoicePolicy(queue_weight=0.0, prefix_weight=0.0),
}


def queued_tokens(reported: float, unreported: float, num_routers: int) -> float:
    """Tokens that a replica has to compute before, or beside, the next request.

    Args:
        reported: by the replica, of all routers.
        unreported: sent by this router since. The others, which see the same report, are taken to
            have sent as much.
        num_routers: that the replica is connected to, this one included.
    """
    return reported + unreported * max(num_routers, 1)


def missing_tokens(num_tokens: int, cached: npt.NDArray[np.int64] | int) -> Tokens:
    """Tokens of a prompt that each replica would have to compute; one number for all of them where
    they have equally many of it."""
    return np.asarray(np.maximum(num_tokens - cached, 1.0))


def has_room(free_tokens: Tokens, missing: Tokens) -> Mask:
    """Whose free pages hold what would have to be computed."""
    return free_tokens >= missing


def prefer(eligible: Mask, preferred: Mask) -> Mask:
    """Those of ``eligible`` that are ``preferred``, or all of them where none is."""
    both = eligible & preferred
    return both if both.any() else eligible


def score(queued: Tokens, missing: Tokens, policy: ChoicePolicy) -> Tokens:
    """The cost of each replica; less is better."""
    return policy.queue_weight * queued + policy.prefix_weight * missing


def pick(costs: Tokens, eligible: Mask, tie_tokens: float, rng: random.Random) -> int | None:
    """One of the cheapest, each as likely; ``None`` where nothing is eligible."""
    costs = np.where(eligible, costs, np.inf)
    least = costs.min()
    if least == np.inf:
        return None
    ties = np.flatnonzero(costs <= least + tie_tokens)
    return int(ties[int(rng.random() * len(ties))])
