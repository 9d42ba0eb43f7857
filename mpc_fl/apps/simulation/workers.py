"""What simulated rounds need of whatever places groups of hospitals on processes and machines.

Calls name a method of `HospitalGroup`; which process a group is in, and how its answer comes, is the concern of who implements
`Workers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from mpc_fl.apps.simulation.hospitals import HospitalGroup

Given = ParamSpec("Given")
T = TypeVar("T")
Done = Callable[[int, int], None]  # hospitals done, hospitals in all


class Workers(Protocol):
    """Groups that hold all hospitals of a run between them. Every wait has a deadline; what a group raises ends the run."""

    def all(
        self, method: Callable[Concatenate[HospitalGroup, Given], T], *given: Given.args, **named: Given.kwargs
    ) -> list[T]:
        """Call a method of every group once; the answers in the order of groups."""

    def each(self, method: Callable[..., None], done: Done, *given: object) -> None:
        """Call a method for every hospital, with its rank first, at its group; `done` follows each one that has answered."""
