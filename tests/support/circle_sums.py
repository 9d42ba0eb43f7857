"""Sums masked in a circle over links in memory, of few hospitals: rules whose graph is small although they are fewer than 17."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpc_fl.aggregation.mask_graph import MaskBounds, mask_circle
from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Rules
from mpc_fl.aggregation.transcript import transcript_of
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.roles import AGGREGATOR, hospital_names
from mpc_fl.sharing.mask_circle import MaskCircle
from mpc_fl.sharing.opening import SecretDomain

HOSPITALS = tuple(hospital_names(9))
WORLD = [*HOSPITALS, AGGREGATOR]
SIZE = 4


@dataclass(frozen=True)
class NarrowRules(Rules):
    """Rules with a graph of masks of six neighbours: secure against one hospital that colludes among any three in a row."""

    def bounds(self, hospitals: int) -> MaskBounds | None:
        return MaskBounds(reach=3, most_colluding=1, closing=2)


@dataclass(frozen=True)
class Fingerprints:
    """What a transcript needs of links: whose keys this party holds."""

    of: dict[str, str]

    def key_fingerprint(self, name: str) -> str:
        return self.of[name]


NARROW = NarrowRules(AGGREGATOR, HOSPITALS, 5, 2, 60.0, colluders=1)
AGREED = AgreedSum(HOSPITALS, ("update", 1), Description("mean update", "round 1"), {"model": "that of all"})


def circle_of(links: Any, rules: Rules = NARROW, agreed: AgreedSum = AGREED) -> MaskCircle:
    """The circle of the sum's first attempt, as every party can compute it."""
    bounds = rules.bounds(len(agreed.hospitals))
    assert bounds is not None
    return mask_circle(agreed.hospitals, transcript_of(links, rules, agreed, agreed.hospitals, 0), bounds)


def value_of(name: str) -> torch.Tensor:
    """A hospital's summand: int32 (SIZE,)."""
    return torch.arange(SIZE, dtype=torch.int32) + 1000 * (int(name.split("-")[1]) + 1)


def domain_of(links: Any, directory: Path, signatory: dict[str, Signatory], world: list[str] = WORLD) -> SecretDomain:
    """What a party needs, with its record in `directory`."""
    record = OpeningRecord(directory / f"{links.name}.jsonl", links.name)
    return SecretDomain(links, world, record, signatory=signatory[links.name])


def one_circle_sum(
    domain: SecretDomain, rules: Rules = NARROW, agreed: AgreedSum = AGREED
) -> tuple[tuple[str, ...], list[int] | None]:
    """An honest party's part in the sum: V, and at the aggregator the sum."""
    links = domain.links
    if links.name == AGGREGATOR:
        starts = {name: links.key_fingerprint(name) for name in agreed.hospitals}
        admitted, total = collect(domain, rules, agreed, starts, torch.int32, (SIZE,))
        return admitted, total.tolist()
    return contribute(domain, rules, agreed, Private("update", value_of(links.name))), None


def total_of(names: Any) -> list[int]:
    """The sum of these hospitals' summands."""
    return torch.stack([value_of(name) for name in names]).sum(0).tolist()
