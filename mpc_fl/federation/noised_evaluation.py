"""The confusion matrix of all hospitals' test or validation patients with noise that is charged: what
`evaluation.noise_multiplier` opens.

Protocol, hospital i of n, after a round whose evaluation is due; k classes:
  1. each of these patients becomes one vector of k^2 numbers, the mean of its records' unit vectors: true class and predicted
     class (`patient_vectors`). Its L2 norm is at most 1, however many records the patient has
  2. the hospital charges `EvaluationPlan.event` to its privacy ledger
  3. the vectors are rounded to a grid and added up exactly, integer noise is added (`encode_confusion`, by
     `distributed_gaussian`), and the sum is masked and opened to the aggregator alone (`quorum_sum`)
  4. accuracy and confusion matrix are read from the sum (`decode_confusion`): post-processing, which costs nothing

Privacy. Unit: one patient, all its records together, added or removed. One release of the Gaussian mechanism without
sampling; sensitivity and rounding as `distributed_gaussian` proves them. With mechanism `local` each hospital adds all
of the noise. With `distributed` the parts of any quorum - `colluders` hospitals add up to what is charged: hospitals that
may be missing are taken for colluders, so the sum may be opened over any quorum, unlike exact counts.
The charge goes to the ledger that training is charged to. A patient of a hospital either trains, validates or tests there, so
nobody spends two of them at one hospital; that the largest would do is not used: it would rest on the split of the data.

Nothing else of an evaluation is opened: histograms of probabilities, as exact evaluation has them, would move by more per
patient, and noise would leave little of them.

Headroom: as `distributed_gaussian` in Z_2^64, with `aggregation.count_bound` test patients of each hospital; the sum is
below 2^53 and so exact in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from mpc_fl.config.config import Config
from mpc_fl.config.evaluation import Evaluated
from mpc_fl.crypto.ring import EXACT_IN_FLOAT64
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, HeadroomError, ProtocolError
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.models.shares import noised_interval
from mpc_fl.learning.privacy.accounting import SubsampledGaussian
from mpc_fl.learning.privacy.distributed_gaussian import (
    DistributedGaussian,
    MechanismTerms,
    add_patients,
    noised_share,
    plan_mechanism,
)


@dataclass(frozen=True)
class EvaluationPlan:
    """Public constants of one run's noised evaluation, equal at all parties."""

    classes: int
    mechanism: DistributedGaussian

    @property
    def length(self) -> int:
        """Elements of the sum."""
        return self.classes**2

    def event(self, times: int) -> SubsampledGaussian:
        """What `times` evaluations cost every patient."""
        return self.mechanism.event(1.0, times)


@dataclass(frozen=True)
class NoisedEvaluation:
    """What the opened sum says: `counts` float64 (classes, classes) in patients, rows are true classes, each with noise of
    standard deviation `deviation`. Counts may be below 0; nothing but they were opened."""

    counts: torch.Tensor
    deviation: float

    @property
    def patients(self) -> float:
        """Number of patients of all hospitals, noised, at least 1."""
        return max(1.0, float(self.counts.sum()))

    @property
    def accuracy(self) -> float:
        """Share of patients whose predicted class is the true one."""
        return min(1.0, max(0.0, float(self.counts.diagonal().sum()) / self.patients))

    @property
    def balanced_accuracy(self) -> float:
        """Mean over classes of the share predicted right, of classes that noise leaves visible."""
        totals = self.counts.sum(dim=1)
        seen = totals > self.deviation * math.sqrt(len(self.counts))
        shares = (self.counts.diagonal()[seen] / totals[seen]).clamp(0.0, 1.0)
        return float(shares.mean()) if bool(seen.any()) else 0.0

    def confidence_interval(self) -> tuple[float, float]:
        """About 95 %: what sampling of patients and noise of counts add to each other as variances."""
        classes = len(self.counts)
        return noised_interval(self.accuracy, self.patients, self.deviation, (classes, classes * (classes - 1)))

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for metrics files and reports; counts rounded, none below 0."""
        low, high = self.confidence_interval()
        shown = self.counts.round().clamp(min=0).long()
        return {
            "records": round(self.patients),
            "accuracy": round(self.accuracy, 5),
            "accuracy_low": round(low, 5),
            "accuracy_high": round(high, 5),
            "balanced_accuracy": round(self.balanced_accuracy, 5),
            "class_counts": shown.sum(dim=1).tolist(),
            "confusion": shown.tolist(),
            "noise": round(self.deviation, 5),
        }


def plan_noised_evaluation(config: Config, whom: Evaluated = "test") -> EvaluationPlan | None:
    """The plan of a run, from public values alone; `None` where evaluation is exact. Raises `HeadroomError`."""
    noise, hospitals, classes = (
        config.evaluation_noise(whom),
        config.federation.hospitals,
        len(config.data.classes),
    )
    if noise is None:
        return None
    terms = MechanismTerms(classes**2, hospitals, config.absent_noise(), config.aggregation.count_bound, 1.0, noise)
    mechanism = plan_mechanism(terms, ring_bits=64)
    if mechanism.largest_sum >= EXACT_IN_FLOAT64:
        raise HeadroomError("noised evaluation counts do not fit 53 bits", "lower aggregation.count_bound")
    return EvaluationPlan(classes, mechanism)


def patient_vectors(plan: EvaluationPlan, patients: Dataset, predicted: torch.Tensor) -> torch.Tensor:
    """One row per patient, float32 (patients, k^2), from the predicted class of each record, int64 (records,)."""
    cells = torch.nn.functional.one_hot(patients.labels * plan.classes + predicted, plan.length).float()
    if not len(patients):
        return cells
    return torch.stack([cells[records].mean(dim=0) for records in patients.records_of_patient])


def encode_confusion(
    plan: EvaluationPlan, patients: Dataset, predicted: torch.Tensor, seed: Seed, threads: int = 1
) -> Private[torch.Tensor]:
    """Step 3 at a hospital: its summand with its part of the noise, int64 (k^2,). `plan.event(1)` is charged before.

    `seed` must be fresh for every attempt. Raises `HeadroomError` for more patients than `aggregation.count_bound`.
    """
    if len(patients.records_of_patient) > plan.mechanism.expected_patients:
        raise HeadroomError(
            "a hospital has more patients to evaluate on than aggregation.count_bound", "raise that bound"
        )
    total = torch.zeros(plan.length, dtype=torch.int64)
    add_patients(plan.mechanism, total, [patient_vectors(plan, patients, predicted)])
    return noised_share(plan.mechanism, Private("confusion matrix", total), seed, threads)


def decode_confusion(plan: EvaluationPlan, total: torch.Tensor, hospitals: int) -> NoisedEvaluation:
    """Step 4, from the sum opened over so many hospitals, int64 (k^2,). Raises `ProtocolError` for one that cannot be."""
    if total.dtype != torch.int64 or total.shape != (plan.length,):
        raise ProtocolError("the opened evaluation has another shape", SAME_VERSION)
    if max(int(total.max()), -int(total.min())) > plan.mechanism.largest_sum:
        raise ProtocolError("the opened evaluation exceeds its bound", "a hospital does not follow the protocol")
    counts = (total.double() / plan.mechanism.scale).reshape(plan.classes, plan.classes)
    deviation = math.sqrt(hospitals * float(plan.mechanism.noise_share.variance)) / plan.mechanism.scale
    return NoisedEvaluation(counts, deviation)
