"""Peer sums whose norms are checked, in memory and in virtual time: small ones, of updates that tests know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mpc_fl.aggregation.norm_check import NormCheck
from mpc_fl.aggregation.norm_limits import NormTest
from tests.support.peer_sums import PeerSums, hospitals_of

ELEMENTS, BUCKETS, BOUND = 1500, 256, 2.0**19


def update(number: int, times: float = 0.9) -> torch.Tensor:
    """An encoded update, int64, so many times as long as one may be."""
    normal = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(number)).double()
    return (normal / normal.norm() * BOUND * times).round().long()


def updates(count: int, long: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Of so many hospitals; those that are `long` have one that is ten times as long as one may be."""
    return {name: update(number, 10 if name in long else 0.9) for number, name in enumerate(hospitals_of(count))}


def checked_sums(
    directory: Path, monkeypatch: pytest.MonkeyPatch, count: int = 3, long: Sequence[str] = ()
) -> PeerSums:
    """Of the `updates` of so many hospitals."""
    sums = PeerSums(directory, monkeypatch, count, ELEMENTS)
    sums.check = NormCheck(NormTest(BOUND, 32, BUCKETS), ELEMENTS)
    sums.summands = updates(count, long)
    return sums


def expected_of(sums: PeerSums, names: Sequence[str]) -> torch.Tensor:
    """The sum of the updates of these."""
    return torch.stack([sums.summands[name] for name in names]).sum(0).to(sums.dtype)
