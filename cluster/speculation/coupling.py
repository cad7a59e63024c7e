"""Noise that target and drafter share without sending it, for the *coupled* verifier.

Both sides pick ``argmax(log-probability + noise)`` (the Gumbel-max trick) with the same noise, a
counter-based function of seed, choice, position and token. The target's pick is then a sample of
its own law whoever drafts, and a good drafter often makes the very same pick. Gumbel coupling for
speculative decoding: Daliri, Musco and Suresh, "Coupling without Communication and Drafter-
Invariant Speculative Decoding", 2024. The mixer is SplitMix64 (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

import torch


def _signed(word: int) -> int:
    """The int64 with the same 64 bits as the unsigned ``word``."""
    return word - (1 << 64) if word >= 1 << 63 else word


_GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
_DOMAIN = _signed(0xD1342543DE82EF95)  # keeps seed 0, choice 0, position 0 away from hash input 0


def gumbel_noise(
    *,
    seeds: torch.Tensor,
    choice_indices: torch.Tensor,
    positions: torch.Tensor,
    token_ids: torch.Tensor,
) -> torch.Tensor:
    """Standard Gumbel noise for every row and token, the same wherever it is computed.

    Each value is a function of its own four numbers only: batch shape, neighbours and device do
    not matter. The random bits are integer arithmetic and so identical everywhere; the two
    logarithms may differ in the last bit of float64 between devices.

    Args:
        seeds: ``[N]`` int64, the request's seed.
        choice_indices: ``[N]`` int64, which of the request's choices (``n`` in OpenAI's API).
        positions: ``[N]`` int64, absolute position in the sequence (prompt included) of the
            token that is about to be picked.
        token_ids: ``[V]`` or ``[N, V]`` int64 ids of the target's vocabulary, one a column. A
            drafter with a smaller vocabulary passes its ids translated to the target's.

    Returns:
        ``[N, V]`` float64, finite.
    """
    key = _mix(seeds ^ _DOMAIN)
    key = _mix(key + choice_indices * _GOLDEN_GAMMA)
    key = _mix(key + positions * _GOLDEN_GAMMA)
    bits = _mix(key.unsqueeze(-1) + (token_ids + 1) * _GOLDEN_GAMMA)
    # 52 bits and a half: every such number is exact in float64 and strictly between 0 and 1.
    uniform = _shift_right(bits, 12).to(torch.float64).add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_()


def coupled_pick(logprobs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Pick one token a row: argmax of log-probability plus noise.

    Args:
        logprobs: ``[N, V]`` float, processed; ``-inf`` where a token is not allowed.
        noise: ``[N, V]`` float64 from :func:`gumbel_noise`.

    Returns:
        ``[N]`` int64 column indices; the lowest on a tie.
    """
    return (noise + logprobs).argmax(dim=-1)


def _mix(word: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser: a bijection of int64 in which every input bit moves every output."""
    word = (word ^ _shift_right(word, 30)).mul_(_MIX_1)
    word = (word ^ _shift_right(word, 27)).mul_(_MIX_2)
    return word ^ _shift_right(word, 31)


def _shift_right(word: torch.Tensor, count: int) -> torch.Tensor:
    """Logical right shift: torch's own, on int64, carries the sign along."""
    return (word >> count).bitwise_and_((1 << (64 - count)) - 1)
