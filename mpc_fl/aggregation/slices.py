"""How a masked summand is cut among those who open it: one slice for each hospital of U, and who opens which. Pure.

Slice k of every summand goes to hospital k, who keeps that of its own. Of hospitals that are not in V none opens anything:
what would have been theirs goes to the next hospital of V after them in U, as the same words of the same summands, so that
nothing is opened that was not before. Where summands are checked, a copy of what a hospital opens of its own summand is kept by the
next one of V (`keeper`): else nobody but itself would have it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from mpc_fl.errors import SAME_VERSION, ProtocolError


@dataclass(frozen=True)
class Slices:
    """A vector of `elements` words in as many slices as there are `hospitals`, U in order; a slice has its hospital's name.

    Their lengths differ by one word at most; where there are fewer words than hospitals some are empty.
    """

    hospitals: tuple[str, ...]
    elements: int

    def place(self, name: str) -> slice:
        """Where slice `name` lies in the vector."""
        at, count = self.hospitals.index(name), len(self.hospitals)
        return slice(at * self.elements // count, (at + 1) * self.elements // count)

    def length(self, name: str) -> int:
        """Words of slice `name`."""
        place = self.place(name)
        return int(place.stop - place.start)

    def cut(self, words: torch.Tensor) -> dict[str, torch.Tensor]:
        """The slices of a tensor of `elements` words (any shape, in row order), each (length,); views where that can be."""
        flat = words.reshape(-1)
        return {name: flat[self.place(name)] for name in self.hospitals}

    def joined(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The vector of these slices, shape (`elements`,), in memory of its own."""
        return torch.cat([parts[name] for name in self.hospitals])

    def opener(self, name: str, admitted: Collection[str]) -> str:
        """Who of V opens slice `name`: its hospital, or the next of V after it in U. Raises `ProtocolError` for an empty V."""
        at = self.hospitals.index(name)
        for hospital in (*self.hospitals[at:], *self.hospitals[:at]):
            if hospital in admitted:
                return hospital
        raise ProtocolError("nobody is left to open a sum", SAME_VERSION)

    def keeper(self, hospital: str, admitted: Collection[str]) -> str:
        """Who keeps a copy of what a hospital of V opens of its own summand: the next of V after it in U. It is another one where
        V has two."""
        at = self.hospitals.index(hospital)
        after = (*self.hospitals[at + 1 :], *self.hospitals[: at + 1])
        return next(name for name in after if name in admitted)

    def opened_by(self, hospital: str, admitted: Collection[str]) -> tuple[str, ...]:
        """The slices that a hospital of V opens, in the order of U."""
        return tuple(name for name in self.hospitals if self.opener(name, admitted) == hospital)

    def handed_on(self, admitted: Collection[str]) -> dict[str, str]:
        """The slices whose hospitals are not in V, and who of V opens each of them."""
        return {name: self.opener(name, admitted) for name in self.hospitals if name not in admitted}


def who_has_all(hospitals: Sequence[str], proposer: str, came: Mapping[str, Collection[str]]) -> tuple[str, ...]:
    """V: hospitals, in the order of U and with the proposer, of which each has its slice of each. `came` says whose it has.

    One after the other is left out, who lacks most or is lacked by most of the others, of several the last in U.
    """
    admitted = [name for name in hospitals if name in came]
    while True:
        lacking = {
            name: sum((other not in came[name]) + (name not in came[other]) for other in admitted)
            for name in admitted
            if name != proposer
        }
        most = max(lacking.values(), default=0)
        if not most:
            return tuple(admitted)
        admitted.remove([name for name, count in lacking.items() if count == most][-1])
