"""The only way out of the secret domain, and its record.

`open_to` reveals a secret-shared value to the named parties and nobody else. Every call appends one line to this
party's opening record before a share leaves: what, shape, to whom, why, who took part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mpc_fl.audit.opening_record import Opening, Record
from mpc_fl.audit.reveal_ledger import Scalar
from mpc_fl.crypto.ring import RingShare
from mpc_fl.crypto.secrecy import Shared
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import PeerLostError, SecrecyError
from mpc_fl.links.links import Links
from mpc_fl.sharing.closed_sum import ClosedSum, SummandMasks, require_admissible
from mpc_fl.sharing.crypten_parts import share_of
from mpc_fl.sharing.crypten_runtime import CrypTenRuntime


@dataclass(frozen=True)
class SecretDomain:
    """What protocols on shares need: the CrypTen runtime of this party and its record of openings."""

    runtime: CrypTenRuntime
    record: Record
    _sum_seeds: dict[tuple[str, str], Seed] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # CrypTen's own get_plain_text must not be an unrecorded way out.
        self.runtime.opener = self._open_for_crypten

    @property
    def links(self) -> Links:
        """The links of this party."""
        return self.runtime.links

    def sum_seed(self, name: str) -> Seed:
        """The seed for closed sums that only this party and `name` know; a new one after either of them came back."""
        links = self.runtime.links
        key = (name, links.key_fingerprint(name))
        if key not in self._sum_seeds:
            self._sum_seeds[key] = links.pairwise_seed(name, "closed sums")
        return self._sum_seeds[key]

    def _open_for_crypten(self, tensor: Any, dst: int | None, decode: bool) -> torch.Tensor | None:
        who = self.runtime.world if dst is None else [self.runtime.world[dst]]
        value: Shared[Any] = Shared("a CrypTen tensor", tensor)
        elements = _open_elements(self, value, list(who), "CrypTen get_plain_text")
        if elements is None or not decode or share_of(tensor)[1] == 0:
            return elements
        return (elements.double() / float(1 << share_of(tensor)[1])).float()


@dataclass(frozen=True, repr=False)
class FixedSum:
    """A closed sum over V, `admitted`, ready to be opened: this party's masks of it, or the opener's `ClosedSum`.

    V has at least `smallest` hospitals. `fraction_bits` are those of the summands.
    """

    part: SummandMasks | ClosedSum
    admitted: tuple[str, ...]
    smallest: int
    fraction_bits: int


def open_to(
    domain: SecretDomain,
    value: Shared[Any],
    who: list[str],
    why: str,
    privacy: Mapping[str, Scalar] | None = None,
    decode: bool = True,
) -> torch.Tensor | None:
    """Open a secret-shared value to the parties named in `who`; return it there (float64), `None` elsewhere.

    Each party sends its share to each party in `who`: one round, 8 bytes per element and link (4 over Z_2^32). The
    share is refreshed with a fresh zero-share first, so that what an opener receives from one party is uniform given the
    sum and shows nothing of how the value was computed. All parties of the world must call this in the same order.
    Of a closed sum, whose summands have been sent, only keys are left to send (`closed_sum`, step 3).
    `privacy` is what all may know of the privacy that the opening spends, for the record. Without `decode` the ring
    elements themselves are returned.

    Raises `PeerLostError` when a share does not arrive in time.
    """
    inside = value.inside_protocol()
    if isinstance(inside, FixedSum):
        elements = _open_fixed_sum(domain, value.label, inside, who, why, privacy)
        fraction_bits = inside.fraction_bits
    else:
        elements = _open_elements(domain, value, who, why, privacy)
        fraction_bits = _share_of(value)[1]
    if elements is None or not decode:
        return elements
    return elements.double() / float(1 << fraction_bits)


def _open_fixed_sum(
    domain: SecretDomain, what: str, fixed: FixedSum, who: list[str], why: str, privacy: Mapping[str, Scalar] | None
) -> torch.Tensor | None:
    """Step 3 of `closed_sum` at a hospital of V, steps 3 and 4 at the opener. A hospital that is lost is waited for once."""
    links, part, plan = domain.links, fixed.part, fixed.part.plan
    if who != [plan.opener]:
        raise SecrecyError(f"the sum '{plan.name}' can be opened to {plan.opener} alone")
    among, tag = (*fixed.admitted, plan.opener), f"keys {plan.name}"
    if isinstance(part, SummandMasks):
        keys = part.keys_for(fixed.admitted, fixed.smallest)
        domain.record.append(Opening(what, why, tuple(part.shape), tuple(who), among, privacy))
        links.send_tensor(plan.opener, tag, keys)
        return None
    require_admissible(plan, fixed.admitted, fixed.smallest)
    domain.record.append(Opening(what, why, tuple(part.shape), tuple(who), among, privacy))
    answers: dict[str, torch.Tensor] = {}
    for name in fixed.admitted:
        try:
            answers[name] = links.receive_tensor(name, tag, torch.uint8, None)
        except PeerLostError:
            if part.keys_missing(fixed.admitted, [*answers, *fixed.admitted[fixed.admitted.index(name) + 1 :]]):
                raise
    return part.unmask(fixed.admitted, answers)


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
    opening = Opening(value.label, why, tuple(share.shape), tuple(who), tuple(runtime.world), privacy)
    domain.record.append(opening)
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
