"""One sum whose norms are checked, at one party: what tests of the check run among processes or threads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from mpc_fl.aggregation.norm_check import NormCheck
from mpc_fl.aggregation.norm_limits import NormTest
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.crypto.secrecy import Private
from mpc_fl.sharing.closed_sum import ClosedSum, SummandMasks
from mpc_fl.sharing.opening import SecretDomain
from mpc_fl.sharing.sum_plan import SumPlan

AGGREGATOR = "aggregator"
PARAMETERS, BUCKETS = 20_000, 1024
BLOCK = BUCKETS // 2
BOUND = 2.0**19


def hospitals_of(count: int) -> list[str]:
    return [f"hospital-{rank}" for rank in range(count)]


def update(kind: str, bound: float, number: int) -> torch.Tensor:
    """An encoded update, int64; a hospital's secret that tests know."""
    normal = torch.randn(PARAMETERS, generator=torch.Generator().manual_seed(number)).double()
    if kind in ("honest", "long"):
        return (normal / normal.norm() * bound * (1 if kind == "honest" else 10)).round().long()
    x = torch.zeros(PARAMETERS, dtype=torch.int64)
    if kind == "half of the ring":  # would vanish if signs were all the hash had
        x[: 2 * BLOCK] = -(2**31)
    elif kind in ("squares wrap", "squares vanish"):  # in Z_2^64 the squares of four buckets, of one, add up to 0
        x[:4] = 2**31
        x[0] = 2**32 if kind == "squares vanish" else 2**31
    return x


def domain_of(links: Any, directory: str, count: int) -> SecretDomain:
    record = OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name)
    return SecretDomain(links, [*hospitals_of(count), AGGREGATOR], record)


def checked_sum(
    domain: SecretDomain, name: str, test: NormTest, x: torch.Tensor | None, opener: type[NormCheck] = NormCheck
) -> list[str] | None:
    """Summands, then their check: those that passed at the aggregator, whose `x` is `None`; a hospital returns `None`."""
    links, hospitals = domain.links, domain.world[:-1]
    plan = SumPlan(tuple(hospitals), AGGREGATOR, ("sum", name), 1, "seen alike", apart=True)
    if x is not None:
        masks = SummandMasks(plan, links.name, (PARAMETERS,), domain.sum_seed)
        links.send_tensor(AGGREGATOR, "summand", masks.masked(Private("update", x.to(test.dtype))))
        NormCheck(test, PARAMETERS).at_hospital(domain, masks, links.receive_object(AGGREGATOR, "word"))
        return None
    closed = ClosedSum(plan, test.dtype, (PARAMETERS,), keep=True)
    for hospital in hospitals:
        closed.take(hospital, links.receive_tensor(hospital, "summand", test.dtype, (PARAMETERS,)))

    def say(**values: Any) -> None:
        for hospital in hospitals:
            links.send_object(hospital, "word", values)

    return opener(test, PARAMETERS).at_opener(domain, closed, say)


class Said(logging.Handler):
    """What a party's log says of checks."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("mpc_fl.aggregation.norm_check").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
