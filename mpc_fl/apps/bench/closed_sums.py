"""A party's part in rounds of the closed sum with an aggregator, noise off: what benchmarks of sums measure, or measure against.

Encode, mask, send; fix who is in it, confirm, send keys, unmask, decode (`quorum_sum`); then every hospital gets the mean, and
takes its digest, which the next sum is bound to.
"""

from __future__ import annotations

import time

import torch

from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Rules
from mpc_fl.apps.bench.timed_rounds import WAIT, Task, update_of
from mpc_fl.apps.bench.unbound_sum import UnboundSum
from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.crypto.ring import FixedPoint, MeanHeadroom
from mpc_fl.crypto.secrecy import Private
from mpc_fl.roles import AGGREGATOR
from mpc_fl.sharing.opening import SecretDomain

ABOUT = Description("sum of updates", "benchmark")


class ClosedSums:
    """One party's part. `update` is float32 (P,), of no use at the aggregator."""

    def __init__(self, domain: SecretDomain, task: Task, update: torch.Tensor) -> None:
        links, self.members = domain.links, tuple(task.hospitals)
        self.domain, self.update = domain, update
        self.shape = (task.size.parameters,)
        self.headroom, self.weight = MeanHeadroom(FixedPoint(24, 64.0), len(self.members)), 1 / len(self.members)
        quorum, closing = (2, 2) if task.left_out else (len(self.members), 0)
        self.rules = Rules(AGGREGATOR, self.members, quorum, closing, WAIT)
        self.starts = {name: links.key_fingerprint(name) for name in self.members}
        self.unbound = UnboundSum(self.domain, self.members, AGGREGATOR, closing)
        self.digest = ""

    def encoded(self) -> Private[torch.Tensor]:
        """The weighted update as ring elements (P,), in memory of their own."""
        return Private("update", self.headroom.encode(self.update, self.weight, "update"))

    def once(self, repeat: int) -> tuple[torch.Tensor, float]:
        """A round: the sum and the moment that it was opened, at the aggregator; the mean and 0 at a hospital."""
        agreed = AgreedSum(self.members, ("round", repeat), ABOUT, {"parameters": self.digest})
        if self.domain.links.name != AGGREGATOR:
            contribute(self.domain, self.rules, agreed, self.encoded())
            mean = self._mean()
            self.digest = tensor_digest(mean)
            return mean, 0.0
        _, total = collect(self.domain, self.rules, agreed, self.starts, self.headroom.dtype, self.shape)
        mean, moment = self._reply(total)
        self.digest = tensor_digest(mean)
        return total, moment

    def once_unbound(self, repeat: int) -> tuple[torch.Tensor, float]:
        """The same without transcript and confirmation."""
        if self.domain.links.name != AGGREGATOR:
            self.unbound.contribute(repeat, self.encoded())
            return self._mean(), 0.0
        total = self.unbound.collect(repeat, self.headroom.dtype, self.shape)
        return total, self._reply(total)[1]

    def _reply(self, total: torch.Tensor) -> tuple[torch.Tensor, float]:
        mean = self.headroom.decode(total, 1.0, torch.float32)
        moment = time.perf_counter()
        for name in self.members:
            self.domain.links.send_tensor(name, "mean", mean)
        return mean, moment

    def _mean(self) -> torch.Tensor:
        return self.domain.links.receive_tensor(AGGREGATOR, "mean", torch.float32, self.shape)

    def is_exact(self, total: torch.Tensor) -> bool:
        """Whether `total` is the sum of the updates that all know."""
        updates = (update_of(rank, self.shape[0]) for rank in range(len(self.members)))
        plain = sum(self.headroom.encode(update, self.weight, "update").long() for update in updates)
        return bool((total.long() == plain).all())
