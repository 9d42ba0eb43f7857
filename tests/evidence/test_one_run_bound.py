"""The bound of one run against exact binomials, the algorithm as its authors state it, and mechanisms whose success is known."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mpc_fl.evidence.one_run_bound import lower_bound, probability_of_guesses

COUNTS = (
    st.integers(1, 60)
    .flatmap(lambda m: st.tuples(st.just(m), st.integers(1, m)))
    .flatmap(lambda mr: st.tuples(st.just(mr[0]), st.just(mr[1]), st.integers(0, mr[1])))
)
EPSILON = st.floats(0, 6)
DELTA = st.floats(0, 1e-2)


def as_published(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 term by term, with a library's binomial."""
    q = math.exp(epsilon) / (1 + math.exp(epsilon))

    def tail(count: int) -> float:
        return float(stats.binom.sf(count - 1, r, q))

    most = max(((tail(v - i) - tail(v)) / i for i in range(1, v + 1)), default=0.0)
    return min(1.0, tail(v) + 2 * m * delta * most)


@given(COUNTS, EPSILON, DELTA)
def test_it_is_the_bound_that_was_published(counts: tuple[int, int, int], epsilon: float, delta: float) -> None:
    found = probability_of_guesses(*counts, epsilon, delta)
    assert found == pytest.approx(as_published(*counts, epsilon, delta), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(("guesses", "right"), [(1, 1), (5, 0), (5, 3), (12, 12), (30, 21)])
def test_without_delta_it_is_an_exact_binomial_tail(guesses: int, right: int) -> None:
    """At epsilon log 3 a guess is right with probability 3/4."""
    exact = sum(
        math.comb(guesses, count) * Fraction(3, 4) ** count * Fraction(1, 4) ** (guesses - count)
        for count in range(right, guesses + 1)
    )
    found = probability_of_guesses(guesses + 3, guesses, right, math.log(3), 0.0)
    assert found == pytest.approx(float(exact), rel=1e-10)


@pytest.mark.parametrize("guesses", [10, 100, 1000, 10000])
def test_right_guesses_alone_show_what_follows_from_the_theorem_by_hand(guesses: int) -> None:
    """With r of r right and delta 0 it says q^r = 0.05, so epsilon = log(q / (1 - q)): 3.5 of 100 guesses, 5.8 of 1000."""
    of_right = 0.05 ** (1 / guesses)
    by_hand = math.log(of_right / (1 - of_right))
    assert lower_bound(guesses, guesses, guesses, 0.0, 0.05) == pytest.approx(by_hand, abs=1e-6)


@given(st.integers(1, 40), st.floats(0.05, 4), st.floats(0, 1e-2), st.data())
def test_no_mechanism_that_keeps_a_claim_guesses_better_than_the_bound(
    m: int, epsilon: float, delta: float, data: st.DataObject
) -> None:
    """Two of which all is known: each bit by randomised response, but with probability delta as it is, for each bit or for all."""
    v, q = data.draw(st.integers(0, m)), 1 / (1 + math.exp(-epsilon))
    allowed = probability_of_guesses(m, m, v, epsilon, delta) + 1e-12
    assert stats.binom.sf(v - 1, m, delta + (1 - delta) * q) <= allowed
    assert delta + (1 - delta) * stats.binom.sf(v - 1, m, q) <= allowed


@given(COUNTS, DELTA)
@settings(deadline=None)
def test_the_lower_bound_is_where_rejection_ends(counts: tuple[int, int, int], delta: float) -> None:
    found = lower_bound(*counts, delta, 0.05)
    assert probability_of_guesses(*counts, found + 1e-6, delta) >= 0.05 - 1e-9
    if found:
        assert probability_of_guesses(*counts, found, delta) < 0.05
    else:
        assert probability_of_guesses(*counts, 0.0, delta) >= 0.05


@given(COUNTS, DELTA)
@settings(deadline=None)
def test_more_right_guesses_show_no_less(counts: tuple[int, int, int], delta: float) -> None:
    m, r, v = counts
    assert lower_bound(m, r, v, delta, 0.05) <= lower_bound(m, r, min(r, v + 1), delta, 0.05) + 1e-9


@pytest.mark.parametrize(
    "bad",
    [(5, 6, 1, 1.0, 0.0), (5, 4, 5, 1.0, 0.0), (5, 4, -1, 1.0, 0.0), (5, 4, 3, -1.0, 0.0), (5, 4, 3, 1.0, 2.0)],
)
def test_what_is_no_claim_is_refused(bad: tuple[int, int, int, float, float]) -> None:
    with pytest.raises(ValueError, match="guesses"):
        probability_of_guesses(*bad)
    with pytest.raises(ValueError, match="level"):
        lower_bound(5, 4, 3, 0.0, 1.0)
