"""What one party's links are made with: where it stands among the others, how long it waits, whom it may lose. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpc_fl.links.routes import Route, routes


@dataclass(frozen=True)
class Reach:
    """Where this party listens, how it reaches each peer, and who relays.

    `listen` is host:port, None when the party can only dial out. `relays` names the parties that pass sealed chunks
    between parties that can only dial out.
    """

    listen: str | None
    peers: Mapping[str, Route]
    relays: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, parties: Sequence[str], addresses: dict[str, str], relays: Sequence[str] = ()) -> Reach:
        """The reach of party `name`, which listens where `addresses` says that the others find it.

        Raises `LinkError` when two parties without an address have no relay that has one.
        """
        return cls(addresses.get(name), routes(name, parties, addresses, relays), tuple(relays))


@dataclass(frozen=True)
class Timeouts:
    """Seconds. `connect`: until all peers are there; `receive`: for one message, and for a peer to take one.

    A party that ends stays at most `linger` for its last messages to leave and its peers to end, `linger_after_error`
    when it ends with an error. Peers that read end at once; whoever leaves one behind that is slow, takes its reason away.
    One that fails while links are made stays until `untold` seconds after it began for those that have not come yet.
    A peer that gives no sign of life for `silence` is lost (`pulse`), in the first `connect` seconds for `silence_at_first` more.
    What gets nowhere through one relay for `another_relay` goes through another one.
    """

    connect: float
    receive: float
    linger: float = 10.0
    linger_after_error: float = 10.0
    untold: float = 0.0
    silence: float = 20.0
    silence_at_first: float = 0.0
    another_relay: float = 10.0


@dataclass(frozen=True)
class Unread:
    """Bytes of memory for what has arrived from one peer and nobody has taken (`readers` says what happens then).

    An honest peer is ahead by what it sends without an answer: a summand, a model, two tensors of an exchange between all
    (44 MB each for ResNet18), and corrections of the dealer, which it counts itself (`runtime.dealer_ahead_bytes`, 256 MiB
    unless said otherwise). `pause` is twice what the dealer sends ahead, so that it never waits for want of room; `most` is
    above all of it together. For networks of hundreds of millions of parameters it grows: to four times the largest frame
    that this party has asked for. One frame alone is never too much, and beside what is unread one more may be on its way
    (`frames.MAX_PAYLOAD`). `patience`: seconds that somebody who waits may need to take what has arrived, on a machine with
    other things to do.
    """

    pause: int = 512 << 20
    most: int = 1 << 30
    patience: float = 10.0

    @classmethod
    def with_dealer_ahead(cls, ahead_bytes: int) -> Unread:
        """Room for a dealer that sends so many bytes ahead of need."""
        return cls(max(cls.pause, 2 * ahead_bytes), max(cls.most, 4 * ahead_bytes))


@dataclass(frozen=True)
class Tolerance:
    """Whose loss, once all have been connected, ends only the waits for them; they may come back. What may stay unread.

    `goes_on_without`: this party begins without those of them that are not there at the deadline. Those in `later` are not
    waited for at all.
    """

    peers: frozenset[str] = frozenset()
    goes_on_without: bool = False
    unread: Unread = Unread()
    later: frozenset[str] = frozenset()


NOBODY_LOST = Tolerance()
LONGEST_GREETING = 10.0  # seconds that a stream may stay without a greeting, at whoever listens
