"""A circle of hospitals in which each shares masks with those near it: what a closed sum of many hospitals is masked by.

The hospitals U of a sum stand in a circle, in an order that nobody chose (`aggregation.mask_graph` draws it). Each shares
masks with the `reach` hospitals that follow it and the `reach` before it: a Harary graph, as in Bell et al. (CCS 2020),
of degree 2 reach. A set V may be opened only when of the `reach` hospitals that follow each hospital of V at
least `least` are in V.

Why that is enough. If among any `reach` hospitals that follow each other fewer than `least` collude, then within reach of
every honest hospital of V another honest one of V follows. So the honest hospitals of V share a mask with the next one each,
all around the circle, whichever V was chosen and by whom: their sum is all that is seen of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, ProtocolError


@dataclass(frozen=True)
class MaskCircle:
    """U in the order of the circle, how far masks reach to each side, and how many of a reach must be in V.

    Raises `ProtocolError` for a circle that is none: somebody in it twice, a reach around it, more needed than there are.
    """

    order: tuple[str, ...]
    reach: int
    least: int

    def __post_init__(self) -> None:
        if len(self._places) != len(self.order) or not 1 <= self.least <= self.reach < len(self.order) / 2:
            raise ProtocolError("a circle of masks over these hospitals cannot be", SAME_VERSION)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.order)}

    def _at(self, place: int) -> str:
        return self.order[place % len(self.order)]

    def following(self, hospital: str, count: int) -> tuple[str, ...]:
        """The next `count` hospitals after this one."""
        place = self._places[hospital]
        return tuple(self._at(place + step) for step in range(1, count + 1))

    def preceding(self, hospital: str, count: int) -> tuple[str, ...]:
        """The `count` hospitals before this one, the nearest first."""
        place = self._places[hospital]
        return tuple(self._at(place - step) for step in range(1, count + 1))

    def neighbours(self, hospital: str) -> tuple[str, ...]:
        """With whom this hospital shares masks: 2 `reach` others."""
        return (*self.following(hospital, self.reach), *self.preceding(hospital, self.reach))

    def followed_by_too_few(self, admitted: Collection[str]) -> dict[str, int]:
        """The hospitals of V that are followed within reach by fewer than `least` of V, and by how many."""
        inside = [name in admitted for name in self.order]
        count, found = sum(inside[1 : self.reach + 1]), dict[str, int]()
        for place, name in enumerate(self.order):
            if inside[place] and count < self.least:
                found[name] = count
            count += inside[(place + self.reach + 1) % len(self.order)] - inside[(place + 1) % len(self.order)]
        return found

    def bared(self, admitted: Collection[str]) -> str | None:
        """Of the first of these hospitals, in words; `None` where V may be opened."""
        found = self.followed_by_too_few(admitted)
        if not found:
            return None
        name, count = next(iter(found.items()))
        return (
            f"of the {self.reach} hospitals that follow {name} in the circle of masks {count} are left, and {self.least} are "
            "needed for it to stay hidden"
        )


def joint_seed(keys: Sequence[bytes]) -> Seed:
    """Of the one mask that closes a hospital's summand, from the keys of all its partners, in their order."""
    return Seed(hashlib.sha256(b"mpc-fl joint key of a sum" + b"".join(keys)).digest())
