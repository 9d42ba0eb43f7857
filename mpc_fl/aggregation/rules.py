"""What all parties of a run agree on about its sums: the rules of all, what is known of one, and the quorum.

`Rules` hold for every sum of a run, `AgreedSum` says which sum is meant, `Description` what the records of its opening
say. A `Check` may leave hospitals out before anything is opened; `norm_check.NormCheck` is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from mpc_fl.aggregation.mask_graph import MaskBounds, mask_bounds
from mpc_fl.aggregation.peer_summands import PeerSummands
from mpc_fl.audit.opening_record import Scalar
from mpc_fl.crypto.stream_cipher import Label
from mpc_fl.errors import ProtocolError, QuorumError, SumLostError
from mpc_fl.links.links import Links
from mpc_fl.sharing.closed_sum import ClosedSum, SummandMasks
from mpc_fl.sharing.opening import SecretDomain
from mpc_fl.sharing.sum_plan import SumPlan

# Why a hospital has no result of a round: it was left out of a sum, or a sum could not be opened.
Missed = Literal["left out", "void"]


def missed_by(name: str, error: SumLostError) -> Missed:
    """Why a hospital has no result of a sum that was lost: whoever it was lost with is asked for no other by itself."""
    return "left out" if error.lost == name else "void"


class PeerCheck(Protocol):
    """A check among peers, of the summands of one sum, at one of its hospitals."""

    steps: int

    @property
    def committed(self) -> object:
        """What this hospital says for the check with the hashes of its slices, of JSON's types."""

    def require_committed(self, hospital: str, said: object) -> None:
        """Raise `ProtocolError` naming the hospital where what it said for the check cannot be."""

    def passed(self, summands: PeerSummands) -> tuple[str, ...]:
        """Take part, within so many `steps` of the deadlines; the hospitals that passed, in the order of U, alike at all."""


class Check(Protocol):
    """A check of hidden summands before anything is opened, on shares of them, in two arrangements."""

    def among_peers(self, domain: SecretDomain, links: Links, masks: SummandMasks) -> PeerCheck:
        """The check of one sum among peers, over `links` of this sum alone."""

    def at_hospital(self, domain: SecretDomain, masks: SummandMasks, word: Mapping[str, Any]) -> None:
        """Take part, after the aggregator's word "check"."""

    def at_opener(self, domain: SecretDomain, closed: ClosedSum, say_check: Callable[..., None]) -> list[str]:
        """Start it with `say_check`, return the hospitals that passed."""

    def require_total(self, total: torch.Tensor, admitted: Sequence[str], why: str) -> None:
        """At who opens: raise `ProtocolError` for an opened sum that summands which passed cannot make."""


@dataclass(frozen=True)
class Rules:
    """How all sums of a run are made: opener, the hospitals there are, in order, smallest U and V, closing masks, seconds
    until hospitals must be ready with a summand, check if any. `quorum` is that of the run where a sum needs more than it.
    `colluders`: the most hospitals that may collude where masks form a graph (`mask_graph`); None: all share masks with all.
    """

    opener: str
    hospitals: tuple[str, ...]
    smallest: int
    closing: int
    seconds: float
    check: Check | None = None
    quorum: int | None = None
    colluders: int | None = None

    def bounds(self, hospitals: int) -> MaskBounds | None:
        """The graph of masks of a sum over so many hospitals; None where all share masks with all, as a check needs it."""
        if self.colluders is None or self.check is not None:
            return None
        return mask_bounds(hospitals, self.colluders, self.smallest)


@dataclass(frozen=True)
class Description:
    """What the records of an opening say of it, alike at all parties."""

    what: str
    why: str
    privacy: Mapping[str, Scalar] | None = None


@dataclass(frozen=True)
class AgreedSum:
    """One sum as all its parties know it before it begins: U in order, a label used once in the run, what records say.

    `seen` is what this party itself holds of everything that shapes the summands (`transcript`): all must hold the same.
    `only`: the one V that this party may open it over, because the same values were begun to be opened over it before.
    """

    hospitals: tuple[str, ...]
    label: tuple[Label, ...]
    about: Description
    seen: Mapping[str, Scalar] = field(default_factory=dict)
    only: tuple[str, ...] | None = None


def require_hospitals(rules: Rules, hospitals: Sequence[str], me: str) -> None:
    """At a hospital: raise `ProtocolError` unless U may be summed over, before anything is masked.

    It must be a part of the hospitals there are, in their order, hold this one, and have at least two and the quorum: alone
    in a sum, or with parties that are no hospitals, a hospital would have no mask that anybody else does not know.
    """
    least = max(2, rules.smallest)
    if tuple(name for name in rules.hospitals if name in hospitals) != tuple(hospitals) or me not in hospitals:
        what = f"over parties that are not, or not only, the hospitals of this run with {me}"
    elif len(hospitals) < least:
        what = f"over {len(hospitals)} of the hospitals, fewer than {least}"
    else:
        return
    raise ProtocolError(
        f"{rules.opener} asked {me} for a sum {what}",
        f"{rules.opener} does not follow the protocol; nothing was sent to it, do not go on with it",
    )


def require_quorum(rules: Rules, present: Sequence[str], hospitals: Sequence[str], why: str) -> None:
    """Raise `QuorumError` when fewer than the quorum are left of `hospitals`, or fewer than this sum needs."""
    if len(present) < rules.smallest:
        missing = [name for name in hospitals if name not in present]
        needed = f"the quorum is {rules.smallest}"
        if rules.quorum is not None and rules.quorum < rules.smallest:
            needed = f"this sum is opened over all {rules.smallest} or not at all (the quorum is {rules.quorum})"
        raise QuorumError(
            f"'{why}': {len(present)} hospitals are left and {needed}"
            + (f"; {', '.join(missing)} missing" if missing else ""),
            "nothing was opened; see the logs of the hospitals, then go on with --resume",
        )


def require_followed(plan: SumPlan, present: Sequence[str], why: str) -> None:
    """Raise `QuorumError` when somebody who is left in a circle has too few left of those that share its masks."""
    if plan.circle is not None and (bared := plan.circle.bared(set(present))):
        raise QuorumError(
            f"'{why}': {bared}",
            "nothing was opened; see the logs of the hospitals that are missing, then go on with --resume",
        )


def require_only(agreed: AgreedSum, admitted: Sequence[str]) -> None:
    """Raise `ProtocolError` for a V that is not the only one over which this sum may be opened."""
    if agreed.only is not None and tuple(admitted) != agreed.only:
        raise ProtocolError(
            f"'{agreed.about.why}' was begun over {', '.join(agreed.only)}; over others the difference would be a hospital's own",
            "start again when they are all there, or begin a new run",
        )
