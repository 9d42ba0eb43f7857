"""What noisy releases cost in epsilon: immutable events, budgets, and the noise that fits a budget. Pure.

Every DP-SGD round is a composition of Poisson-subsampled Gaussian mechanisms (Abadi et al., CCS 2016). Neighbouring
data sets differ in one patient, added or removed. Accountants: `pld`, the default, composes privacy loss distributions and
bounds epsilon from above within 0.1 % (`privacy_loss`). `rdp` composes Renyi divergences (Mironov, Talwar, Zhang 2019;
Opacus's): valid too, but 10 to 17 % larger, which costs 6 to 7 % more noise. `prv` is Opacus's numerical composition (Gopi, Lee,
Wutschitz 2021), for comparison: its epsilon holds for patients removed, and is up to 0.02 too large.

A mechanism whose outputs are only within total variation eta of a Gaussian one's (integer noise: `distributed_gaussian`)
is the same event with that eta: over all steps the distances add up, and where the Gaussian releases are (epsilon, delta)
the real ones are (epsilon, delta + (1 + exp(epsilon)) * sum of eta). A fixed small part of delta is set aside for this.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mpc_fl.errors import PrivacyBudgetError
from mpc_fl.learning.privacy.privacy_loss import epsilon_by_losses

Accountant = Literal["pld", "rdp", "prv"]

# Opacus's orders (`RDPAccountant.DEFAULT_ALPHAS`; Opacus itself is imported when something is computed, it takes seconds),
# and larger ones: with those alone no epsilon below log(1/delta) / 62 can be certified.
_OPACUS_ORDERS = (*(1 + tenths / 10.0 for tenths in range(1, 100)), *range(12, 64))
RDP_ORDERS: tuple[float, ...] = (*_OPACUS_ORDERS, 80, 96, 128, 192, 256, 512, 1024)
LARGEST_NOISE_MULTIPLIER = 1e3
_CALIBRATION_TOLERANCE = 1e-3
ROUNDING = 1e-9
_SPREAD_OF_BOUNDS = 3e-4  # of epsilon
_SET_ASIDE = 2.0**-20


@dataclass(frozen=True)
class SubsampledGaussian:
    """`steps` releases of a sum clipped to norm C with Gaussian noise of standard deviation `noise_multiplier` * C,
    each over patients drawn independently with probability `sample_rate`.

    `total_variation` bounds, per step, how far the release is from that one in distribution, whatever the data.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    total_variation: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("noise multiplier", self.noise_multiplier), ("sampling rate", self.sample_rate)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
                raise PrivacyBudgetError(f"a {name} must be a positive number, not {value!r}")
        if self.sample_rate > 1:
            raise PrivacyBudgetError(f"a sampling rate cannot exceed 1, got {self.sample_rate!r}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise PrivacyBudgetError(f"a number of steps must be a whole number from 0 on, not {self.steps!r}")
        distance = self.total_variation
        if isinstance(distance, bool) or not isinstance(distance, (int, float)) or not 0 <= distance < 1:
            raise PrivacyBudgetError(f"a total variation must be a number from 0 to 1, not {distance!r}")


@dataclass(frozen=True)
class Unprotected:
    """Releases without noise: no epsilon holds for the patients whose data they show."""


Event = SubsampledGaussian | Unprotected


@dataclass(frozen=True)
class PrivacyBudget:
    """The (epsilon, delta) a hospital's patients are promised over everything it ever releases from these data."""

    epsilon: float
    delta: float
    accountant: Accountant = "pld"


def _merged(events: Iterable[SubsampledGaussian]) -> list[tuple[float, float, int]]:
    """Equal mechanisms in one entry, in a fixed order: composition is commutative, and so becomes our rounding."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        key = (float(event.noise_multiplier), float(event.sample_rate))
        steps[key] = steps.get(key, 0) + event.steps
    return [(noise, rate, count) for (noise, rate), count in sorted(steps.items()) if count]


@functools.lru_cache(maxsize=4096)
def _renyi_of_one_step(noise_multiplier: float, sample_rate: float) -> np.ndarray:
    """Renyi divergences at `RDP_ORDERS`, float64; they add up over steps."""
    from opacus.accountants.analysis import rdp as analysis

    return np.asarray(
        analysis.compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=list(RDP_ORDERS))
    )


def epsilon_of(events: Iterable[Event], delta: float, accountant: Accountant = "pld") -> float:
    """Smallest epsilon the accountant certifies for the composition of `events` at `delta`; 0 for no events.

    Infinite where one of them is `Unprotected`, or the events' total variation leaves nothing to certify. Raises
    `PrivacyBudgetError` unless 0 < delta < 1, and where `pld` or `prv` cannot represent the composition.
    """
    if not 0 < delta < 1:
        raise PrivacyBudgetError(f"delta must lie between 0 and 1, got {delta}", "set privacy.delta, for example 1e-4")
    noised: list[SubsampledGaussian] = []
    for event in events:
        if isinstance(event, Unprotected):
            return math.inf
        noised.append(event)
    history = _merged(noised)
    if not history:
        return 0.0
    distance = math.fsum(event.steps * event.total_variation for event in noised)
    if distance == 0:
        return _epsilon_of_gaussians(history, delta, accountant)
    set_aside = _SET_ASIDE * delta
    epsilon = _epsilon_of_gaussians(history, delta - set_aside, accountant)
    # (1 + exp(epsilon)) * distance <= set_aside, without overflow
    return epsilon if np.logaddexp(0.0, epsilon) + math.log(distance) <= math.log(set_aside) else math.inf


def _epsilon_of_gaussians(history: list[tuple[float, float, int]], delta: float, accountant: Accountant) -> float:
    if accountant == "pld":
        return epsilon_by_losses(tuple(history), delta)
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis import rdp as analysis

    with warnings.catch_warnings():
        # "Optimal order is the smallest/largest alpha": the bound holds, a finer order could only lower it.
        warnings.simplefilter("ignore")
        if accountant == "rdp":
            divergences = sum(count * _renyi_of_one_step(noise, rate) for noise, rate, count in history)
            epsilon, _ = analysis.get_privacy_spent(orders=list(RDP_ORDERS), rdp=divergences, delta=delta)
            return max(0.0, float(epsilon))
        numerical = PRVAccountant()
        numerical.history = history
        try:
            return float(numerical.get_epsilon(delta=delta))
        except (ValueError, RuntimeError, OverflowError, MemoryError) as error:
            raise PrivacyBudgetError(
                f"the prv accountant cannot compose these events: {error}", "set privacy.accountant=rdp"
            ) from None


def check_delta(delta: float, patients: int, who: str) -> None:
    """Raise `PrivacyBudgetError` unless delta < 1 / patients: a larger one allows publishing a patient outright."""
    if patients < 1:
        raise PrivacyBudgetError(f"{who}: no training patients", "give this hospital data")
    if not 0 < delta < 1 / patients:
        raise PrivacyBudgetError(
            f"{who}: delta {delta:g} is not below 1/{patients}, one over the number of training patients",
            f"set privacy.delta to at most {0.1 / patients:.1g}",
        )


def _spent_message(who: str, epsilon: float, budget: PrivacyBudget) -> str:
    spent = f"epsilon {epsilon:.3f} of {budget.epsilon:g} at delta {budget.delta:g}"
    if epsilon == 0:
        return f"{who}: no noise is large enough for the privacy budget: {spent} is spent"
    return f"{who}: privacy budget already spent: {spent}"


def calibrate_noise_multiplier(
    budget: PrivacyBudget,
    sample_rate: float,
    steps: int,
    spent: Iterable[SubsampledGaussian] = (),
    who: str = "hospital",
    total_variation: float = 0.0,
) -> float:
    """Smallest noise multiplier (up to 0.1 %) with which `steps` more steps and `spent` compose to at most the budget.

    By bisection; the returned value itself has been checked against the accountant. It stays below the budget by more than
    upper bounds of nearly equal compositions differ, so that the run is not refused on its way. Raises `PrivacyBudgetError`,
    beginning with `who`, if the events already spent leave nothing.
    """
    past = list(spent)

    def total(noise_multiplier: float) -> float:
        planned = SubsampledGaussian(noise_multiplier, sample_rate, steps, total_variation)
        return epsilon_of([*past, planned], budget.delta, budget.accountant)

    before = epsilon_of(past, budget.delta, budget.accountant)
    advice = "stop here, or agree on a larger privacy.epsilon with the patients' representatives"
    if before >= budget.epsilon:
        raise PrivacyBudgetError(_spent_message(who, before, budget), advice)
    target = budget.epsilon * (1 - _SPREAD_OF_BOUNDS)
    high = 1.0
    while total(high) > target:
        high *= 2
        if high > LARGEST_NOISE_MULTIPLIER:
            message = (
                f"{_spent_message(who, before, budget)}; {steps} more steps fit with no noise "
                f"multiplier up to {LARGEST_NOISE_MULTIPLIER:g}"
            )
            raise PrivacyBudgetError(message, advice)
    low = high / 2
    while low > 1e-3 and total(low) <= target:
        high, low = low, low / 2
    while high - low > _CALIBRATION_TOLERANCE * high:
        middle = (low + high) / 2
        if total(middle) <= target:
            high = middle
        else:
            low = middle
    return high
