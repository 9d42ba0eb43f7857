"""The only way out of the secret domain, and its record.

`open_to` reveals a secret-shared value to the named parties and nobody else. Every call appends one line to this
party's opening record before a share leaves: what, shape, to whom, why, who took part.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mpc_fl.crypten_runtime import CrypTenRuntime, share_of
from mpc_fl.reveal_ledger import Scalar
from mpc_fl.ring import RingShare
from mpc_fl.secrecy import Shared


class Record(Protocol):
    """What `open_to` tells before a share leaves: an `OpeningRecord`, or a `RevealLedger` that all parties sign."""

    def append(
        self,
        what: str,
        why: str,
        shape: Sequence[int],
        to: Sequence[str],
        among: Sequence[str],
        privacy: Mapping[str, Scalar] | None = None,
    ) -> object:
        """Write one record, to the disk."""


@dataclass(frozen=True)
class Opening:
    """One opening, as every party that takes part records it."""

    number: int
    time: float
    party: str
    what: str
    why: str
    shape: list[int]
    to: list[str]
    among: list[str]
    privacy: dict[str, Scalar] | None = None


class OpeningRecord:
    """A record without signatures, for a computation whose parties keep no reveal ledger together.

    Append-only JSON lines of all openings this party took part in; each line is flushed before shares are sent.
    """

    def __init__(self, path: Path, party: str) -> None:
        self._path = path
        self._party = party
        self._count = 0
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(
        self,
        what: str,
        why: str,
        shape: Sequence[int],
        to: Sequence[str],
        among: Sequence[str],
        privacy: Mapping[str, Scalar] | None = None,
    ) -> Opening:
        """Write one record and return it."""
        self._count += 1
        spent = None if privacy is None else dict(privacy)
        moment = round(time.time(), 3)
        opening = Opening(self._count, moment, self._party, what, why, list(shape), list(to), list(among), spent)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(opening)) + "\n")
            file.flush()
        return opening


@dataclass(frozen=True)
class SecretDomain:
    """What protocols on shares need: the CrypTen runtime of this party and its record of openings."""

    runtime: CrypTenRuntime
    record: Record

    def __post_init__(self) -> None:
        # CrypTen's own get_plain_text must not be an unrecorded way out.
        self.runtime.opener = self._open_for_crypten

    def _open_for_crypten(self, tensor: Any, dst: int | None, decode: bool) -> torch.Tensor | None:
        who = self.runtime.world if dst is None else [self.runtime.world[dst]]
        value: Shared[Any] = Shared("a CrypTen tensor", tensor)
        elements = _open_elements(self, value, list(who), "CrypTen get_plain_text")
        if elements is None or not decode or share_of(tensor)[1] == 0:
            return elements
        return (elements.double() / float(1 << share_of(tensor)[1])).float()


def open_to(
    domain: SecretDomain,
    value: Shared[Any],
    who: list[str],
    why: str,
    privacy: Mapping[str, Scalar] | None = None,
) -> torch.Tensor | None:
    """Open a secret-shared value to the parties named in `who`; return it there (float64), `None` elsewhere.

    Each party sends its share to each party in `who`: one round, 8 bytes per element and link (4 over Z_2^32). The
    share is refreshed with a fresh zero-share first, so that what an opener receives from one party is uniform given the
    sum and shows nothing of how the value was computed. All parties of the world must call this in the same order.
    `privacy` is what all may know of the privacy that the opening spends, for the record.

    Raises `PeerLostError` when a share does not arrive in time.
    """
    elements = _open_elements(domain, value, who, why, privacy)
    if elements is None:
        return None
    return elements.double() / float(1 << _share_of(value)[1])


def _share_of(value: Shared[Any]) -> tuple[torch.Tensor, int, bool]:
    """This party's share, its fraction bits, and whether shares combine by exclusive or."""
    inside = value.inside_protocol()
    return (inside.elements, inside.fraction_bits, False) if isinstance(inside, RingShare) else share_of(inside)


def _open_elements(
    domain: SecretDomain,
    value: Shared[Any],
    who: list[str],
    why: str,
    privacy: Mapping[str, Scalar] | None = None,
) -> torch.Tensor | None:
    runtime, links = domain.runtime, domain.runtime.links
    share, _, exclusive_or = _share_of(value)
    domain.record.append(value.label, why, list(share.shape), list(who), list(runtime.world), privacy)
    refreshed = share.clone()
    runtime.add_zero_share(refreshed, exclusive_or=exclusive_or)
    for name in who:
        if name != links.name:
            links.send_tensor(name, "opening", refreshed)
    if links.name not in who:
        return None
    total = refreshed
    for name in runtime.world:
        if name != links.name:
            received = links.receive_tensor(name, "opening", share.dtype, share.shape)
            if exclusive_or:
                total ^= received
            else:
                total += received
    return total
