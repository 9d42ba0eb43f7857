"""The only way out of the secret domain, and its record.

`open_to` reveals a value to the named parties and nobody else: shares of it (`RingShare`), or a closed sum over the
hospitals that were admitted to it (`FixedSum`). Every call appends one line to this party's opening record before a
share leaves: what, shape, to whom, why, who took part. CrypTen is not needed here; `crypten_runtime` brings its tensors.

Protocol, for shares among the parties of a world:
  1. every party appends the line to its record
  2. every party refreshes its share with a zero-share (`zero_shares`) and sends it to each party that may learn the value
  3. these add up what they received

Who learns what. The named parties learn the value; the others, and everybody else, nothing. What an opener receives from
one party is uniform given the sum, so it shows nothing of how the value was computed. A closed sum follows `closed_sum`,
steps 3 and 4: with closing masks its summands were sent before and keys are left to send, without them the summands are.

Rounds and bytes. One round, 8 bytes per element (4 over Z_2^32) from every party to each one named. Of a closed sum: one
message of 32 bytes per key from each hospital to the opener.

Security. Semi-honest parties: one that sends another share than its own changes the value that is opened. The
argument for the masks is that of `zero_shares` and `closed_sum`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mpc_fl.audit.opening_record import Opening, Record, Scalar
from mpc_fl.crypto.memory_layout import own_copy
from mpc_fl.crypto.ring import RingShare
from mpc_fl.crypto.secrecy import Shared
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import PeerLostError, SecrecyError, SumLostError
from mpc_fl.links.links import Links
from mpc_fl.sharing.closed_sum import ClosedSum, MaskedTotal, SummandMasks
from mpc_fl.sharing.sum_plan import SumPlan, require_admissible
from mpc_fl.sharing.zero_shares import ZeroShares


class SecretDomain:
    """What protocols on shares need at one party: links, the parties in rank order, masks, and the record of openings.

    `world` lists the parties among which values are shared, this one with them. A protocol that draws zero-shares of its
    own beside the openings gives its `zero_shares`, so that both count alike; else they are made here, once per links.
    `signatory` signs and checks what hospitals confirm of closed sums; other openings do without. `confirmed` are, by transcript,
    the openings among peers that this party has signed that it takes part in, whether they came about or not.
    """

    def __init__(
        self,
        links: Links,
        world: Sequence[str],
        record: Record,
        zero_shares: ZeroShares | None = None,
        signatory: Signatory | None = None,
    ) -> None:
        self.links, self.world, self.record = links, list(world), record
        self.signatory = signatory
        self.zero_shares = ZeroShares(links, world) if zero_shares is None else zero_shares
        self._sum_seeds: dict[tuple[str, str], Seed] = {}
        self._transcripts: set[str] = set()
        self.confirmed: dict[str, Opening] = {}

    def take_up(self, transcript: str) -> None:
        """Note that a summand is about to be masked under this transcript. Raises `SecrecyError` for one that was before."""
        if transcript in self._transcripts:
            raise SecrecyError("a sum was asked for twice, with everything the same: its masks would repeat")
        self._transcripts.add(transcript)

    def sum_seed(self, name: str) -> Seed:
        """The seed for closed sums that only this party and `name` know; a new one after either of them came back."""
        key = (name, self.links.key_fingerprint(name))
        if key not in self._sum_seeds:
            self._sum_seeds[key] = self.links.pairwise_seed(name, "closed sums")
        return self._sum_seeds[key]


def _nothing_more() -> None:
    pass


@dataclass(frozen=True, repr=False)
class FixedSum:
    """A closed sum over V, `admitted`, ready to be opened: this party's masks of it, or the opener's `ClosedSum`; where each
    of V opens it to itself, the `MaskedTotal` of this one.

    V has at least `smallest` hospitals. `fraction_bits` are those of the summands. `recorded` is called when the opening is
    in this party's record and before it sends or awaits a key: the opener then tells what was confirmed, and a hospital
    whose summand has no closing masks sends it.
    """

    part: SummandMasks | ClosedSum | MaskedTotal
    admitted: tuple[str, ...]
    smallest: int
    fraction_bits: int
    recorded: Callable[[], None] = _nothing_more


def open_to(
    domain: SecretDomain,
    value: Shared[RingShare] | Shared[FixedSum],
    who: list[str],
    why: str,
    privacy: Mapping[str, Scalar] | None = None,
    decode: bool = True,
) -> torch.Tensor | None:
    """Open a secret-shared value to the parties named in `who`; return it there (float64), `None` elsewhere.

    The protocol of this module: `who` learn the value, nobody anything else. All parties of the world call this in the
    same order. `privacy` is what all may know of the privacy that the opening spends, for the record. The shape is that
    of the shares; without `decode` the ring elements themselves are returned, of the shares' dtype.

    Raises `PeerLostError` when a share does not arrive in time; `SecrecyError` when a closed sum is opened to others than
    its opener, or twice; `ProtocolError` when it is too small.
    """
    inside = value.inside_protocol()
    if isinstance(inside, FixedSum):
        elements = _open_fixed_sum(domain, value.label, inside, who, why, privacy)
    else:
        elements = _open_share(domain, value.label, inside, who, why, privacy)
    if elements is None or not decode:
        return elements
    return elements.double() / float(1 << inside.fraction_bits)


def _open_fixed_sum(
    domain: SecretDomain, what: str, fixed: FixedSum, who: list[str], why: str, privacy: Mapping[str, Scalar] | None
) -> torch.Tensor | None:
    """Step 3 of `closed_sum` at a hospital of V, steps 3 and 4 at the opener. A hospital that is lost is waited for once."""
    links, part, plan = domain.links, fixed.part, fixed.part.plan
    if who != (list(fixed.admitted) if isinstance(part, MaskedTotal) else [plan.opener]):
        alone = "those in it, and to all of them" if isinstance(part, MaskedTotal) else f"{plan.opener} alone"
        raise SecrecyError(f"the sum '{plan.name}' can be opened to {alone}")
    among = tuple(dict.fromkeys((*fixed.admitted, *who)))
    opening = Opening(what, why, tuple(part.shape), tuple(who), among, privacy, plan.transcript)
    if isinstance(part, MaskedTotal):
        return _open_among_peers(domain, part, fixed, opening)
    if isinstance(part, SummandMasks):
        keys = part.keys_for(fixed.admitted, fixed.smallest)
        domain.record.append(opening)
        fixed.recorded()
        if plan.closing:
            links.send_tensor(plan.opener, f"keys {plan.name}", keys)
        return None
    require_admissible(plan, fixed.admitted, fixed.smallest)
    domain.record.append(opening)
    fixed.recorded()
    return part.unmask(fixed.admitted, _keys_of(domain, plan, fixed.admitted if plan.closing else (), {}))


def _open_among_peers(domain: SecretDomain, part: MaskedTotal, fixed: FixedSum, opening: Opening) -> torch.Tensor:
    """Steps 3 and 4 of `closed_sum` where each of V gives its keys to all of V. Who is lost needs none."""
    links, plan, admitted = domain.links, part.plan, fixed.admitted
    keys = part.masks.keys_for(admitted, fixed.smallest)
    domain.record.append(opening)
    fixed.recorded()
    for name in admitted:
        if name != links.name:
            with contextlib.suppress(PeerLostError):
                links.send_tensor(name, f"keys {plan.name}", keys)
    return part.unmask(admitted, _keys_of(domain, plan, admitted, {links.name: keys}))


def _keys_of(
    domain: SecretDomain, plan: SumPlan, admitted: Sequence[str], own: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The keys that those of V send, beside this party's own. One that is lost, or gave up before it could open the sum, is missed
    only where its keys are needed."""
    links, answers = domain.links, dict(own)
    deadline = links.deadline()
    awaited = [name for name in admitted if name not in own]
    for at, name in enumerate(awaited):
        try:
            answers[name] = links.receive_tensor(name, f"keys {plan.name}", torch.uint8, None, deadline)
        except (PeerLostError, SumLostError):
            if plan.keys_missing(admitted, [*answers, *awaited[at + 1 :]]):
                raise
    return answers


def _open_share(
    domain: SecretDomain, what: str, share: RingShare, who: list[str], why: str, privacy: Mapping[str, Scalar] | None
) -> torch.Tensor | None:
    """Steps 1 to 3 of shares. The share of the caller stays as it is, and may be a view; nothing returned is part of it."""
    links, elements = domain.links, share.elements
    domain.record.append(Opening(what, why, tuple(elements.shape), tuple(who), tuple(domain.world), privacy))
    refreshed = own_copy(elements)
    domain.zero_shares.add_zero_share(refreshed, exclusive_or=share.exclusive_or)
    for name in who:
        if name != links.name:
            links.send_tensor(name, "opening", refreshed)
    if links.name not in who:
        return None
    total = refreshed
    for name in domain.world:
        if name != links.name:
            received = links.receive_tensor(name, "opening", elements.dtype, elements.shape)
            if share.exclusive_or:
                total ^= received
            else:
                total += received
    return total
