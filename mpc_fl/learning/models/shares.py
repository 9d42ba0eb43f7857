"""How sure shares of counted patients are, and whether two of them differ by more than chance: pure, on counts alone.

Intervals: Wilson's score interval of exact counts (Wilson, JASA 1927), a normal one of counts with noise; of the difference of two
shares Newcombe's (Statistics in Medicine 1998, method 10), which is made of theirs; of an AUC Hanley and McNeil's (Radiology
1982). Tests: Fisher's exact test of two shares of exact counts (Fisher, JRSS 1935), two-sided by the sum of all tables that are no
more probable; of noised counts the normal test of their difference, with the variance of the noise added. Holm's step-down
procedure (Scandinavian Journal of Statistics 1979) makes several tests one: with probability 95 % none of those below 0.05 is
there by chance. All take records as independent of each other; patients with several records make intervals too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

LIKELY = 1.96  # standard deviations to either side of 95 %
_ROUNDED = 1e-7  # by which equally probable tables may differ in float64
_OUT_OF_NOISE = 4  # deviations that a noised number must have to be tested


def wilson_interval(share: float, count: int, z: float = LIKELY) -> tuple[float, float]:
    """Wilson score interval of a share of `count` >= 1 records taken as independent (Wilson, JASA 1927); z = 1.96 for 95 %."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def noised_interval(share: float, count: float, deviation: float, cells: tuple[int, int]) -> tuple[float, float]:
    """About 95 % of a share of `count` >= 1 patients that noised counts say: sampling and noise, added as variances.

    `cells`: how many counts, each with noise of `deviation`, make up the patients of the share, and how many the others.
    """
    sampling = max(share * (1 - share), 1 / count) / count
    half = LIKELY * math.sqrt(sampling + _noise_variance(share, count, deviation, cells))
    return max(0.0, share - half), min(1.0, share + half)


def is_lost(count: float, deviation: float, cells: tuple[int, int]) -> bool:
    """Whether a number of patients, which so many counts with noise of `deviation` make up, does not stand out of their noise."""
    return count < max(1.0, _OUT_OF_NOISE * deviation * math.sqrt(sum(cells)))


def _noise_variance(share: float, count: float, deviation: float, cells: tuple[int, int]) -> float:
    return (deviation / count) ** 2 * (cells[0] * (1 - share) ** 2 + cells[1] * share**2)


def difference_interval(larger: tuple[float, float, float], smaller: tuple[float, float, float]) -> tuple[float, float]:
    """95 % of the difference of two shares, each given as (share, low, high): Newcombe's hybrid of their intervals."""
    (first, first_low, first_high), (second, second_low, second_high) = larger, smaller
    difference = first - second
    low = difference - math.hypot(first - first_low, second_high - second)
    high = difference + math.hypot(first_high - first, second - second_low)
    return max(-1.0, low), min(1.0, high)


def area_interval(area: float, negatives: int, positives: int, resolution: float) -> tuple[float, float]:
    """About 95 % of an AUC over at least one record of either kind, wider by what its bins may hide (`area_resolution`)."""
    both, twice = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (positives - 1) * (both - area**2) + (negatives - 1) * (twice - area**2)
    half = LIKELY * math.sqrt(max(0.0, variance) / (negatives * positives)) + resolution
    return max(0.0, area - half), min(1.0, area + half)


def fisher_exact(first: tuple[int, int], second: tuple[int, int]) -> float:
    """Probability, where two shares are equal, of counts at least as far apart; each (how many, of how many), whole numbers."""
    (hits, of), (other_hits, of_others) = first, second
    all_hits, everybody = hits + other_hits, of + of_others
    lowest, highest = max(0, all_hits - of_others), min(of, all_hits)
    if lowest == highest:
        return 1.0
    possible = torch.arange(lowest, highest + 1, dtype=torch.float64)
    logs = _log_choose(of, possible) + _log_choose(of_others, all_hits - possible)
    logs -= _log_choose(everybody, torch.tensor(float(all_hits), dtype=torch.float64))
    chances = logs.exp()
    return min(1.0, float(chances[logs <= logs[hits - lowest] + _ROUNDED].sum()))


def _log_choose(of: int, count: torch.Tensor) -> torch.Tensor:
    return math.lgamma(of + 1) - torch.lgamma(count + 1) - torch.lgamma(of - count + 1)


def sign_test(first: int, second: int) -> float:
    """Probability that of so many cases, which one or the other side has with equal chance, either has at least the larger
    number: the exact form of McNemar's test of two shares of the same records (Psychometrika 1947)."""
    cases, fewer = first + second, min(first, second)
    below = torch.arange(fewer + 1, dtype=torch.float64)
    return min(1.0, 2 * float((_log_choose(cases, below) - cases * math.log(2)).exp().sum()))


NoisedShare = tuple[float, float, tuple[int, int]]  # how many, of how many, and counts as `noised_interval` has them


def noised_difference(first: NoisedShare, second: NoisedShare, deviation: float) -> float | None:
    """The same of counts with noise of `deviation` each, by the normal distribution; None where a number is lost in its noise."""
    if any(is_lost(of, deviation, cells) for _, of, cells in (first, second)):
        return None
    (hits, of, cells), (other_hits, of_others, other_cells) = first, second
    common = min(1.0, max(0.0, (hits + other_hits) / (of + of_others)))
    sampling = max(common * (1 - common), 1 / (of + of_others)) * (1 / of + 1 / of_others)
    noise = _noise_variance(common, of, deviation, cells) + _noise_variance(common, of_others, deviation, other_cells)
    return math.erfc(abs(hits / of - other_hits / of_others) / math.sqrt(2 * (sampling + noise)))


def holm(chances: Sequence[float]) -> list[float]:
    """Each probability of a family of tests as Holm's procedure corrects it: to be compared with the level itself."""
    adjusted, largest = [0.0] * len(chances), 0.0
    for passed, place in enumerate(sorted(range(len(chances)), key=lambda each: chances[each])):
        largest = max(largest, min(1.0, (len(chances) - passed) * chances[place]))
        adjusted[place] = largest
    return adjusted


def error_by_chance(bins: Sequence[tuple[int, float | None, float | None]]) -> float:
    """The expected calibration error that a perfectly calibrated model would show of so few records, from bins as
    `Evaluation.reliability_bins` has them: mean deviation of a normal number of right ones in each."""
    total = sum(count for count, _, _ in bins)
    parts = (
        math.sqrt(2 * count * mean * (1 - mean) / math.pi) for count, mean, _ in bins if mean is not None and mean < 1
    )
    return sum(parts) / max(1, total)
