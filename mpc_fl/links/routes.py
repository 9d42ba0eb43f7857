"""Who dials whom: the routes between parties of which some can only dial out. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from mpc_fl.errors import LinkError

How = Literal["dial", "await", "relay, first", "relay, second"]


@dataclass(frozen=True)
class Route:
    """How this party and one peer reach each other: it dials `address`, awaits the peer, or both use the relay."""

    how: How
    address: str = ""

    @property
    def relayed(self) -> bool:
        """Whether what goes to the peer goes through the relay."""
        return self.how.startswith("relay")


def routes(
    name: str, parties: Sequence[str], addresses: dict[str, str], relay: str | None, announced: Collection[str] = ()
) -> dict[str, Route]:
    """The routes of party `name` to all others; a party without an address can only dial out.

    Those in `announced` have one that is not known yet: where it would be dialled the address of a route is empty until it is.

    All parties compute this from the same list, so the two ends of a pair always agree. Raises `LinkError` when two
    parties without address have no relay that has one.
    """
    result: dict[str, Route] = {}
    for peer in parties:
        if peer == name:
            continue
        later = parties.index(name) > parties.index(peer)
        if peer in addresses and (name not in addresses or later):
            result[peer] = Route("dial", addresses[peer])
        elif name in addresses:
            result[peer] = Route("await")
        elif name in announced and peer in announced:
            result[peer] = Route("dial" if later else "await")
        elif relay is not None and relay in addresses:
            result[peer] = Route("relay, first" if later else "relay, second")
        else:
            raise LinkError(
                f"{name} and {peer} can both only dial out and there is no relay between them",
                "give one of them an address in federation.addresses, or name a party with one in federation.relay",
            )
    return result
