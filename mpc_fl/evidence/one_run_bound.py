"""A lower bound on epsilon from right guesses about who is in the data (Steinke, Nasr, Jagielski, NeurIPS 2023).

Each of m canaries is in the data with probability 1/2, independently. Somebody who sees what a mechanism releases guesses of
r of them whether they are in, and abstains on the others; v guesses are right. Were the mechanism (epsilon,
delta)-differentially private for each of them, then with q = e^epsilon / (1 + e^epsilon) and f(v) = P[Binomial(r, q) >= v]

    P[v or more are right] <= f(v) + 2 m delta max_{1 <= i <= v} (f(v - i) - f(v)) / i

(Theorem 5.2 there, with the computation of its appendix D). An epsilon for which this is below the level alpha is rejected; the
largest that is rejected is a lower bound that holds with confidence 1 - alpha. How many guesses are made must not depend on who is
in. Pure.
"""

from __future__ import annotations

import functools
import math

import numpy as np

_LARGEST_EPSILON = 64.0
_BISECTIONS = 40


@functools.lru_cache(maxsize=64)
def _log_choices(guesses: int) -> np.ndarray:
    """Logarithms of the numbers of ways to choose 0 ... r of r, float64 (r + 1,)."""
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, guesses + 1)))])
    return factorials[-1] - factorials - factorials[::-1]


def _right_guesses(guesses: int, epsilon: float) -> np.ndarray:
    """P[Binomial(r, e^epsilon / (1 + e^epsilon)) = 0 ... r], float64 (r + 1,)."""
    of_right = -math.log1p(math.exp(-epsilon))
    count = np.arange(guesses + 1)
    return np.exp(_log_choices(guesses) + count * of_right + (guesses - count) * (of_right - epsilon))


def probability_of_guesses(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How probable `right` right guesses or more are at most, of `guesses` about `canaries`, if (epsilon, delta) holds.

    Raises `ValueError` unless 0 <= right <= guesses <= canaries, epsilon >= 0 and 0 <= delta <= 1.
    """
    if not (0 <= right <= guesses <= canaries and epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(
            "right guesses are some of the guesses, these of the canaries; epsilon and delta are as in a claim"
        )
    masses = _right_guesses(guesses, epsilon)
    found = float(masses[right:].sum())
    if delta and right:
        below = np.cumsum(masses[:right][::-1])  # P[v - i <= right guesses < v] for i = 1 ... v
        found += 2 * canaries * delta * float((below / np.arange(1, right + 1)).max())
    return min(1.0, found)


def lower_bound(canaries: int, guesses: int, right: int, delta: float, level: float) -> float:
    """The largest epsilon that `right` right guesses reject at this `level` (0.05: confidence 95 %), 0 where none is.

    Below it by at most 1e-9. Raises `ValueError` as `probability_of_guesses`, and for a level outside of (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError("a level lies between 0 and 1")

    def rejected(epsilon: float) -> bool:
        return probability_of_guesses(canaries, guesses, right, epsilon, delta) < level

    if not rejected(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while rejected(high):
        low, high = high, 2 * high
        if high > _LARGEST_EPSILON:  # no number of canaries that fits a machine comes near
            return low
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if rejected(middle):
            low = middle
        else:
            high = middle
    return low
