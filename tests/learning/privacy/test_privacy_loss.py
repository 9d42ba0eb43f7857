"""Epsilon by privacy losses is never below the exact one, hardly above it, and agrees with dp-accounting from both sides."""

from __future__ import annotations

import math
import time

import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from mpc_fl.errors import PrivacyBudgetError
from mpc_fl.learning.privacy.accounting import PrivacyBudget, SubsampledGaussian, calibrate_noise_multiplier, epsilon_of
from mpc_fl.learning.privacy.privacy_loss import Mechanism, epsilon_by_losses


def exact_gaussian(noise: float, delta: float) -> float:
    """Balle and Wang (ICML 2018), theorem 8, of one release without sampling."""

    def excess(epsilon: float) -> float:
        shift = epsilon * noise
        last = epsilon + norm.logcdf(-0.5 / noise - shift)  # in logarithms: exp(epsilon) alone overflows
        return float(norm.cdf(0.5 / noise - shift) - math.exp(last)) - delta

    return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, 1 / noise**2 + 50 / noise, xtol=1e-13))


def exact_sampled(noise: float, rate: float, delta: float) -> float:
    """One step with sampling, from the definition: the larger of both orders' epsilons."""

    def place(ratio: float) -> float:  # where the mixture is exp(ratio) times as dense
        inner = (math.exp(ratio) - (1 - rate)) / rate
        return noise**2 * math.log(inner) + 0.5 if inner > 0 else -math.inf

    def removed(epsilon: float) -> float:
        x = place(epsilon)
        mixed = (1 - rate) * norm.sf(x / noise) + rate * norm.sf((x - 1) / noise)
        return float(mixed - math.exp(epsilon) * norm.sf(x / noise)) - delta

    def added(epsilon: float) -> float:
        x = place(-epsilon)
        mixed = (1 - rate) * norm.cdf(x / noise) + rate * norm.cdf((x - 1) / noise)
        return float(norm.cdf(x / noise) - math.exp(epsilon) * mixed) - delta

    return max(0.0 if of(0.0) <= 0 else float(brentq(of, 0.0, 300.0, xtol=1e-13)) for of in (removed, added))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.3, 300.0), st.integers(1, 2000)), min_size=1, max_size=4),
    st.sampled_from([1e-2, 1e-4, 1e-6, 1e-8]),
)
def test_it_is_the_exact_epsilon_of_gaussians_without_sampling(parts: list[tuple[float, int]], delta: float) -> None:
    """Gaussian releases compose to one of noise multiplier 1 / sqrt(sum of steps / z^2) (Dong, Roth, Su 2022)."""
    exact = exact_gaussian(1 / math.sqrt(sum(steps / noise**2 for noise, steps in parts)), delta)
    found = epsilon_by_losses(tuple((noise, 1.0, steps) for noise, steps in parts), delta)
    assert exact <= found <= exact * (1.002 if delta > 1e-8 else 1.01) + 1e-4  # rounding is taken from delta


@settings(max_examples=100, deadline=None)
@given(st.floats(0.25, 100.0), st.floats(1e-4, 1.0), st.sampled_from([1e-3, 1e-5, 1e-7]))
def test_it_is_the_exact_epsilon_of_one_step_with_sampling(noise: float, rate: float, delta: float) -> None:
    exact = exact_sampled(noise, rate, delta)
    assert exact <= epsilon_by_losses(((noise, rate, 1),), delta) <= exact * 1.002 + 1e-4


def bounds(history: tuple[Mechanism, ...], delta: float, width: float) -> tuple[float, float]:
    """Epsilon between the optimistic and the pessimistic estimate of dp-accounting, both orders."""
    found = []
    for pessimistic in (False, True):
        total = None
        for noise, rate, steps in history:
            step = privacy_loss_distribution.from_gaussian_mechanism(
                noise,
                sampling_prob=rate,
                value_discretization_interval=width,
                pessimistic_estimate=pessimistic,
                use_connect_dots=pessimistic,
            ).self_compose(steps)
            total = step if total is None else total.compose(step)
        assert total is not None
        found.append(float(total.get_epsilon_for_delta(delta)))
    return found[0], found[1]


GRID = [
    ((noise, rate, steps),)
    for noise, rate, steps in [
        (0.5, 0.01, 300), (0.7, 0.04, 200), (0.8, 1.0, 5), (1.0, 0.001, 3000), (1.0, 0.16, 25), (2.0, 0.3125, 112),
        (2.0, 1.0, 40), (4.0, 0.5, 50), (10.0, 0.9, 100), (40.0, 0.5, 1000), (100.0, 1.0, 1), (0.4, 0.5, 2),
    ]
]  # fmt: skip
MIXED = [
    ((1.0, 0.16, 25), (2.0, 0.1, 10)),
    ((0.6, 0.01, 100), (3.0, 1.0, 4), (50.0, 0.5, 30)),
    ((8.0, 1.0, 1), (2.0, 0.3, 100)),
    ((0.5, 0.001, 50), (1.5, 0.25, 20)),
]


@pytest.mark.parametrize("delta", [1e-3, 1e-6])
@pytest.mark.parametrize("history", GRID + MIXED)
def test_it_lies_between_the_bounds_of_dp_accounting(history: tuple[Mechanism, ...], delta: float) -> None:
    """The grid of dp-accounting is fine beside the losses, so that its own pessimism is below 0.1 %."""
    low, high = bounds(history, delta, 2e-5 if history[0][0] >= 40 else 2e-4)
    assert low <= epsilon_by_losses(history, delta) <= high * 1.002 + 1e-4


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0.5, 20.0), st.floats(0.001, 1.0), st.integers(1, 500), st.floats(1.0, 1.5), st.sampled_from([1e-3, 1e-6])
)
def test_more_noise_and_fewer_steps_never_cost_more(
    noise: float, rate: float, steps: int, factor: float, delta: float
) -> None:
    """Up to its own tightness: each epsilon is an upper bound by itself."""
    whole = epsilon_by_losses(((noise, rate, steps),), delta) * 1.002 + 1e-4
    assert epsilon_by_losses(((noise * factor, rate, steps),), delta) <= whole
    assert epsilon_by_losses(((noise, rate / factor, steps),), delta) <= whole
    assert epsilon_by_losses(((noise, rate, max(1, int(steps / factor))),), delta) <= whole


@settings(max_examples=40, deadline=None)
@given(st.floats(0.4, 50.0), st.floats(1e-4, 1.0), st.integers(1, 3000), st.sampled_from([1e-3, 1e-5]))
def test_it_asks_for_less_than_renyi_divergences(noise: float, rate: float, steps: int, delta: float) -> None:
    event = SubsampledGaussian(noise, rate, steps)
    assert epsilon_of([event], delta) <= epsilon_of([event], delta, "rdp") * 1.002 + 1e-4


def test_splitting_a_composition_does_not_change_it() -> None:
    whole = epsilon_of([SubsampledGaussian(1.3, 0.2, 60)], 1e-5)
    assert epsilon_of([SubsampledGaussian(1.3, 0.2, 20), SubsampledGaussian(1.3, 0.2, 40)], 1e-5) == whole


@pytest.mark.parametrize(
    "mechanism",
    [(1e-3, 1.0, 3), (0.05, 0.5, 3), (1e3, 1e-6, 10**6), (1.0, 1.0, 10**6), (0.1, 1e-6, 100), (1e3, 1.0, 1)],
    ids=str,
)
def test_extreme_mechanisms_have_a_bound(mechanism: Mechanism) -> None:
    noise, rate, steps = mechanism
    found = epsilon_by_losses((mechanism,), 1e-3)
    assert 0 <= found < math.inf
    if rate == 1:
        assert exact_gaussian(noise / math.sqrt(steps), 1e-3) <= found if noise > 0.01 else found > 1e6


def test_nothing_costs_nothing_and_what_float64_cannot_hold_is_refused() -> None:
    assert epsilon_by_losses((), 1e-5) == epsilon_by_losses(((1.0, 0.5, 0),), 1e-5) == 0.0
    with pytest.raises(PrivacyBudgetError, match=r"not precise enough for delta 1e-15 and 10000 steps"):
        epsilon_by_losses(((1.0, 0.01, 10_000),), 1e-15)


def test_calibration_is_quick_and_saves_noise() -> None:
    """The sampling rate and steps of `configs/demo.yaml`; two seconds are fifty times what it takes."""
    began = time.process_time()
    noise = calibrate_noise_multiplier(PrivacyBudget(8.0, 1e-4), 0.3125, 112)
    assert time.process_time() - began < 2.0
    assert noise < 0.94 * calibrate_noise_multiplier(PrivacyBudget(8.0, 1e-4, "rdp"), 0.3125, 112)
