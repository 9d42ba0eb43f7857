"""How many guesses are made, and which: shifts of claims against the accountant, and guesses counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpc_fl.evidence.guessing import Guesses, planned_guesses, planned_without_noise, right_guesses, shift_of_claim
from mpc_fl.evidence.one_run_bound import lower_bound
from mpc_fl.learning.privacy.accounting import SubsampledGaussian, epsilon_of


@pytest.mark.parametrize("noise", [0.8, 2.0, 5.0])
def test_the_shift_of_a_claim_is_that_of_one_gaussian_release(noise: float) -> None:
    epsilon = epsilon_of([SubsampledGaussian(noise, 1.0, 1)], 1e-4)
    assert shift_of_claim(epsilon, 1e-4) == pytest.approx(1 / noise, rel=2e-3)


def test_those_with_extreme_scores_are_guessed_about() -> None:
    scores = np.array([3.0, -1.0, 0.0, 2.0, -2.0])
    inside = np.array([True, True, False, False, False])
    assert right_guesses(Guesses(2, 2), scores, inside) == 2  # of 3 and 2 the first, of -2 and -1 the first
    assert right_guesses(Guesses(1, 1), scores, inside) == 2
    assert right_guesses(Guesses(0, 3), scores, inside) == 2
    assert right_guesses(Guesses(3, 0), scores, inside) == 1


def test_the_planned_number_of_guesses_shows_more_than_others_would() -> None:
    """Of Gaussian scores whose shift is the claimed one, drawn at once for 100 audits."""
    generator, m, epsilon, delta = np.random.Generator(np.random.Philox(1)), 4000, 1.5, 1e-4
    shift, planned = shift_of_claim(epsilon, delta), planned_guesses(4000, epsilon, delta, 0.05)
    assert planned.inside == planned.outside and 20 <= planned.count <= m

    def mean_bound(guesses: Guesses) -> float:
        found = []
        for _ in range(40):
            inside = generator.random(m) < 0.5
            scores = generator.normal(size=m) + shift * inside
            found.append(lower_bound(m, guesses.count, right_guesses(guesses, scores, inside), delta, 0.05))
        return float(np.mean(found))

    best = mean_bound(planned)
    assert 0.3 < best < epsilon
    assert mean_bound(Guesses(m // 2, m // 2)) < best and mean_bound(Guesses(10, 10)) < best


@pytest.mark.parametrize("epsilon", [700.0, 24_000.0, math.inf])
def test_guesses_are_planned_for_whatever_an_accountant_says(epsilon: float) -> None:
    """With next to no noise: all of them."""
    assert planned_guesses(4000, epsilon, 1e-5, 0.02) == Guesses(2000, 2000)


def test_without_noise_all_are_guessed_about_or_those_who_were_drawn() -> None:
    assert planned_without_noise(1000, 1e-9) == Guesses(452, 452)
    some = planned_without_noise(1000, 0.5)
    assert some.outside == 0 and 150 < some.inside < 250
