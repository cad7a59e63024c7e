"""Which replica has which beginnings of prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from cluster.routing.prefix_journal import PrefixChanges

_FEW = 8  # slots that are faster one by one


class PrefixIndex:
    """Finds how much of a prompt each replica has, or is about to have.

    A replica is a number, its slot. Each key leads to the set of slots that have it, as the bits of
    an int: most are on one replica, and share that one's int. So a key costs about 150 bytes, and
    a prompt one look-up a key, for all replicas together.
    """

    def __init__(self) -> None:
        self._reported: dict[int, int] = {}
        self._expected: dict[int, int] = {}
        self._num_expected: Counter[tuple[int, int]] = Counter()  # slot, key
        self._by_slot: list[set[int]] = []
        self._bits: list[int] = []

    @property
    def num_keys(self) -> int:
        """Keys that are reported by some replica."""
        return len(self._reported)

    def apply(self, slot: int, changes: PrefixChanges) -> None:
        """Takes what a replica reports."""
        self._make_room(slot)
        if changes.is_full:
            self._take_away(slot, list(self._by_slot[slot]))
        self._take_away(slot, changes.removed)
        bit = self._bits[slot]
        keys = self._by_slot[slot]
        for key in changes.added:
            there = self._reported.get(key)
            self._reported[key] = bit if there is None else there | bit
            keys.add(key)

    def expect(self, slot: int, keys: Iterable[int]) -> None:
        """Counts on what a replica will have once it has computed what it was sent."""
        self._make_room(slot)
        for key in keys:
            self._num_expected[slot, key] += 1
            self._expected[key] = self._expected.get(key, 0) | self._bits[slot]

    def expect_no_more(self, slot: int, keys: Iterable[int]) -> None:
        """Takes one ``expect`` of the same keys back."""
        for key in keys:
            self._num_expected[slot, key] -= 1
            if self._num_expected[slot, key]:
                continue
            del self._num_expected[slot, key]
            there = self._expected[key] & ~self._bits[slot]
            if there:
                self._expected[key] = there
            else:
                del self._expected[key]

    def drop(self, slot: int) -> None:
        """Forgets what a replica has reported."""
        if slot < len(self._by_slot):
            self._take_away(slot, list(self._by_slot[slot]))

    def match(self, keys: Sequence[int], num_tokens: int, cached: npt.NDArray[np.int64]) -> None:
        """Finds how much of a prompt each replica has.

        A cache lets go of what continues a prefix before it lets go of the prefix. So between two
        keys that the same replicas have nothing is looked up.

        Args:
            keys: of the prompt.
            num_tokens: that each key stands for.
            cached: ``[slots]``, set to the tokens that each slot has where it has any.
        """
        if not keys:
            return
        first = self._having(keys[0])
        if not first:
            return
        last = first & self._having(keys[-1])
        _set(cached, last, len(keys) * num_tokens)
        self._split(keys, num_tokens, cached, (1, first), (len(keys), last))

    def match_one(self, slot: int, keys: Sequence[int]) -> int:
        """How many of ``keys``, from the first on, one replica has."""
        if slot >= len(self._by_slot):
            return 0
        held = self._by_slot[slot]
        for index, key in enumerate(keys):
            if key not in held and not self._expected.get(key, 0) >> slot & 1:
                return index
        return len(keys)

    def unreported(self, slot: int, keys: Sequence[int]) -> list[int]:
        """Those of ``keys`` that a replica has not reported."""
        held = self._by_slot[slot] if slot < len(self._by_slot) else ()
        return [key for key in keys if key not in held]

    def _split(
        self,
        keys: Sequence[int],
        num_tokens: int,
        cached: npt.NDArray[np.int64],
        low: tuple[int, int],
        high: tuple[int, int],
    ) -> None:
        """As ``match``, of those that have what ``low`` says, but not what ``high`` says: a number
        of keys, and who has them all."""
        num_low, at_low = low
        num_high, at_high = high
        while at_low != at_high:
            if num_high - num_low == 1:
                _set(cached, at_low & ~at_high, num_low * num_tokens)
                return
            num_mid = (num_low + num_high) // 2
            at_mid = at_low & self._having(keys[num_mid - 1])
            if at_mid != at_low:
                self._split(keys, num_tokens, cached, (num_low, at_low), (num_mid, at_mid))
            num_low, at_low, at_high = num_mid, at_mid, at_high & at_mid

    def _having(self, key: int) -> int:
        return self._reported.get(key, 0) | self._expected.get(key, 0)

    def _take_away(self, slot: int, keys: Iterable[int]) -> None:
        bit = self._bits[slot]
        for key in keys:
            if key not in self._by_slot[slot]:
                continue
            self._by_slot[slot].remove(key)
            there = self._reported[key] & ~bit
            if there:
                self._reported[key] = there
            else:
                del self._reported[key]

    def _make_room(self, slot: int) -> None:
        while len(self._bits) <= slot:
            self._bits.append(1 << len(self._bits))
            self._by_slot.append(set())


def _set(cached: npt.NDArray[np.int64], slots: int, value: int) -> None:
    """Sets what the bits of ``slots`` stand for."""
    if slots.bit_count() > _FEW:
        data = slots.to_bytes((slots.bit_length() + 7) // 8, "little")
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
        cached[np.flatnonzero(bits)] = value
        return
    while slots:
        slot = slots.bit_length() - 1
        cached[slot] = value
        slots ^= 1 << slot
