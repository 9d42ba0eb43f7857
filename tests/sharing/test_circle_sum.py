"""Closed sums masked in a circle: exact over any admissible set, closed to all else, one closing stream for each summand."""

from __future__ import annotations

import secrets
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ProtocolError, SecrecyError
from mpc_fl.sharing.closed_sum import ClosedSum, SummandMasks
from mpc_fl.sharing.mask_circle import MaskCircle
from mpc_fl.sharing.sum_plan import SumPlan

FALSE_ALARM = 1e-7
NAMES = tuple(f"hospital-{rank}" for rank in range(9))
ORDER = tuple(NAMES[place] for place in (4, 0, 7, 2, 8, 1, 6, 3, 5))


def parties(closing: int = 2, order: tuple[str, ...] = ORDER, size: int = 3) -> dict[str, SummandMasks]:
    """The masks of all hospitals of one sum, each pair with a seed of its own."""
    keys = {frozenset(pair): secrets.token_bytes(32) for pair in combinations(NAMES, 2)}
    plan = SumPlan(NAMES, "aggregator", ("test",), closing, "seen alike", MaskCircle(order, 3, 2))
    return {
        name: SummandMasks(plan, name, (size,), lambda other, name=name: Seed(keys[frozenset((name, other))]))  # type: ignore[misc]
        for name in NAMES
    }


def opened(masks: dict[str, SummandMasks], values: dict[str, torch.Tensor], admitted: list[str], lost: Any = ()) -> Any:
    """Everybody sends; V is `admitted`; those in `lost` give no keys."""
    closed = ClosedSum(masks[NAMES[0]].plan, next(iter(values.values())).dtype, (3,), keep=len(admitted) < len(masks))
    for name in masks:
        closed.commitments.take(name, masks[name].commitments())
    for name in admitted:
        closed.take(name, masks[name].masked(Private("x", values[name])))
    keys = {name: masks[name].keys_for(admitted, 2) for name in admitted if name not in lost}
    return closed.unmask(admitted, keys)


@given(
    st.sampled_from([torch.int32, torch.int64]), st.integers(0, 2), st.integers(0, 2**32 - 1), st.permutations(NAMES)
)
@settings(max_examples=40, deadline=None)
def test_the_sum_over_those_admitted_is_exact(dtype: torch.dtype, closing: int, seed: int, order: list[str]) -> None:
    masks, generator = parties(closing, tuple(order)), torch.Generator().manual_seed(seed)
    bits = 31 if dtype == torch.int32 else 63
    values = {
        name: torch.randint(-(2**bits), 2**bits - 1, (3,), dtype=torch.int64, generator=generator).to(dtype)
        for name in NAMES
    }
    circle = masks[NAMES[0]].plan.circle
    assert circle is not None
    wanted = [name for name in NAMES if name not in order[: 2 if closing else 0]]
    admitted = wanted if not circle.followed_by_too_few(wanted) else list(NAMES)
    total = opened(masks, {name: value.clone() for name, value in values.items()}, admitted)
    expected = (
        torch.stack([values[name] for name in admitted]).sum(0, dtype=torch.int64).to(dtype)
    )  # wraps like the ring
    assert total.dtype == dtype and torch.equal(total, expected)


def test_a_hospital_lost_after_it_sent_costs_nothing_when_all_are_in() -> None:
    for lost in NAMES:
        values = {name: torch.full((3,), rank + 1, dtype=torch.int32) for rank, name in enumerate(NAMES)}
        assert opened(parties(), values, list(NAMES), [lost]).tolist() == [45, 45, 45]


def test_before_the_keys_no_sum_of_neighbours_shows_anything() -> None:
    masks = parties(size=20_000)
    sent = [masks[name].masked(Private("x", torch.zeros(20_000, dtype=torch.int32))) for name in ORDER]
    for count in (1, 2, 3, 9):  # also that over all: closing masks are there
        total = torch.stack(sent[:count]).sum(0, dtype=torch.int32)
        assert _uniform(total) > FALSE_ALARM, count


def test_all_keys_but_one_of_a_closing_mask_open_nothing() -> None:
    """The one mask that closes a summand is known to nobody who lacks the key of one partner."""
    masks = parties(size=20_000)
    summand = masks[ORDER[0]].masked(Private("x", torch.zeros(20_000, dtype=torch.int32)))
    plan = masks[ORDER[0]].plan
    for (kind, owner, partner), seed in masks[ORDER[0]]._seeds.items():
        if kind == "zero":
            stream = Seed(seed.reveal_for_transport()).stream("mask")
            (stream.subtract_from if plan.adds(owner, partner) else stream.add_to)(summand)
    known = masks[ORDER[0]]._seeds["closing", ORDER[0], plan.partners(ORDER[0])[0]]
    assert _uniform(summand) > FALSE_ALARM
    Seed(known.reveal_for_transport()).stream("mask").subtract_from(summand)
    assert _uniform(summand) > FALSE_ALARM


def test_a_summand_is_masked_once() -> None:
    masks = parties()[NAMES[0]]
    masks.masked(Private("x", torch.zeros(3, dtype=torch.int32)))
    with pytest.raises(SecrecyError, match="used twice"):
        masks.masked(Private("x", torch.zeros(3, dtype=torch.int32)))


@pytest.mark.parametrize("what", ["another order", "another reach", "all with all"])
def test_a_hospital_with_a_graph_of_its_own_is_named(what: str) -> None:
    masks = parties()
    plan = masks[NAMES[0]].plan
    if what == "another order":
        circle: MaskCircle | None = MaskCircle(NAMES, 3, 2)
    else:
        circle = MaskCircle(ORDER, 2, 2) if what == "another reach" else None
    foreign = SumPlan(NAMES, "aggregator", ("test",), 2, "seen otherwise", circle)
    own = SummandMasks(foreign, NAMES[0], (3,), lambda _other: Seed(secrets.token_bytes(32)))
    closed = ClosedSum(plan, torch.int32, (3,))
    with pytest.raises(ProtocolError, match="hospital-0"):
        closed.commitments.take(NAMES[0], own.commitments())
        for name in NAMES[1:]:
            closed.commitments.take(name, masks[name].commitments())


def _uniform(words: torch.Tensor) -> float:
    digits = np.bincount((words.numpy().view(np.uint32) >> 24).astype(np.int64), minlength=256)
    return float(stats.chisquare(digits).pvalue)
