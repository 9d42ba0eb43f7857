"""What releases say about each canary: a score that is the larger, the more they look as if the canary were in the data. Pure.

A canary moves a direction of its own, so of each release one number concerns it. What is released after a round of local
steps mixes the noised gradients of these steps by learning rate and momentum, in a way that everybody knows
(`step_responses`): it is undone where each round has one step, else the best linear estimate is taken. Of a single noised
gradient x, in units of the clipping norm, the score is the log of how much likelier it is with a canary that is drawn with
probability q than without:

    log(1 - q + q exp((x - 1/2) / z^2))

with z the noise multiplier. The scores of several releases add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Steps:
    """How the steps of a run follow each other: so many `per_release`, with these factors of the learning rate, float each.

    `momentum` begins at zero with every release, unless it `lasts`.
    """

    per_release: int
    rates: Sequence[float]
    momentum: float
    lasts: bool


def step_responses(steps: Steps) -> np.ndarray:
    """What the gradient of each step adds to each release, float64 (releases, steps)."""
    count, releases = len(steps.rates), len(steps.rates) // steps.per_release
    responses, velocity = np.zeros((releases, count)), np.zeros(count)
    for step, rate in enumerate(steps.rates):
        if step % steps.per_release == 0 and not steps.lasts:
            velocity[:] = 0.0
        velocity *= steps.momentum
        velocity[step] += 1.0
        responses[step // steps.per_release] += rate * velocity
    return responses


@dataclass(frozen=True)
class Claim:
    """What an accountant assumes of each step: noise multiplier, None without noise, and the probability that it draws a
    patient."""

    noise_multiplier: float | None
    sample_rate: float


def scores_of(releases: np.ndarray, responses: np.ndarray, claim: Claim) -> np.ndarray:
    """The score of each canary from all these releases, float64 (releases, canaries), in units of what one gradient moves.

    `responses`, float64 (releases, steps), says what each step adds to each of them.
    """
    if claim.noise_multiplier is None:
        return releases.sum(axis=0)
    if len(responses) == responses.shape[1]:
        return _likelihood_of_steps(np.linalg.solve(responses, releases), claim.noise_multiplier, claim.sample_rate)
    of_all, covariance = responses.sum(axis=1), responses @ responses.T
    return np.linalg.solve(covariance, of_all) @ releases


def _likelihood_of_steps(gradients: np.ndarray, noise: float, rate: float) -> np.ndarray:
    """Summed log likelihood ratios of noised gradients, float64 (steps, canaries)."""
    exponents = (gradients - 0.5) / noise**2
    if rate >= 1:
        return exponents.sum(axis=0)
    return np.logaddexp(math.log1p(-rate), math.log(rate) + exponents).sum(axis=0)


def score_of_sum(releases: np.ndarray) -> np.ndarray:
    """The same where the sum of all releases alone is known: of the last model beside the first. float64 (canaries,)."""
    return releases.sum(axis=0)
