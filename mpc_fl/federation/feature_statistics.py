"""Mean and standard deviation of the inputs over the training patients of all hospitals, from one hidden sum.

Protocol, hospital i of n, once before the first round; d channels of images or features of tables, k classes:
  1. each patient becomes one vector of k + 2d numbers (`patient_vectors`): half its class as a unit vector, then
     for each feature c = mean over its pixels and records of u - 1/2, and 2 (mean of (u - 1/2)^2 - 1/8), where
     u in [0, 1] is the input clipped to its public bounds
  2. the vectors are rounded to a grid and added up exactly; with differential privacy integer noise is added
     (`encode_features`, by `distributed_gaussian`), after the hospital has charged `FeaturePlan.event` to its ledger
  3. secure sum in Z_2^64, opened to the aggregator alone
  4. counts, means and standard deviations are read from the sum (`decode_features`) and sent to all hospitals, which
     normalise their inputs (`Normalisation.apply`)

Where records are features of images (`data.features`), which have norm 1 and positions rather than a scale, the mean alone is
measured: a patient's vector is a tenth of its class and half the mean of its records' features, k + d numbers of norm at most
S = sqrt(0.26). The mean is taken off every record's features, which are then brought to norm 1 again. It is worth one to three
points of accuracy, for a tenth of the budget (docs/results.md).

Privacy. Unit: one patient, all its records together; a patient has one vector however many records it has. Its norm is at
most S = sqrt(1/4 + d/4 + d/16), and clipping enforces it, so the whole vector is one release of the Gaussian
mechanism without sampling, with sensitivity and rounding as `distributed_gaussian` proves them. The class counts and
the number of patients are in it, under the same noise. The parts of any `quorum` - `colluders` hospitals add up to the
noise that is charged: hospitals that may be missing are taken for colluders, whose noise is not there either. With
mechanism `local` each hospital adds all of it. What is computed from the sum costs nothing more.

The factors 1/2 and 2 share the noise out: an error of the count is multiplied by a mean of at most 1/2, and squares vary
four times less than values. Centring at 1/2 and 1/8 halves the norm against that of (1, u, u^2).

Headroom: n (m B + M) < 2^53 in the notation of `distributed_gaussian`, m the largest number of patients of a hospital:
the sum wraps nowhere in Z_2^64 and is exact in float64, through which openings are decoded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from mpc_fl.config.config import Config
from mpc_fl.crypto.ring import EXACT_IN_FLOAT64
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, HeadroomError, PrivacyBudgetError, ProtocolError
from mpc_fl.learning.data.dataset import PatientRecords
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.privacy.accounting import SubsampledGaussian
from mpc_fl.learning.privacy.distributed_gaussian import (
    DistributedGaussian,
    MechanismTerms,
    add_patients,
    noised_share,
    plan_mechanism,
)

_COUNT_WEIGHT, _SQUARE_WEIGHT = 0.5, 2.0
_MEAN_WEIGHT, _COUNT_WEIGHT_BESIDE_MEANS = 0.5, 0.1  # of features of images, whose norm is 1
_VALUE_CENTRE, _SQUARE_CENTRE = 0.5, 0.125
_FINEST_GRID_BITS = 24  # an error of a mean below 2^-24 of the range
_LEAST_DEVIATION = 1 / 64  # of the range: less would only magnify noise
_TABLE_BOUND = 2.0  # of features with reference ranges, see `tables.scale_features`


@dataclass(frozen=True)
class FeatureStatistics:
    """What all parties learn: patients of each class over all hospitals (noised, so not whole), and the normalisation.

    `mean_error` is the standard deviation that the noise alone gives each mean, in units of the inputs; 0 without noise.
    """

    class_counts: tuple[float, ...]
    normalisation: Normalisation
    mean_error: float

    @property
    def patients(self) -> float:
        """Number of patients of all hospitals, noised."""
        return sum(self.class_counts)


@dataclass(frozen=True)
class FeaturePlan:
    """Public constants of one run's feature sums, equal at all parties. `low` and `high` bound every input.

    `mean_alone`: records are features of images, `features` numbers and a constant that takes no part.
    """

    classes: int
    features: int
    low: float
    high: float
    private: bool
    mechanism: DistributedGaussian
    mean_alone: bool = False

    @property
    def length(self) -> int:
        """Elements of the sum."""
        return self.classes + (1 if self.mean_alone else 2) * self.features

    @property
    def count_weight(self) -> float:
        """What a patient's class stands for in its vector."""
        return _COUNT_WEIGHT_BESIDE_MEANS if self.mean_alone else _COUNT_WEIGHT

    @property
    def constants(self) -> int:
        """Numbers of one record that have a mean and a deviation."""
        return self.features + int(self.mean_alone)

    def event(self) -> SubsampledGaussian | None:
        """What the opening costs every patient; `None` without differential privacy."""
        return self.mechanism.event(1.0, 1) if self.private else None


def vector_norm(features: int) -> float:
    """Largest L2 norm of a patient's vector, S."""
    return math.sqrt(_COUNT_WEIGHT**2 + features * _VALUE_CENTRE**2 + features * (_SQUARE_WEIGHT * _SQUARE_CENTRE) ** 2)


def plan_features(config: Config, quorum: int | None = None) -> FeaturePlan:
    """The plan of a run, from public values alone, with its headroom proven.

    `quorum`: how many hospitals must take part for the sum to be opened, `federation.quorum` by default. A hospital has at most
    `aggregation.count_bound` patients. Raises `HeadroomError` when no grid fits, `PrivacyBudgetError` for a quorum
    that colluders alone could make up.
    """
    hospitals, kind = config.federation.hospitals, config.privacy.mechanism
    quorum = config.federation.quorum_size if quorum is None else quorum
    if not 1 <= quorum <= hospitals:
        raise PrivacyBudgetError(f"a quorum of {quorum} among {hospitals} hospitals cannot be", "correct the quorum")
    mean_alone, classes = config.data.features is not None, len(config.data.classes)
    features = config.data.input_shape[0] - int(mean_alone)
    norm = math.hypot(_COUNT_WEIGHT_BESIDE_MEANS, _MEAN_WEIGHT) if mean_alone else vector_norm(features)
    terms = MechanismTerms(
        parameters=classes + (1 if mean_alone else 2) * features,
        hospitals=hospitals,
        colluders=config.absent_noise(quorum),
        expected_patients=config.aggregation.count_bound,
        clipping_norm=norm,
        noise_multiplier=1.0 if kind == "none" else config.data.normalise_noise_multiplier,
    )
    coarse = plan_mechanism(terms, ring_bits=64)
    low, high = (-_TABLE_BOUND, _TABLE_BOUND) if config.data.is_table else (0.0, 1.0)
    low, high = (-1.0, 1.0) if mean_alone else (low, high)
    # A finer grid than gradients need costs nothing in a ring of 64 bits.
    for bits in range(_FINEST_GRID_BITS, coarse.sensitivity.bit_length() - 2, -1):
        mechanism = replace(coarse, sensitivity=1 << bits)
        if mechanism.largest_sum < EXACT_IN_FLOAT64:
            return FeaturePlan(classes, features, low, high, kind != "none", mechanism, mean_alone)
    raise HeadroomError(
        f"feature sums of {hospitals} hospitals of {config.aggregation.count_bound} patients do not fit 53 bits",
        "lower aggregation.count_bound or data.normalise_noise_multiplier",
    )


def patient_vectors(plan: FeaturePlan, data: PatientRecords) -> torch.Tensor:
    """One row per patient, float32 (patients, k + 2d), or (patients, k + d) of the mean alone.

    Inputs beyond the bounds are clipped to them, NaN to the lower one.

    A patient's records count as one: their values, squares and classes are averaged.
    """
    vectors = torch.empty(len(data.records_of_patient), plan.length)
    for row, records in enumerate(data.records_of_patient):
        inputs = data.inputs[records].double().reshape(len(records), plan.constants, -1)[:, : plan.features]
        inputs = torch.where(torch.isnan(inputs), plan.low, inputs).clamp(plan.low, plan.high)
        classes = torch.nn.functional.one_hot(data.labels[records], plan.classes).double().mean(dim=0)
        if plan.mean_alone:
            vectors[row] = torch.cat((plan.count_weight * classes, _MEAN_WEIGHT * inputs.mean(dim=(0, 2)))).float()
            continue
        values = (inputs - plan.low) / (plan.high - plan.low) - _VALUE_CENTRE
        squares = values.square().mean(dim=(0, 2)) - _SQUARE_CENTRE
        parts = (plan.count_weight * classes, values.mean(dim=(0, 2)), _SQUARE_WEIGHT * squares)
        vectors[row] = torch.cat(parts).float()
    return vectors


def encode_features(plan: FeaturePlan, data: PatientRecords, seed: Seed, threads: int = 1) -> Private[torch.Tensor]:
    """Steps 1 and 2: one hospital's summand with its part of the noise, int64 (k + 2d,) or (k + d,).

    `seed` must be fresh for every attempt, also where the plan has no noise. The caller has charged `plan.event` before.
    Raises `HeadroomError` for more patients than the plan has room for.
    """
    total = torch.zeros(plan.length, dtype=torch.int64)
    if len(data.records_of_patient) > plan.mechanism.patients_bound:
        raise HeadroomError("a hospital has more patients than aggregation.count_bound", "raise that bound")
    vectors = patient_vectors(plan, data)
    add_patients(plan.mechanism, total, [vectors])
    exact = Private("feature sums", total)
    return noised_share(plan.mechanism, exact, seed, threads) if plan.private else exact


def decode_features(plan: FeaturePlan, total: torch.Tensor) -> FeatureStatistics:
    """Step 4, from the opened sum, int64 (k + 2d,) or (k + d,).

    Means lie within the bounds, deviations between 1/64 and 1/2 of the range, whatever the noise. Raises `ProtocolError`
    for a sum that no run of the protocol can have, `PrivacyBudgetError` when noise exceeds the number of patients.
    """
    if total.dtype != torch.int64 or total.shape != (plan.length,):
        raise ProtocolError("the opened feature sum has another shape", SAME_VERSION)
    if max(int(total.max()), -int(total.min())) > plan.mechanism.largest_sum:
        raise ProtocolError("the opened feature sum exceeds its bound", "a hospital does not follow the protocol")
    sums = total.double() / plan.mechanism.scale
    counts = sums[: plan.classes] / plan.count_weight
    patients, noise = float(counts.sum()), _noise_of_sums(plan)
    require_enough_patients(plan, patients)
    if plan.mean_alone:
        centre = (sums[plan.classes :] / _MEAN_WEIGHT / patients).clamp(plan.low, plan.high)
        normalisation = Normalisation((*centre.tolist(), 0.0), (1.0,) * plan.constants, to_norm_1=True)
        return FeatureStatistics(tuple(counts.tolist()), normalisation, noise / _MEAN_WEIGHT / patients)
    values, squares = sums[plan.classes :].split(plan.features)
    means = (values / patients).clamp(-_VALUE_CENTRE, _VALUE_CENTRE)
    variances = squares / _SQUARE_WEIGHT / patients + _SQUARE_CENTRE - means.square()
    deviations = variances.clamp(min=_LEAST_DEVIATION**2, max=_VALUE_CENTRE**2).sqrt()
    width = plan.high - plan.low
    mean = tuple((plan.low + width * (means + _VALUE_CENTRE)).tolist())
    normalisation = Normalisation(mean, tuple((width * deviations).tolist()))
    return FeatureStatistics(tuple(counts.tolist()), normalisation, width * noise / patients)


def require_enough_patients(plan: FeaturePlan, patients: float, before: bool = False) -> None:
    """Raise `PrivacyBudgetError` where the opened number of training patients of all hospitals does not stand out of its noise:
    the means would be noise as well. `before` the sum, for their true number: where that may come of it (3 sigma)."""
    noise = _noise_of_sums(plan) * math.sqrt(plan.classes) / plan.count_weight
    least = max(1.0, (7 if before else 4) * noise)
    if patients < least:
        raise PrivacyBudgetError(
            f"the noise of the feature sums exceeds the number of patients: {least:.0f} training patients are needed for "
            "data.normalise_noise_multiplier as it is",
            "lower it, which costs privacy, or set data.normalise to none",
        )


def _noise_of_sums(plan: FeaturePlan) -> float:
    """Standard deviation of the noise in each element of the opened sum when all hospitals take part, in vector units."""
    if not plan.private:
        return 0.0
    share = float(plan.mechanism.noise_share.variance)
    return math.sqrt(plan.mechanism.hospitals * share) / plan.mechanism.scale
