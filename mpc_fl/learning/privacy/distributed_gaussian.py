"""The distributed Gaussian mechanism: noise in parts, so that only a noised sum over all hospitals is ever opened.

Each step, hospital i of n (Kairouz, Liu, Steinke, ICML 2021, with another rounding and another noise analysis):
  1. samples its patients, each with the public probability q
  2. `add_patients`: clips every patient's gradient, rounds it to the grid, and adds up whole numbers
  3. `noised_share`: adds integer noise of variance v = sigma^2 / (n - t)
  4. shares the result; the sum over all hospitals is opened, and `mean_gradient` decodes it

Any t of them may pool what they know with the aggregator: they subtract their own noise, sigma^2 remains, and t = 1 is
needed already against a single curious hospital, which knows its own noise.

Sensitivity. What is rounded is the gradient of one patient, by itself, after clipping, to the nearest whole number of
grid units. It then has an L2 norm of at most s C + sqrt(P) / 2 <= B with the scale s = (B - sqrt(P) / 2) / C. As the sum
of a hospital consists of whole numbers and is exact, adding or removing one patient moves it by exactly that patient's
rounded gradient: the L2 sensitivity is B. To round the sum of a hospital instead would move it by up to s C + sqrt(P),
besides what the order of floating-point additions does to the other patients' digits (Casacuberta et al., CCS 2022),
which no formula covers. For that a patient's gradient must come out the same, bit for bit, whoever else is drawn:
`per_sample_gradients.rounded_sum` sees to it. Conditional random rounding (Kairouz et al., section 4) has a smaller
bound for coarse grids; here B >= 50 sqrt(P), so it could win less than 1 %, for one random number per patient and
parameter. Norms are taken in float64, with a relative error below 2^-20 for up to 2^30 parameters, and the scale leaves
room for that.

Noise. Let sigma^2 = (z B)^2 + 5. By the lemma of `discrete_gaussian`, the sum of n - t shares has the law N_Z(0, sigma^2) up to
2^-140 per share (v >= 10, so g >= 5). The same lemma with an integral for one sum (Peikert, CRYPTO 2010) shows that
N_Z(x, sigma^2), x whole, is up to 2^-140 what comes of the Gaussian mechanism, N(x, (z B)^2), when its output is rounded
at random to a whole number (a discrete Gaussian of parameter 5 around it), which costs no privacy. So per step the
opened sum is, up to `total_variation`, a function of a Gaussian release of sensitivity B and noise multiplier z: every
accountant of the subsampled Gaussian applies as it is. For integer orders the Renyi divergences are even equal (Canonne,
Kamath, Steinke, NeurIPS 2020), so nothing is given away. `event` is what a hospital enters into its ledger.

Headroom. A hospital has at most m patients in a step (`patients_bound`) and a coordinate of a rounded gradient is at most
B; the sampler never exceeds its `largest`, M. So n (m B + M) < 2^(k-1) proves that the sum cannot wrap in Z_2^k. More than m
patients are drawn with probability below 2^-128, whatever their data; the step is then refused.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Literal

import torch

from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, HeadroomError, PrivacyBudgetError, ProtocolError
from mpc_fl.learning.privacy import discrete_gaussian as integer_noise
from mpc_fl.learning.privacy.accounting import LARGEST_NOISE_MULTIPLIER, SubsampledGaussian
from mpc_fl.learning.privacy.discrete_gaussian import SMOOTHING, DiscreteGaussian, smoothing_distance

REFUSAL_BITS = 128
_FLOAT_MARGIN = 2.0**-20
_FINE_GRID = 512  # B / sqrt(P) from which the grid costs less than 0.1 % of noise
_COARSE_GRID = 50  # below, it would cost more than 1 %
_LARGEST_PARAMETERS, _LARGEST_PATIENTS = 1 << 30, 1 << 24  # so m B < 2^53: exact in float64
_BLOCK = 1 << 18  # gradient elements rounded at a time
_NORM_BLOCK = 1 << 16  # squares added up at a time, in each row


@functools.lru_cache
def patients_bound(expected_patients: int) -> int:
    """The smallest m for which a hospital's Poisson sample of at most this expectation exceeds m with probability < 2^-128.

    Chernoff: P[more than m] <= exp(-(m log(m / e) - (m - e))) for a sum of independent indicators of expectation <= e < m.
    """
    bound = expected_patients + 1
    while bound * math.log(bound / expected_patients) - (bound - expected_patients) < REFUSAL_BITS * math.log(2):
        bound += 1
    return bound


def step_total_variation(parameters: int, hospitals: int, colluders: int) -> float:
    """How far one step is from a Gaussian release in total variation.

    Noise, its rounding, the refusal of step 2, and the bit that a check of the summand's norm opens: it is constant but for
    two tails of 2^-128 (`aggregation.norm_bound`), counted whether or not there is a check.
    """
    per_share = integer_noise.TOTAL_VARIATION + smoothing_distance(SMOOTHING)
    per_coordinate = (hospitals - colluders) * per_share + smoothing_distance(SMOOTHING)
    return parameters * per_coordinate + 3 * 2.0**-REFUSAL_BITS


@dataclass(frozen=True)
class MechanismTerms:
    """What is agreed of a mechanism before its grid and its ring are chosen.

    `parameters` P, `hospitals` n, `colluders` t < n, `expected_patients` per hospital and step (a public upper bound),
    clipping norm C, noise multiplier z (against the t). `divisor`: what a mean divides by for each hospital, public too;
    None for `expected_patients`.
    """

    parameters: int
    hospitals: int
    colluders: int
    expected_patients: int
    clipping_norm: float
    noise_multiplier: float
    divisor: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class DistributedGaussian(MechanismTerms):
    """Public constants of one federation's mechanism, equal at all its parties; `plan_mechanism` chooses `sensitivity`.

    Besides the terms: ring Z_2^k with k = `ring_bits`, L2 sensitivity B in grid units.
    """

    ring_bits: Literal[32, 64]
    sensitivity: int

    @property
    def patients_bound(self) -> int:
        """Most patients of one hospital in one step, m."""
        return patients_bound(self.expected_patients)

    @property
    def dtype(self) -> torch.dtype:
        """The ring's integers."""
        return torch.int32 if self.ring_bits == 32 else torch.int64

    @property
    def scale(self) -> float:
        """Grid units per unit of gradient, s."""
        return (self.sensitivity - math.sqrt(self.parameters) / 2) * (1 - _FLOAT_MARGIN) / self.clipping_norm

    @property
    def noise_share(self) -> DiscreteGaussian:
        """The noise of one hospital, N_Z(0, sigma^2 / (n - t)), in grid units."""
        deviation = Fraction(self.noise_multiplier) * self.sensitivity
        return DiscreteGaussian((deviation**2 + SMOOTHING) / (self.hospitals - self.colluders))

    @property
    def largest_sum(self) -> int:
        """Largest possible magnitude of an opened coordinate, n (m B + M)."""
        return self.hospitals * (self.patients_bound * self.sensitivity + self.noise_share.largest)

    def event(self, sample_rate: float, steps: int) -> SubsampledGaussian:
        """What `steps` steps cost a patient who is drawn with probability `sample_rate` in each."""
        distance = step_total_variation(self.parameters, self.hospitals, self.colluders)
        return SubsampledGaussian(self.noise_multiplier, sample_rate, steps, distance)


def _require_possible(terms: MechanismTerms) -> None:
    if not 0 <= terms.colluders < terms.hospitals:
        raise PrivacyBudgetError(
            f"a collusion bound of {terms.colluders} among {terms.hospitals} hospitals leaves nobody to add noise",
            "set it to at most the number of hospitals less one",
        )
    noise, norm = terms.noise_multiplier, terms.clipping_norm
    if not 1 / LARGEST_NOISE_MULTIPLIER <= noise <= LARGEST_NOISE_MULTIPLIER:
        raise PrivacyBudgetError(f"a noise multiplier must lie between 0.001 and 1000, not at {noise!r}")
    if not (math.isfinite(norm) and norm > 0):
        raise PrivacyBudgetError(f"a clipping norm must be a positive number, not {norm!r}")
    parameters, patients = terms.parameters, terms.expected_patients
    if not (1 <= parameters <= _LARGEST_PARAMETERS and 1 <= patients <= _LARGEST_PATIENTS):
        raise HeadroomError(f"no mechanism for {parameters} parameters and {patients} patients in a step")


def plan_mechanism(terms: MechanismTerms, ring_bits: Literal[32, 64] = 32) -> DistributedGaussian:
    """The mechanism with the finest useful grid for which headroom is proven: B is a power of two.

    Raises `HeadroomError` if the ring has room only for a grid that costs more than 1 % of noise,
    `PrivacyBudgetError` for a collusion bound or noise multiplier that cannot be.
    """
    _require_possible(terms)

    # 1. The coarsest grid that rounds well enough, and on which a share of the noise has a variance of at least 2 g.
    def least_bits(grid: int) -> int:
        smooth = math.sqrt(2 * SMOOTHING * (terms.hospitals - terms.colluders)) / terms.noise_multiplier
        return max(0, math.ceil(math.log2(max(grid * math.sqrt(terms.parameters), smooth))))

    # 2. The finest grid with headroom.
    for bits in range(least_bits(_FINE_GRID), least_bits(_COARSE_GRID) - 1, -1):
        if bits < ring_bits - 1:
            mechanism = DistributedGaussian(**asdict(terms), ring_bits=ring_bits, sensitivity=1 << bits)
            if mechanism.largest_sum < 1 << (ring_bits - 1):
                return mechanism
    raise HeadroomError(
        f"noised sums of {terms.parameters} parameters over {terms.hospitals} hospitals do not fit a ring of {ring_bits} "
        f"bits: noise multiplier {terms.noise_multiplier:g}, up to {patients_bound(terms.expected_patients)} patients of "
        "each in a step",
        "lower training.batch_size, or use a ring of 64 bits" if ring_bits == 32 else "lower training.batch_size",
    )


def require_patients(mechanism: DistributedGaussian, count: int, who: str) -> None:
    """Raise `HeadroomError` if more patients were drawn than a step has room for (probability below 2^-128)."""
    if count > mechanism.patients_bound:
        raise HeadroomError(f"{who} drew more patients than a step has room for", "check privacy.largest_hospital")


def add_patients(
    mechanism: DistributedGaussian, total: torch.Tensor, gradients: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Clip each patient's gradient to norm C, round it to the grid, and add it to `total` in place, exactly.

    `total` has the mechanism's dtype, shape (P,), zero before the first patient; totals over different patients may be
    added up. `gradients` float32 (rows, ...) per parameter, a row per patient, together P elements a row. Returns norms
    before clipping, float64 (rows,), the hospital's own. A gradient that is not finite counts as zero: otherwise one
    patient could spoil the sum. Raises `ValueError` for other shapes or dtypes.

    What a row adds depends on that row alone, bit for bit: all but the norm is computed element by element, and squares are
    added in pairs, element by element too. A sum over a dimension would be ordered by the number of rows, their place
    in memory and the number of threads. The rows themselves are the caller's matter (`per_sample_gradients.rounded_sum`).
    """
    rows = [gradient.detach().reshape(len(gradient), math.prod(gradient.shape[1:])) for gradient in gradients]
    sizes = [row.shape[1] for row in rows]
    if total.dtype != mechanism.dtype or total.shape != (mechanism.parameters,) or sum(sizes) != len(total):
        raise ValueError(f"totals are {mechanism.dtype} of {mechanism.parameters} elements, as gradients are")
    if any(row.dtype != torch.float32 for row in rows):
        raise ValueError("gradients are float32: their squares are then exact in float64")
    width = max(1, _BLOCK // max(1, len(rows[0])))

    # 1. Norms. A float32 squared is exact in float64, and no sum of squares overflows.
    norms = _sums_of_squares(rows).sqrt()
    finite = torch.isfinite(norms)
    factors = mechanism.scale * (mechanism.clipping_norm / norms).clamp(max=1.0)
    if not bool(finite.all()):
        factors, rows = factors[finite], [row[finite] for row in rows]

    # 2. Round and add. Whole numbers of sums below 2^53 add up exactly in float64, in any order.
    for row, part in zip(rows, total.split(sizes), strict=True):
        for block, place in zip(row.split(width, dim=1), part.split(width), strict=True):
            place += block.double().mul_(factors.unsqueeze(1)).round_().sum(dim=0).to(total.dtype)
    return norms


def _sums_of_squares(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of each row of several tensors together, float64 (rows,): added element by element, in an order that the tensors' numbers
    of columns alone decide."""
    total, waiting, columns = torch.zeros(len(rows[0]), dtype=torch.float64), list[torch.Tensor](), 0
    for block in itertools.chain.from_iterable(row.split(_NORM_BLOCK, dim=1) for row in rows):
        if waiting and columns + block.shape[1] > _NORM_BLOCK:
            total += _added_in_pairs(torch.cat(waiting, dim=1))
            waiting, columns = [], 0
        waiting.append(block.double().square_())
        columns += block.shape[1]
    return total + _added_in_pairs(torch.cat(waiting, dim=1))


def _added_in_pairs(squares: torch.Tensor) -> torch.Tensor:
    """Sums of the rows of (rows, columns), which it overwrites."""
    if not squares.shape[1]:
        return squares.sum(dim=1)
    while (columns := squares.shape[1]) > 1:
        half = (columns + 1) // 2
        squares[:, : columns - half] += squares[:, half:]
        squares = squares[:, :half]
    return squares[:, 0]


def noised_share(
    mechanism: DistributedGaussian, total: Private[torch.Tensor], seed: Seed, threads: int = 1
) -> Private[torch.Tensor]:
    """One hospital's summand: its clipped, rounded, exact sum (P,) plus its part of the noise, of the mechanism's dtype.

    `seed` must be fresh for every attempt at every step: `noise_seed.derive("distributed noise", round, step, attempt)`.
    Raises `HeadroomError`, with nothing drawn, if the sum exceeds its bound; `SecrecyError` if the seed was used before.
    """
    exact = total.inside_protocol()
    if exact.dtype != mechanism.dtype or exact.shape != (mechanism.parameters,):
        raise ValueError(f"totals are {mechanism.dtype} of {mechanism.parameters} elements")
    bound = mechanism.patients_bound * mechanism.sensitivity
    if int(exact.max()) > bound or int(exact.min()) < -bound:
        raise HeadroomError(f"{total.label} exceeds the bound of the ring", "add up each patient once")
    noised = exact.clone()
    mechanism.noise_share.add_to(noised, seed, threads)
    return Private(f"noised {total.label}", noised)


def mean_gradient(mechanism: DistributedGaussian, opened: torch.Tensor) -> torch.Tensor:
    """The opened sum (integers, shape (P,)) over s and the public divisor of all hospitals, float64 (P,).

    Raises `ProtocolError` for a sum that no run of the protocol can have.
    """
    if opened.shape != (mechanism.parameters,) or opened.dtype not in (torch.int32, torch.int64):
        raise ProtocolError("the opened sum of gradients has another shape or type", SAME_VERSION)
    if max(int(opened.max()), -int(opened.min())) > mechanism.largest_sum:
        raise ProtocolError("the opened sum of gradients exceeds its bound", "a hospital does not follow the protocol")
    divisor = mechanism.expected_patients if mechanism.divisor is None else mechanism.divisor
    return opened.double() / (mechanism.scale * mechanism.hospitals * divisor)
