"""Integer noise: tables that are exact to 2^-130, a lemma checked in 80 digits, samples that follow both.

The tables and the lemma are checked without chance. Statistical tests use fixed thresholds; the seeds are fresh, so each
states how often it fails by chance.
"""

from __future__ import annotations

import decimal
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SecrecyError
from mpc_fl.learning.privacy import discrete_gaussian as integer_noise
from mpc_fl.learning.privacy.discrete_gaussian import SMOOTHING, TOTAL_VARIATION, DiscreteGaussian, smoothing_distance

FALSE_ALARM = 1e-7
STANDARD_ERRORS = 5.5  # a normal variable beyond: 4e-8
EXACT = decimal.Context(prec=80, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX)
LARGEST_LEVEL = 6 * 123**2


def exact_probabilities(variance: Fraction, reach: int) -> dict[int, Decimal]:
    """N_Z(0, variance) on -reach .. reach, in 80 digits; what lies beyond enters the normalisation."""
    with decimal.localcontext(EXACT):
        half = [
            (Decimal(-x * x * variance.denominator) / Decimal(2 * variance.numerator)).exp()
            for x in range(reach + reach // 3 + 40)
        ]
        total = 2 * sum(half) - half[0]
        return {x: half[abs(x)] / total for x in range(-reach, reach + 1)}


def total_variation(one: dict[int, Decimal], other: dict[int, Decimal]) -> Decimal:
    with decimal.localcontext(EXACT):
        missing = max(abs(1 - sum(one.values())), abs(1 - sum(other.values())))
        return (sum((abs(one.get(x, Decimal(0)) - other.get(x, Decimal(0))) for x in {*one, *other}), missing)) / 2


def table_masses(table: integer_noise._AliasTable) -> dict[int, int]:
    """What a table gives to every value, in units of 2^-224, from its columns alone."""
    word_bits, masses = 32 - table.column_bits, {}
    for column, tie in enumerate(table.ties):
        own = ((int(table.thresholds[column]) - (column << word_bits)) << 192) + tie
        assert 0 <= own < 1 << (word_bits + 192)
        for value, mass in ((2 * column, own), (2 * column + 1, (1 << (word_bits + 192)) - own)):
            masses[int(table.values[value])] = masses.get(int(table.values[value]), 0) + mass
    return {value: mass for value, mass in masses.items() if mass}


# --- exactness, without chance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variance",
    [Fraction(1, 1024), Fraction(1), Fraction(7, 3), Fraction(30), Fraction(1000.1), Fraction(LARGEST_LEVEL)],
    ids=str,
)
def test_tables_hold_the_distribution_to_130_bits(variance: Fraction) -> None:
    masses = table_masses(integer_noise._alias_table(variance))
    assert sum(masses.values()) == 1 << 224
    reach = max(masses)
    assert min(masses) == -reach and reach**2 <= 13.5**2 * variance + 27 * math.sqrt(variance) + 1
    with decimal.localcontext(EXACT):
        held = {value: Decimal(mass) / Decimal(1 << 224) for value, mass in masses.items()}
    assert total_variation(held, exact_probabilities(variance, reach)) < Decimal(2) ** Decimal(-130)


def sum_law(k: int, a: Fraction, b: Fraction) -> dict[int, Decimal]:
    """The law of X + k Y, X of N_Z(0, a), Y of N_Z(0, b), in 80 digits."""
    first, second = (exact_probabilities(v, math.ceil(19 * math.sqrt(v))) for v in (a, b))
    law: dict[int, Decimal] = {}
    with decimal.localcontext(EXACT):
        for x, p in first.items():
            for y, q in second.items():
                law[x + k * y] = law.get(x + k * y, Decimal(0)) + p * q
    return law


@pytest.mark.parametrize(("k", "a", "b"), [(2, 24, 30), (1, 10, 10), (3, 12, 4), (1, 3, 2)])
def test_the_lemma(k: int, a: int, b: int) -> None:
    law = sum_law(k, Fraction(a), Fraction(b))
    distance = total_variation(law, exact_probabilities(Fraction(a + k * k * b), max(law)))
    bound = smoothing_distance(1 / (k**2 / a + 1 / b))
    assert float(distance) <= bound
    assert float(distance) > bound / 20  # the bound is not there for show: it is nearly reached


@settings(max_examples=60, deadline=None)
@given(st.fractions(Fraction(1, 1024), Fraction(1 << 80)), st.integers(-10, 80))
def test_levels_add_up_and_are_smooth(fraction: Fraction, exponent: int) -> None:
    for variance in (max(fraction, Fraction(1, 1024)), Fraction(2) ** exponent * 1):
        k, variances = integer_noise._levels(variance)
        assert sum(k ** (2 * level) * one for level, one in enumerate(variances)) == variance
        assert len(variances) <= 6 and max(variances) <= LARGEST_LEVEL
        assert variances[-1] >= 30 or len(variances) == 1
        for level in range(len(variances) - 1):
            above = sum(k ** (2 * (i - level - 1)) * variances[i] for i in range(level + 1, len(variances)))
            assert 1 / (Fraction(k**2) / variances[level] + 1 / above) >= SMOOTHING
        largest = DiscreteGaussian(variance).largest
        assert 13.5 * math.sqrt(variance) * (1 - 1e-9) <= largest <= 15.5 * math.sqrt(variance) + 1


def test_the_stated_distance_covers_six_levels() -> None:
    tails = 2 * math.exp(-(13.5**2) / 2)
    assert 6 * (tails + 2.0**-200 + smoothing_distance(SMOOTHING)) < TOTAL_VARIATION


@pytest.mark.parametrize(("key", "open_words", "own"), [(0, 0, 0), (2, 2, 0), (206, 1, 1), (318, 1, 1), (607, 2, 1)])
def test_every_bit_of_a_sample_counts(key: int, open_words: int, own: int) -> None:
    """A block recomputed from its 32-bit words and, where they equal a threshold (one in 2^19 does), from 192 more bits.

    The keys were searched for such blocks: in `open_words` places, of which `own` fall below the rest of the threshold.
    """
    table = integer_noise._alias_table(Fraction(LARGEST_LEVEL))
    stream = Seed(key.to_bytes(32, "little")).stream("x")
    words = stream.words(integer_noise._BLOCK, np.uint32)
    columns = (words >> np.uint32(32 - table.column_bits)).astype(np.int64)
    expected = table.values[2 * columns + (words >= table.thresholds[columns])]
    ties = np.flatnonzero(words == table.thresholds[columns])
    below = [int.from_bytes(stream.words(24, np.uint8).tobytes(), "little") < table.ties[columns[tie]] for tie in ties]
    for tie, is_own in zip(ties, below, strict=True):
        expected[tie] = table.values[2 * columns[tie] + (not is_own)]
    assert (len(ties), sum(below)) == (open_words, own)
    drawn = DiscreteGaussian(LARGEST_LEVEL).sample(Seed(key.to_bytes(32, "little")).stream("x"), (len(words),))
    assert np.array_equal(drawn.numpy(), expected)


# --- samples ----------------------------------------------------------------------------------------------------------


def draw(variance: int | Fraction, count: int) -> np.ndarray:
    total = torch.zeros(count, dtype=torch.int64)
    DiscreteGaussian(variance).add_to(total, Seed.from_system())
    return total.numpy()


@pytest.mark.parametrize("variance", [1, Fraction(21, 4), LARGEST_LEVEL, LARGEST_LEVEL + 1])
def test_every_value_has_its_probability(variance: int | Fraction) -> None:
    """Chi-square over single values; the last variance needs two levels. False alarm 1e-7."""
    count = 1 << 22
    values = draw(variance, count)
    deviation = math.sqrt(variance)
    edge = max(2, int(3.5 * deviation))
    x = np.arange(-int(13.5 * deviation) - 1, int(13.5 * deviation) + 2)
    weights = np.exp(-(x.astype(float) ** 2) / (2 * float(variance)))
    expected = np.bincount(np.clip(x, -edge, edge) + edge, weights=weights / weights.sum()) * count
    observed = np.bincount(np.clip(values, -edge, edge) + edge, minlength=2 * edge + 1)
    assert expected.min() > 5
    assert stats.chisquare(observed, expected * count / expected.sum()).pvalue > FALSE_ALARM


@pytest.mark.parametrize("exponent", [0, 12, 20, 32, 40, 60])
def test_moments_bins_and_low_bits(exponent: int) -> None:
    """Mean, variance, kurtosis (5.5 standard errors, 4e-8 each), 200 equal bins and, where the deviation exceeds 2^9,
    the last 8 bits (chi-square, 1e-7 each)."""
    variance, count = 1 << exponent, 1 << 20
    values = draw(variance, count)
    scaled = values / math.sqrt(variance)
    probabilities = exact_moments(variance)
    assert abs(scaled.mean()) < STANDARD_ERRORS / math.sqrt(count)
    assert abs((scaled**2).mean() - probabilities[0]) < STANDARD_ERRORS * math.sqrt(2.1 / count)
    assert abs((scaled**4).mean() - probabilities[1]) < STANDARD_ERRORS * math.sqrt(97 / count)
    if exponent >= 18:
        edges = np.ceil(stats.norm.ppf(np.arange(1, 200) / 200) * math.sqrt(variance)) - 0.5
        probability = np.diff(np.concatenate([[0], stats.norm.cdf(edges / math.sqrt(variance)), [1]]))
        observed = np.bincount(np.searchsorted(edges, values), minlength=200)
        assert stats.chisquare(observed, probability * count).pvalue > FALSE_ALARM
        assert stats.chisquare(np.bincount(values & 255, minlength=256)).pvalue > FALSE_ALARM


def exact_moments(variance: int) -> tuple[float, float]:
    """Second and fourth moment over their Gaussian scale."""
    if variance > 100:
        return 1.0, 3.0  # to within exp(-2 pi^2 variance)
    x = np.arange(-200, 201).astype(float)
    weights = np.exp(-(x**2) / (2 * variance))
    weights /= weights.sum()
    return float((weights * x**2).sum() / variance), float((weights * x**4).sum() / variance**2)


@pytest.mark.parametrize("variance", [100, 1 << 40])
def test_tails(variance: int) -> None:
    """Counts beyond 3, 4 and 4.5 standard deviations, each side: exact binomial tests, false alarm 1e-7 each."""
    count = 1 << 22
    values = draw(variance, count)
    assert np.abs(values).max() <= DiscreteGaussian(variance).largest
    x = np.arange(0, int(13.5 * math.sqrt(variance)) + 1) if variance < 1000 else None
    for deviations in (3, 4, 4.5):
        edge = math.ceil(deviations * math.sqrt(variance))
        if x is None:
            probability = float(stats.norm.sf((edge - 0.5) / math.sqrt(variance)))
        else:
            weights = np.exp(-(x.astype(float) ** 2) / (2 * variance))
            probability = float(weights[edge:].sum() / (2 * weights.sum() - 1))
        for observed in (int((values >= edge).sum()), int((values <= -edge).sum())):
            assert stats.binomtest(observed, count, probability).pvalue > FALSE_ALARM


def test_neighbours_are_independent() -> None:
    """Correlation at distances 1, 2, a block and a piece, and between low bits: 5.5 standard errors, 4e-8 each."""
    count = (1 << 21) + 12345
    values = draw(1 << 40, count)
    for signal in (values / 2.0**20, (values & 1) * 2.0 - 1, np.abs(values) / 2.0**20 - math.sqrt(2 / math.pi)):
        for distance in (1, 2, integer_noise._BLOCK, integer_noise._PIECE):
            pairs = count - distance
            product = (signal[:-distance] * signal[distance:]).mean() / signal.var()
            assert abs(product) < STANDARD_ERRORS / math.sqrt(pairs)


# --- use --------------------------------------------------------------------------------------------------------------


def test_threads_dtype_and_shape_do_not_change_the_samples() -> None:
    count = (1 << 20) + 77
    sampler = DiscreteGaussian(1 << 30)
    totals = []
    for dtype, threads, shape in ((torch.int64, 1, (count,)), (torch.int32, 3, (count,)), (torch.int32, 2, (1, count))):
        total = torch.full(shape, 5, dtype=dtype)
        sampler.add_to(total, Seed(bytes(32)), threads)
        totals.append(total.reshape(-1).long())
    assert torch.equal(totals[0], totals[1]) and torch.equal(totals[0], totals[2])
    alone = sampler.sample(Seed(bytes(32)).stream("integer noise", 1), (77,))
    assert torch.equal(totals[0][1 << 20 :], alone + 5)


def test_sums_wrap_in_the_ring_of_the_dtype() -> None:
    total = torch.full((1000,), 2**31 - 1, dtype=torch.int32)
    wide = torch.zeros(1000, dtype=torch.int64)
    sampler = DiscreteGaussian(1 << 20)
    sampler.add_to(total, Seed(bytes(32)))
    sampler.add_to(wide, Seed(bytes(32)))
    assert torch.equal((wide + (2**31 - 1)).to(torch.int32), total)


def test_a_seed_adds_noise_once() -> None:
    seed, total = Seed.from_system(), torch.zeros(10, dtype=torch.int64)
    DiscreteGaussian(1).add_to(total, seed)
    with pytest.raises(SecrecyError, match="used twice"):
        DiscreteGaussian(1).add_to(total, seed)


def test_torch_seed_has_no_influence() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        draws.append(draw(1 << 20, 64))
    assert not np.array_equal(*draws)
    torch.manual_seed(0)
    first = DiscreteGaussian(1 << 20).sample(Seed(bytes(32)).stream("x"), (64,))
    torch.manual_seed(1)
    assert torch.equal(first, DiscreteGaussian(1 << 20).sample(Seed(bytes(32)).stream("x"), (64,)))


def test_empty_shapes() -> None:
    assert DiscreteGaussian(1).sample(Seed.from_system().stream("x"), (0, 3)).shape == (0, 3)
    DiscreteGaussian(1).add_to(torch.zeros(0, dtype=torch.int32), Seed.from_system())


@pytest.mark.parametrize("variance", [0, -1, Fraction(1, 1025), 2.0**81])
def test_variances_out_of_range_are_refused(variance: int | float | Fraction) -> None:
    with pytest.raises(ValueError, match="variance must lie in"):
        DiscreteGaussian(variance)


@pytest.mark.parametrize(
    ("total", "variance"),
    [
        (torch.zeros(4), 1),
        (torch.zeros(4, 4, dtype=torch.int64).T[:2, :], 1),
        (torch.zeros(4, dtype=torch.int32), 1 << 60),
    ],
    ids=["float", "not contiguous", "too narrow"],
)
def test_unsuitable_tensors_are_refused(total: torch.Tensor, variance: int) -> None:
    with pytest.raises(ValueError, match="noise"):
        DiscreteGaussian(variance).add_to(total, Seed.from_system())
