"""How many guesses an auditor makes, chosen before anything is released; and which these are, once there are scores. Pure.

Few guesses, about the canaries with the most extreme scores, are right more often; many weigh more. What is best depends on
how much the releases show, and for that the accountant's claim is taken: the pair of normal distributions N(0, 1) and N(mu,
1) that is (epsilon, delta)-indistinguishable and no better. The bound holds whether or not the claim is true, since the
number of guesses does not depend on who is in the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from mpc_fl.evidence.one_run_bound import lower_bound

_SHARES = (0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
_FEWEST = 20  # guesses
_LARGEST_SHIFT = 50.0
_LARGEST_CLAIM = 500.0  # epsilon: with this much all guesses are right, and its exponential is a float
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Guesses:
    """Of how many canaries it is guessed that they are in the data, and of how many that they are not."""

    inside: int
    outside: int

    @property
    def count(self) -> int:
        """All guesses."""
        return self.inside + self.outside


def delta_of_shift(epsilon: float, shift: float) -> float:
    """The delta at which N(0, 1) and N(shift, 1) are (epsilon, delta)-indistinguishable (Balle and Wang, ICML 2018, theorem 5)."""
    return _NORMAL.cdf(shift / 2 - epsilon / shift) - math.exp(epsilon) * _NORMAL.cdf(-shift / 2 - epsilon / shift)


def shift_of_claim(epsilon: float, delta: float) -> float:
    """The largest mu for which N(0, 1) and N(mu, 1) are (epsilon, delta)-indistinguishable, by bisection."""
    low, high = 0.0, _LARGEST_SHIFT
    for _ in range(60):
        middle = (low + high) / 2
        if epsilon / middle < 1e3 and delta_of_shift(epsilon, middle) > delta:
            high = middle
        else:
            low = middle
    return low


def _share_right(share: float, shift: float) -> float:
    """Of the guesses about a share of all canaries, those farthest from the middle, how many are right on average."""

    def beyond(distance: float) -> tuple[float, float]:
        return 1 - _NORMAL.cdf(distance - shift / 2), 1 - _NORMAL.cdf(distance + shift / 2)

    low, high = 0.0, 10.0 + shift
    for _ in range(60):
        middle = (low + high) / 2
        if sum(beyond(middle)) > share:
            low = middle
        else:
            high = middle
    right, wrong = beyond(low)
    return right / (right + wrong)


def planned_guesses(canaries: int, epsilon: float, delta: float, level: float) -> Guesses:
    """So many guesses that the lower bound is largest if the claim (epsilon, delta) is tight."""
    shift, best = shift_of_claim(min(epsilon, _LARGEST_CLAIM), delta), (-1.0, 1.0)
    for share in _SHARES:
        count = 2 * max(_FEWEST // 2, round(share * canaries / 2))
        if count <= canaries:
            right = round(count * _share_right(share, shift))
            best = max(best, (lower_bound(canaries, count, right, delta, level), share))
    half = max(_FEWEST // 2, round(best[1] * canaries / 2))
    return Guesses(min(half, canaries // 2), min(half, canaries // 2))


def planned_without_noise(canaries: int, never_drawn: float) -> Guesses:
    """Guesses where no noise hides who was drawn, and who is in the data was `never_drawn` with this probability.

    About nearly all of them where nearly everybody is drawn, else about those alone who were: as many as there are of either
    kind, but for one audit in a thousand.
    """

    def sure(share: float) -> int:
        return max(1, int(canaries * share - 3 * math.sqrt(canaries * share * (1 - share))))

    drawn = (1 - never_drawn) / 2
    return Guesses(sure(drawn), sure(0.5) if never_drawn * canaries < 1e-2 else 0)


def right_guesses(guesses: Guesses, scores: np.ndarray, inside: np.ndarray) -> int:
    """How many are right: those with the largest `scores`, float64 (m,), are taken for `inside`, bool (m,), the smallest not.

    Equal scores are in the order of canaries, which says nothing about who is in.
    """
    order = np.argsort(scores, kind="stable")
    taken_in, taken_out = order[len(order) - guesses.inside :], order[: guesses.outside]
    return int(inside[taken_in].sum()) + int((~inside[taken_out]).sum())
