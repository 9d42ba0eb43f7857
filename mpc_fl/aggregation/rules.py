"""What all parties of a run agree on about its sums: the rules of all, what is known of one, and the quorum.

`Rules` hold for every sum of a run, `AgreedSum` says which sum is meant, `Description` what the records of its opening
say. A `Check` may leave hospitals out before anything is opened; `norm_check.NormCheck` is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mpc_fl.audit.opening_record import Scalar
from mpc_fl.crypto.stream_cipher import Label
from mpc_fl.errors import QuorumError
from mpc_fl.sharing.closed_sum import ClosedSum, SummandMasks
from mpc_fl.sharing.opening import SecretDomain

# Why a hospital has no result of a round: it was left out of a sum, or a sum could not be opened.
Missed = Literal["left out", "void"]


class Check(Protocol):
    """A check of hidden summands before anything is opened, on shares of them."""

    def at_hospital(self, domain: SecretDomain, masks: SummandMasks, word: Mapping[str, Any]) -> None:
        """Take part, after the aggregator's word "check"."""

    def at_opener(self, domain: SecretDomain, closed: ClosedSum, say_check: Callable[..., None]) -> list[str]:
        """Start it with `say_check`, return the hospitals that passed."""


@dataclass(frozen=True)
class Rules:
    """How all sums of a run are made: opener, smallest V, closing masks, seconds a summand may take, check if any."""

    opener: str
    smallest: int
    closing: int
    seconds: float
    check: Check | None = None


@dataclass(frozen=True)
class Description:
    """What the records of an opening say of it, alike at all parties."""

    what: str
    why: str
    privacy: Mapping[str, Scalar] | None = None


@dataclass(frozen=True)
class AgreedSum:
    """One sum as all its parties know it before it begins: U in order, a label used once in the run, what records say."""

    hospitals: tuple[str, ...]
    label: tuple[Label, ...]
    about: Description


def require_quorum(rules: Rules, present: Sequence[str], hospitals: Sequence[str], why: str) -> None:
    """Raise `QuorumError` when fewer than the quorum are left."""
    if len(present) < rules.smallest:
        missing = [name for name in hospitals if name not in present]
        raise QuorumError(
            f"'{why}': {len(present)} hospitals are left and the quorum is {rules.smallest}"
            + (f" ({', '.join(missing)} missing)" if missing else ""),
            "nothing was opened; see the logs of the hospitals, then go on with --resume",
        )
