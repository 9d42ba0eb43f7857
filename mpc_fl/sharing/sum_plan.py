"""What is public of a closed sum: its hospitals, who shares which masks with whom, and which keys it takes to open it over whom.

The protocol, and the meaning of z_ij, c_ij, U, V and P(i), is that of `closed_sum`. Nothing here is secret: a key is named, by its
kind and its two holders, and never held.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from mpc_fl.crypto.stream_cipher import Label
from mpc_fl.errors import SAME_VERSION, ProtocolError
from mpc_fl.sharing.mask_circle import MaskCircle

_NOTHING_OPENED = "it does not follow the protocol; no key was given, do not go on with it"
Key = tuple[str, str, str]  # "zero" or "closing", whose summand it is in, with whom it is shared


@dataclass(frozen=True)
class SumPlan:
    """What is public of one sum: its hospitals U in order, its opener, a label used once, `closing`, |P(i)|, and the
    transcript T as this party has it, in hex. `circle`: who shares masks with whom, all with all where it is None. The c_ij of one
    hospital are one key stream, or one each where they are `apart`, which a check of norms needs.
    """

    hospitals: tuple[str, ...]
    opener: str
    label: tuple[Label, ...]
    closing: int
    transcript: str
    circle: MaskCircle | None = None
    apart: bool = False

    def __post_init__(self) -> None:
        if len(self._places) != len(self.hospitals) or not 0 <= self.closing < len(self.hospitals):
            raise ProtocolError("a sum over these hospitals cannot be", "check federation.quorum")
        if self.circle is not None and (
            set(self.circle.order) != set(self.hospitals) or self.closing > self.circle.reach
        ):
            raise ProtocolError("a sum over these hospitals cannot be masked by this circle", SAME_VERSION)
        if self.circle is not None and self.apart:
            raise ProtocolError("a sum whose norms are checked cannot be masked by a circle", SAME_VERSION)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.hospitals)}

    @property
    def name(self) -> str:
        """The label as text, for tags of messages."""
        return " ".join(str(part) for part in self.label)

    def neighbours(self, hospital: str) -> tuple[str, ...]:
        """With whom this hospital shares z_ij."""
        if self.circle is not None:
            return self.circle.neighbours(hospital)
        return tuple(name for name in self.hospitals if name != hospital)

    def partners(self, hospital: str) -> tuple[str, ...]:
        """P(i): who shares a closing mask of this hospital's summand."""
        if self.circle is not None:
            return self.circle.following(hospital, self.closing)
        at, count = self._places[hospital], len(self.hospitals)
        return tuple(self.hospitals[(at + step) % count] for step in range(1, self.closing + 1))

    def closed_with(self, hospital: str) -> tuple[str, ...]:
        """Whose partner this hospital is."""
        if self.circle is not None:
            return self.circle.preceding(hospital, self.closing)
        return tuple(name for name in self.hospitals if hospital in self.partners(name))

    def adds(self, hospital: str, other: str) -> bool:
        """Whether the hospital adds z_ij (the other one then takes it away)."""
        return self._places[hospital] < self._places[other]

    def keys_known_to(self, hospital: str) -> list[Key]:
        """All keys that this hospital of U holds, in the order in which it commits to them."""
        zero: list[Key] = [("zero", hospital, other) for other in self.neighbours(hospital)]
        own: list[Key] = [("closing", hospital, partner) for partner in self.partners(hospital)]
        others: list[Key] = [("closing", other, hospital) for other in self.closed_with(hospital)]
        return [*zero, *own, *others]

    def keys_of(self, hospital: str, admitted: Collection[str]) -> list[Key]:
        """The keys that this hospital of V sends in step 3, in this order."""
        zero = [("zero", hospital, other) for other in self.neighbours(hospital) if other not in admitted]
        own = [("closing", hospital, partner) for partner in self.partners(hospital)]
        others = [("closing", other, hospital) for other in self.closed_with(hospital) if other in admitted]
        return [*zero, *own, *others]

    def confirmed_by(self, hospital: str, admitted: Iterable[str]) -> tuple[str, ...]:
        """Whose confirmation of V this hospital of V must see: all of V, or its own and its neighbours' in a circle."""
        if self.circle is None:
            return tuple(admitted)
        inside = set(admitted)
        return tuple(name for name in (hospital, *self.circle.neighbours(hospital)) if name in inside)

    def keys_needed(self, admitted: Sequence[str]) -> list[Key]:
        """The keys without which the sum over V cannot be opened, each in the name of the hospital whose summand it is in."""
        inside = set(admitted)
        closing: list[Key] = [("closing", name, partner) for name in admitted for partner in self.partners(name)]
        zero: list[Key] = [
            ("zero", name, other) for name in admitted for other in self.neighbours(name) if other not in inside
        ]
        return [*closing, *zero]

    def keys_missing(self, admitted: Sequence[str], answered: Sequence[str]) -> bool:
        """Whether the sum over V cannot be opened with the keys of those who answered."""
        inside = set(admitted)
        given = {key for name in answered for key in self.keys_of(name, inside)}
        return any(key not in given for key in self.keys_needed(admitted))


def require_admissible(plan: SumPlan, admitted: Sequence[str], smallest: int) -> None:
    """Raise `ProtocolError` unless V is a part of U of at least `smallest` hospitals and can be opened by this plan."""
    inside = set(admitted)
    if tuple(name for name in plan.hospitals if name in inside) != tuple(admitted):
        raise ProtocolError(
            f"{plan.opener} fixed '{plan.name}' over hospitals that do not belong to it", _NOTHING_OPENED, plan.opener
        )
    if len(admitted) < max(2, smallest):
        raise ProtocolError(
            f"{plan.opener} fixed '{plan.name}' over {len(admitted)} hospitals, too few to open it",
            _NOTHING_OPENED,
            plan.opener,
        )
    if plan.closing == 0 and len(admitted) < len(plan.hospitals):
        raise ProtocolError(f"{plan.opener} left a hospital out of '{plan.name}', which nobody may be", _NOTHING_OPENED)
    if plan.circle is not None and (bared := plan.circle.bared(inside)):
        raise ProtocolError(f"{plan.opener} fixed '{plan.name}' so that {bared}", _NOTHING_OPENED, plan.opener)
