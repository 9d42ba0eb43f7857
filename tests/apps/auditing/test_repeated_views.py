"""Sums made again: masked words show nothing of the update, and faults put into the code that masks are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mpc_fl.apps.auditing.recorded_views import PValues
from mpc_fl.apps.auditing.repeated_views import add_tests_of_repetitions
from mpc_fl.apps.simulation import hospitals
from mpc_fl.crypto.memory_layout import own_copy
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.sharing.closed_sum import SummandMasks
from mpc_fl.sharing.sum_plan import SumPlan
from tests.support.auditing import same_seeds
from tests.support.viewed import viewed

OF_TESTS = {
    "masked words",
    "the mask alone",
    "masked words and the update",
    "masked words, with the round before",
    "masked words, with another hospital's",
    "masked words, with the other run",
}


LEVEL = 1e-6  # keys are fresh in every run: so seldom an honest one fails here, and what is wrong is far below
UNLOCKED = "masked words, less the masks whose keys are given"


@pytest.fixture(autouse=True)
def reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    same_seeds(monkeypatch)
    torch.set_num_threads(1)


def found(mechanism: str = "none", noise: float | None = None, **federation: Any) -> PValues:
    tests = PValues()
    add_tests_of_repetitions(viewed(mechanism, **federation), noise, tests, lambda *_: None)
    return tests


def rejected(tests: PValues) -> set[str]:
    return {made.of for made in tests.judged(LEVEL) if made.rejected}


@pytest.mark.parametrize(
    ("mechanism", "noise", "federation"),
    [("none", None, {}), ("none", None, {"quorum": 2}), ("local", 2.0, {}), ("distributed", 2.0, {})],
    ids=["exact", "closing masks", "local noise", "distributed noise"],
)
def test_honest_sums_show_nothing(mechanism: str, noise: float | None, federation: dict[str, Any]) -> None:
    tests = found(mechanism, noise, **federation)
    unlocked = {UNLOCKED} if "quorum" in federation else set()
    assert {made.of for made in tests.judged(LEVEL)} == OF_TESTS | unlocked
    assert rejected(tests) == set() and tests.count > 200


class Unmasked(SummandMasks):
    """A defect: the masks are left out. The sum is right."""

    def masked(self, encoded: Private[torch.Tensor], in_place: bool = False) -> torch.Tensor:
        return own_copy(encoded.inside_protocol())


class SameInEveryRound(SummandMasks):
    """A defect: masks do not depend on the sum, and what refuses to draw them twice is gone. The sum is right."""

    def __init__(self, plan: SumPlan, me: str, shape: Any, seed_with: Callable[[str], Seed]) -> None:
        once = replace(plan, label=("update",), transcript="")
        super().__init__(once, me, shape, lambda other: seed_with(other).again())


class WithoutZeroShares(SummandMasks):
    """A defect: the masks that cancel in the sum are left out; those that close it hide words only until their keys are given."""

    def masked(self, encoded: Private[torch.Tensor], in_place: bool = False) -> torch.Tensor:
        words = super().masked(encoded, in_place)
        for (kind, owner, partner), seed in self._seeds.items():
            if kind == "zero" and owner == self.me:
                stream, added = seed.again().stream("mask"), self.plan.adds(owner, partner)
                (stream.subtract_from if added else stream.add_to)(words)
        return words


def test_words_that_their_keys_lay_open_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hospitals, "SummandMasks", WithoutZeroShares)
    assert rejected(found(quorum=2)) == {UNLOCKED}


def test_masks_that_are_left_out_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hospitals, "SummandMasks", Unmasked)
    assert {"masked words", "the mask alone", "masked words and the update"} <= rejected(found())


def test_a_mask_that_is_used_in_two_rounds_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hospitals, "SummandMasks", SameInEveryRound)
    assert rejected(found()) == {"masked words, with the round before"}
