"""The view of a round that a hospital is in, and who has given it up.

A hospital gives up a view when one part of it came to nothing: a sum, signatures, a proposal. Others may be in the next part by
then and wait for it there. So it says so once, to all, and whoever waits for it anywhere in that view hears it
(`Links.voided_by`): in the part of the view, too, that this hospital never came to.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpc_fl.aggregation.words import broadcast
from mpc_fl.sharing.opening import SecretDomain


class Views:
    """A hospital's views. All that it waits for over the links of its domain, once it has entered one, is part of that one."""

    def __init__(self, domain: SecretDomain) -> None:
        self._domain, self._links, self._number = domain, domain.links, -1

    def enter(self, number: int, view: int) -> None:
        """From now on a wait for a hospital that has given up this view of round `number` raises `SumLostError`."""
        if number != self._number:
            self._links.scoped(_scope(self._number)).end_scope()
        self._number, self._domain.links = number, self._links.voided_by(f"{_scope(number)}/{view}")

    def give_up(self, view_of: tuple[int, int], names: Sequence[str], why: str) -> None:
        """Tell all of `names` that this hospital gives up a view, and why; who is lost is told nothing."""
        number, view = view_of
        links = self._links.scoped(_scope(number))
        broadcast(names, lambda name: links.send_object(name, str(view), {"reason": why}))


def _scope(number: int) -> str:
    return f"given up {number}"
