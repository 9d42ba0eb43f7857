"""Fixed point and headroom: exact sums, refusal instead of wrap."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.crypto.ring import FixedPoint, Headroom
from mpc_fl.errors import HeadroomError

FIXED = FixedPoint(24, 64.0)
VALUES = st.lists(st.floats(-64, 64, width=32), min_size=1, max_size=30)


@given(VALUES)
def test_decode_inverts_encode_within_half_a_unit(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    decoded = FIXED.decode(FIXED.encode(tensor, "x"))
    assert float((decoded - tensor).abs().max()) <= 0.5 / (1 << 24)


@given(VALUES, st.integers(1, 1 << 20), st.integers(2, 8))
def test_sum_of_encodings_is_the_integer_sum(values: list[float], weight: int, parties: int) -> None:
    encoded = FIXED.encode(torch.tensor(values, dtype=torch.float64), "x")
    total = torch.zeros_like(encoded)
    for _ in range(parties):
        total = total + encoded * weight
    exact = [parties * weight * round(value * (1 << 24)) for value in values]
    assert total.tolist() == exact


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_without_being_shown(bad: float) -> None:
    with pytest.raises(HeadroomError, match="NaN or infinite") as caught:
        FIXED.encode(torch.tensor([0.123456, bad]), "the update")
    assert "0.123" not in str(caught.value)


def test_a_coordinate_beyond_the_bound_is_refused() -> None:
    FIXED.encode(torch.tensor([64.0, -64.0]), "the update")
    with pytest.raises(HeadroomError, match="exceeds the headroom") as caught:
        FIXED.encode(torch.tensor([64.001]), "the update")
    assert "64.001" not in str(caught.value)


@given(st.integers(4, 40), st.floats(0.5, 1e6), st.integers(2, 64), st.integers(1, 1 << 24))
def test_headroom_is_exactly_the_condition_that_no_sum_wraps(
    bits: int, bound: float, parties: int, weight: int
) -> None:
    headroom = Headroom(FixedPoint(bits, bound), parties, weight)
    largest = parties * weight * (bound * 2**bits + 0.5)
    if abs(math.log2(largest) - 63) < 1e-9:
        return
    if largest < 2**63:
        headroom.require()
    else:
        with pytest.raises(HeadroomError, match="needs .* bits"):
            headroom.require()
