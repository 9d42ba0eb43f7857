"""Who dials whom: the routes between parties of which some can only dial out. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mpc_fl.errors import LinkError

How = Literal["dial", "await", "relay, first", "relay, second"]


@dataclass(frozen=True)
class Route:
    """How this party and one peer reach each other: it dials `address`, awaits the peer, or both use one of `relays`.

    Of two that use relays the one that is `first` greets. `relays` are in the order in which they are tried. `only_dials`: the peer
    is awaited because nobody can dial it.
    """

    how: How
    address: str = ""
    relays: tuple[str, ...] = ()
    only_dials: bool = False

    @property
    def relayed(self) -> bool:
        """Whether what goes to the peer goes through a relay."""
        return self.how.startswith("relay")


def relayed_route(name: str, peer: str, relays: Sequence[str]) -> Route:
    """The route of `name` to a peer of which neither can be dialled. Pairs begin with different relays, to share out the load."""
    begin = zlib.crc32(">".join(sorted((name, peer))).encode()) % len(relays)
    ordered = (*relays[begin:], *relays[:begin])
    return Route("relay, first" if name > peer else "relay, second", relays=ordered)


def routes(
    name: str,
    parties: Sequence[str],
    addresses: Mapping[str, str],
    relays: Sequence[str] = (),
    announced: Collection[str] = (),
) -> dict[str, Route]:
    """The routes of party `name` to all others; a party without an address can only dial out.

    Those in `announced` may have one that is not known yet: where it would be dialled the address of a route is empty until it
    is. Of `relays` those count that have an address.

    All parties compute this from the same list, so the two ends of a pair always agree. Raises `LinkError` when two
    parties without address have no relay that has one.
    """
    result: dict[str, Route] = {}
    usable = [relay for relay in relays if relay in addresses]
    for peer in parties:
        if peer == name:
            continue
        later = parties.index(name) > parties.index(peer)
        if peer in addresses and (name not in addresses or later):
            result[peer] = Route("dial", addresses[peer])
        elif name in addresses:
            result[peer] = Route("await", only_dials=peer not in addresses and peer not in announced)
        elif name in announced or peer in announced:
            dials = peer in announced and (later or name not in announced)
            result[peer] = Route("dial") if dials else Route("await", only_dials=peer not in announced)
        elif usable:
            result[peer] = relayed_route(name, peer, usable)
        else:
            raise LinkError(
                f"{name} and {peer} can both only dial out and there is no relay between them",
                "give one of them an address in federation.addresses, or name a party with one in federation.relay",
            )
    return result
