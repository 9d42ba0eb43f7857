"""A closed sum without transcript and confirmation, to measure what these cost.

Secure against parties that follow the protocol and against no others; nothing but the benchmark uses it. Every hospital is
there: with closing masks their keys are given as soon as all summands have come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpc_fl.crypto.secrecy import Private
from mpc_fl.links.links import Links
from mpc_fl.sharing.closed_sum import ClosedSum, SummandMasks
from mpc_fl.sharing.opening import SecretDomain
from mpc_fl.sharing.sum_plan import SumPlan

_AT_A_TIME = 2
_NOTHING = "nothing"


@dataclass(frozen=True)
class UnboundSum:
    """How the sums of one benchmark are made: its hospitals, who opens them, and closing masks."""

    domain: SecretDomain
    hospitals: tuple[str, ...]
    opener: str
    closing: int

    @property
    def _links(self) -> Links:
        return self.domain.links

    def _plan(self, number: int) -> SumPlan:
        return SumPlan(self.hospitals, self.opener, ("unbound", number), self.closing, _NOTHING)

    def contribute(self, number: int, encoded: Private[torch.Tensor]) -> None:
        """At a hospital: mask, send when asked to, give the keys."""
        plan = self._plan(number)
        masks = SummandMasks(plan, self._links.name, encoded.inside_protocol().shape, self.domain.sum_seed)
        summand = masks.masked(encoded, in_place=True)
        self._links.send_object(self.opener, "unbound ready", {"keys": masks.commitments()})
        self._links.receive_object(self.opener, "unbound send")
        self._links.send_tensor(self.opener, "unbound summand", summand)
        self._links.receive_object(self.opener, "unbound fixed")
        self._links.send_tensor(self.opener, "unbound keys", masks.keys_for(self.hospitals, 2))

    def collect(self, number: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """At the opener: the sum, of `dtype` and `shape`."""
        links, closed = self._links, ClosedSum(self._plan(number), dtype, tuple(shape))
        for name in self.hospitals:
            closed.commitments.take(name, links.receive_object(name, "unbound ready").get("keys"))
        for at, name in enumerate(self.hospitals):
            for other in self.hospitals[at + 1 if at else 0 : at + _AT_A_TIME]:
                links.send_object(other, "unbound send", {})
            closed.take(name, links.receive_tensor(name, "unbound summand", dtype, shape))
        for name in self.hospitals:
            links.send_object(name, "unbound fixed", {})
        keys = {name: links.receive_tensor(name, "unbound keys", torch.uint8, None) for name in self.hospitals}
        return closed.unmask(self.hospitals, keys)
