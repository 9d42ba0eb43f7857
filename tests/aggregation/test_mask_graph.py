"""How many neighbours share masks: exact tails against other ways to compute them, a graph that nobody chooses."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mpc_fl.aggregation.mask_costs import mask_costs
from mpc_fl.aggregation.mask_graph import (
    CORRECTNESS_BITS,
    SECURITY_BITS,
    TRIES_BITS,
    MaskBounds,
    circle_order,
    mask_bounds,
    mask_circle,
    most_colluding,
)
from mpc_fl.aggregation.rules import Rules

UNSAFE = 2.0 ** -(SECURITY_BITS + TRIES_BITS + 1)
STOPPED = 2.0**-CORRECTNESS_BITS
_ANY_CHECK: Any = object()  # whichever it is


def collude_more(hospitals: int, colluders: int, reach: int, most: int) -> float:
    return hospitals * float(stats.hypergeom(hospitals, colluders, reach).sf(most))


def fewer_left(hospitals: int, quorum: int, reach: int, least: int) -> float:
    return hospitals * float(stats.hypergeom(hospitals, quorum, reach).cdf(least - 1))


@pytest.mark.parametrize(
    ("hospitals", "colluders", "quorum"),
    [(17, 3, 17), (32, 6, 29), (64, 12, 58), (100, 20, 90), (200, 40, 180), (1000, 200, 900), (1000, 50, 950)],
)
def test_bounds_hold_and_nothing_smaller_does(hospitals: int, colluders: int, quorum: int) -> None:
    bounds = mask_bounds(hospitals, colluders, quorum)
    assert bounds is not None and bounds.neighbours < hospitals - 1
    assert collude_more(hospitals, colluders, bounds.reach, bounds.most_colluding) <= UNSAFE
    assert collude_more(hospitals, colluders, bounds.reach, bounds.most_colluding - 1) > UNSAFE
    assert fewer_left(hospitals, quorum, bounds.reach, bounds.least) <= STOPPED
    assert collude_more(hospitals, colluders, bounds.closing, bounds.closing - 1) <= UNSAFE
    assert bounds.closing == 1 or collude_more(hospitals, colluders, bounds.closing - 1, bounds.closing - 2) > UNSAFE
    for reach in range(1, bounds.reach):
        least = np.arange(1, reach + 1)
        safe = hospitals * stats.hypergeom(hospitals, colluders, reach).sf(least - 1) <= UNSAFE
        goes_on = hospitals * stats.hypergeom(hospitals, quorum, reach).cdf(least - 1) <= STOPPED
        assert not (safe & goes_on).any(), reach


@pytest.mark.parametrize(
    ("hospitals", "colluders", "quorum"),
    [(16, 3, 15), (3, 1, 3), (17, 3, 13), (40, 8, 9), (200, 60, 110)],
)
def test_all_share_masks_with_all_where_no_smaller_graph_is_safe(hospitals: int, colluders: int, quorum: int) -> None:
    assert mask_bounds(hospitals, colluders, quorum) is None


def test_neighbours_grow_with_the_logarithm() -> None:
    found = [mask_bounds(10**power, 10**power // 5, 9 * 10**power // 10) for power in (3, 4, 5)]
    neighbours = [bounds.neighbours for bounds in found if bounds is not None]
    assert len(neighbours) == 3
    # Ten times as many hospitals: fewer than ln(10) / ln(1000) = a third more neighbours.
    assert all(after / before < 4 / 3 for before, after in zip(neighbours, neighbours[1:], strict=False))


@given(st.integers(17, 400), st.data())
@settings(max_examples=60, deadline=None)
def test_a_graph_is_one_whenever_there_is_one(hospitals: int, data: st.DataObject) -> None:
    colluders = data.draw(st.integers(1, hospitals // 3))
    quorum = data.draw(st.integers(hospitals // 2, hospitals))
    bounds = mask_bounds(hospitals, colluders, quorum)
    if bounds is not None:
        assert 1 <= bounds.closing <= bounds.reach < hospitals / 2 and 1 <= bounds.least <= bounds.reach
        names = [f"hospital-{rank}" for rank in range(hospitals)]
        circle = mask_circle(names, "00" * 32, bounds)
        assert sorted(circle.order) == sorted(names) and not circle.followed_by_too_few(names)


def test_a_fifth_may_collude_or_as_many_as_are_configured() -> None:
    assert (most_colluding(100, 1), most_colluding(100, 33), most_colluding(17, 1)) == (20, 33, 3)


def test_the_transcript_alone_puts_hospitals_in_order() -> None:
    names = [f"hospital-{rank}" for rank in range(20)]
    order = circle_order(names, "ab" * 32)
    assert order == circle_order(list(reversed(names)), "ab" * 32) and sorted(order) == sorted(names)
    assert order != circle_order(names, "ab" * 31 + "ac")


def test_two_hospitals_are_as_near_as_chance_has_it() -> None:
    """Over many transcripts the distance of two hospitals in the circle is uniform."""
    names, distances = [f"hospital-{rank}" for rank in range(17)], Counter[int]()
    for number in range(8000):
        order = circle_order(names, hashlib.sha256(str(number).encode()).hexdigest())
        distances[(order.index("hospital-3") - order.index("hospital-11")) % 17] += 1
    assert stats.chisquare([distances[distance] for distance in range(1, 17)]).pvalue > 1e-7


@pytest.mark.parametrize(("quorum", "closing"), [(1000, 0), (900, 2)])
def test_costs_beside_the_summand_grow_with_the_logarithm(quorum: int, closing: int) -> None:
    costs = []
    for hospitals in (1000, 10_000):
        names = tuple(f"hospital-{rank:05d}" for rank in range(hospitals))
        rules = Rules("aggregator", names, quorum * hospitals // 1000, closing, 1.0, colluders=hospitals // 5)
        costs.append(mask_costs(rules, hospitals))
    for part in ("neighbours", "keys", "streams", "bytes_sent", "bytes_received"):
        before, after = (getattr(each, part) for each in costs)
        assert after <= 4 / 3 * before, part
    assert costs[0].against == 200


def test_costs_up_to_sixteen_are_those_of_masks_between_all() -> None:
    names = tuple(f"hospital-{rank}" for rank in range(16))
    rules = Rules("aggregator", names, 14, 2, 1.0, colluders=3)
    assert rules.bounds(16) is None and mask_costs(rules, 16) == mask_costs(replace(rules, colluders=None), 16)
    costs = mask_costs(rules, 16)
    assert (costs.neighbours, costs.keys, costs.streams, costs.against) == (15, 19, 16, 12)
    apart = mask_costs(replace(rules, check=_ANY_CHECK), 16)
    assert (apart.streams, apart.opener_streams, costs.opener_streams) == (17, 32, 16)


def test_bounds_state_what_they_mean() -> None:
    assert MaskBounds(reach=118, most_colluding=84, closing=53).least == 85
    assert mask_bounds(1000, 200, 900) == MaskBounds(reach=118, most_colluding=84, closing=53)
    assert math.comb(200, 53) * 1000 * 2**121 <= math.comb(1000, 53)
