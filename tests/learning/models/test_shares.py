"""Intervals and tests of shares: against scipy, and what must hold of them whatever the counts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mpc_fl.learning.models.shares import (
    LIKELY,
    area_interval,
    difference_interval,
    error_by_chance,
    fisher_exact,
    holm,
    is_lost,
    noised_difference,
    noised_interval,
    wilson_interval,
)

COUNT = st.integers(1, 400)


@given(st.data(), COUNT)
def test_wilsons_interval_is_scipys_holds_the_share_and_narrows(data: st.DataObject, of: int) -> None:
    hits = data.draw(st.integers(0, of))
    low, high = wilson_interval(hits / of, of)
    assert 0 <= low <= hits / of + 1e-12 and hits / of - 1e-12 <= high <= 1
    expected = stats.binomtest(hits, of).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-4)
    more_low, more_high = wilson_interval(hits / of, 10 * of)
    assert more_high - more_low < high - low


@given(st.data(), COUNT, st.floats(0, 30), st.integers(1, 3))
def test_noise_widens_an_interval_and_more_noise_more(
    data: st.DataObject, of: int, deviation: float, others: int
) -> None:
    share = data.draw(st.integers(0, of)) / of
    low, high = noised_interval(share, of, deviation, (1, others))
    assert 0 <= low <= share <= high <= 1
    wider_low, wider_high = noised_interval(share, of, deviation + 1, (1, others))
    assert wider_low <= low and high <= wider_high


@given(st.data(), COUNT, COUNT)
def test_an_interval_of_a_difference_holds_it_and_is_the_negative_of_the_reverse(
    data: st.DataObject, first: int, second: int
) -> None:
    shares = [data.draw(st.integers(0, of)) / of for of in (first, second)]
    spans = [(share, *wilson_interval(share, of)) for share, of in zip(shares, (first, second), strict=True)]
    low, high = difference_interval(spans[0], spans[1])
    assert -1 <= low <= shares[0] - shares[1] + 1e-12 and shares[0] - shares[1] - 1e-12 <= high <= 1
    assert difference_interval(spans[1], spans[0]) == pytest.approx((-high, -low))


def test_an_interval_of_a_difference_is_newcombes() -> None:
    """Newcombe 1998, table II, example (a): 56/70 - 48/80, method 10."""
    first, second = (56 / 70, *wilson_interval(56 / 70, 70)), (48 / 80, *wilson_interval(48 / 80, 80))
    assert difference_interval(first, second) == pytest.approx((0.0524, 0.3339), abs=1e-4)


@given(st.data(), COUNT, COUNT)
def test_the_exact_test_is_scipys(data: st.DataObject, first: int, second: int) -> None:
    hits, others = data.draw(st.integers(0, first)), data.draw(st.integers(0, second))
    expected = stats.fisher_exact([[hits, first - hits], [others, second - others]])[1]
    assert fisher_exact((hits, first), (others, second)) == pytest.approx(expected, abs=1e-7)


def test_the_exact_test_of_many_is_one_and_not_slow() -> None:
    assert fisher_exact((90_000, 100_000), (90_000, 100_000)) == pytest.approx(1.0, abs=1e-6)
    assert fisher_exact((90_000, 100_000), (91_000, 100_000)) < 1e-10


def test_without_noise_the_normal_test_is_that_of_two_shares_and_noise_makes_it_unsure() -> None:
    first, second = (80.0, 100.0, (1, 2)), (240.0, 400.0, (2, 4))
    common = 320 / 500
    z = (0.8 - 0.6) / math.sqrt(common * (1 - common) * (1 / 100 + 1 / 400))
    assert noised_difference(first, second, 0.0) == pytest.approx(2 * stats.norm.sf(z))
    chances = [noised_difference(first, second, deviation) for deviation in (0.0, 3.0, 10.0)]
    assert chances[0] is not None and chances[1] is not None and chances[2] is not None
    assert chances[0] < chances[1] < chances[2]
    assert noised_difference(first, second, 20.0) is None and is_lost(100.0, 20.0, (1, 2))


def test_noised_counts_of_equal_groups_are_rarely_called_different() -> None:
    """At 5 % of 500 draws fewer than 10 % are; more would have a chance below 1e-5."""
    draw, found = torch.Generator().manual_seed(5), 0
    for _ in range(500):
        counts = []
        for of in (300, 500):
            hits = torch.binomial(torch.tensor(float(of)), torch.tensor(0.8), generator=draw)
            noise = 6.0 * torch.randn(2, generator=draw)
            counts.append((float(hits + noise[0]), float(of + noise.sum()), (1, 1)))
        chance = noised_difference(counts[0], counts[1], 6.0)
        assert chance is not None
        found += chance < 0.05
    assert found < 50


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holms_correction_keeps_the_order_and_never_helps(chances: list[float]) -> None:
    corrected = holm(chances)
    assert all(before <= after <= 1 for before, after in zip(chances, corrected, strict=True))
    for first, first_corrected in zip(chances, corrected, strict=True):
        for second, second_corrected in zip(chances, corrected, strict=True):
            assert first > second or first_corrected <= second_corrected
    if chances:
        assert min(corrected) == pytest.approx(min(1.0, len(chances) * min(chances)))


def test_holms_correction_is_that_of_the_paper() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.floats(0, 1), COUNT, COUNT, st.floats(0, 0.1))
def test_an_interval_of_an_area_holds_it_and_what_bins_hide(
    area: float, negatives: int, positives: int, resolution: float
) -> None:
    low, high = area_interval(area, negatives, positives, resolution)
    assert 0 <= low <= max(0.0, area - resolution) + 1e-12 and min(1.0, area + resolution) - 1e-12 <= high <= 1


def test_an_interval_of_an_area_is_that_of_the_paper() -> None:
    """Hanley and McNeil 1982: an area of 0.893 with 58 normal and 51 abnormal has a standard error of 0.032."""
    low, high = area_interval(0.893, 58, 51, 0.0)
    assert (high - low) / 2 / LIKELY == pytest.approx(0.0325, abs=1e-3)


def test_a_perfect_model_shows_the_calibration_error_that_chance_makes() -> None:
    draw, bins, errors = torch.Generator().manual_seed(1), [(40, 0.55), (60, 0.75), (200, 0.95)], []
    for _ in range(400):
        rights = [float(torch.binomial(torch.tensor(float(n)), torch.tensor(p), generator=draw)) for n, p in bins]
        errors.append(sum(abs(right - n * p) for right, (n, p) in zip(rights, bins, strict=True)) / 300)
    expected = error_by_chance([*((n, p, 0.0) for n, p in bins), (0, None, None), (5, 1.0, 1.0)])
    assert expected == pytest.approx(sum(errors) / 400 * 300 / 305, rel=0.05)
