"""Sequences in groups that take turns: in two, so that one is verified while the other is drafted
for, or in as many as the target has pipeline stages."""

from __future__ import annotations


def group_share(num_running: int, num_waiting: int, max_num_seqs: int, num_groups: int) -> int:
    """How many sequences a group may hold: its share of all that could run now.

    Not: as many as the others hold. What ends in all groups at a time would be followed by one
    sequence each.
    """
    return -(-min(max_num_seqs, num_running + num_waiting) // num_groups)
