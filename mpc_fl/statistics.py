"""Secure statistics: evaluation of the global model over all hospitals, from sums of hidden counts.

Each hospital counts on its own test patients; the secure sum of the counts is opened, no hospital's own numbers are.
The opened counts carry no noise: they concern the held-out test patients and are stated in docs/threat-model.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from mpc_fl.opening import SecretDomain, open_to
from mpc_fl.ring import FixedPoint
from mpc_fl.secrecy import Private
from mpc_fl.secure_sum import secure_sum

SCORE_BINS = 50


@dataclass(frozen=True)
class Evaluation:
    """Counts of one evaluation over `confusion.sum()` records.

    `confusion` is int64 (classes, classes), rows are true classes; `scores` is int64 (classes, 2, bins): for each class
    the histogram of its predicted probability among records of other classes (0) and of the class itself (1).
    """

    confusion: torch.Tensor
    scores: torch.Tensor

    @property
    def records(self) -> int:
        """Number of evaluated records."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of records whose predicted class is the true one."""
        return float(self.confusion.diagonal().sum()) / max(1, self.records)

    @property
    def balanced_accuracy(self) -> float:
        """Mean over the classes present of the share predicted right."""
        totals = self.confusion.sum(dim=1)
        present = totals > 0
        return float((self.confusion.diagonal()[present] / totals[present]).mean()) if bool(present.any()) else 0.0

    def confidence_interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson score interval of the accuracy (Wilson, JASA 1927); z = 1.96 for 95 %."""
        n, p = max(1, self.records), self.accuracy
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for metrics files and reports."""
        low, high = self.confidence_interval()
        return {
            "records": self.records,
            "accuracy": round(self.accuracy, 5),
            "accuracy_low": round(low, 5),
            "accuracy_high": round(high, 5),
            "balanced_accuracy": round(self.balanced_accuracy, 5),
            "confusion": self.confusion.tolist(),
            "scores": self.scores.tolist(),
        }


def evaluate_locally(probabilities: torch.Tensor, labels: torch.Tensor) -> Evaluation:
    """Count predictions: float probabilities (records, classes) against int64 labels (records,)."""
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(dim=1)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    bins = (probabilities * SCORE_BINS).long().clamp(0, SCORE_BINS - 1)
    scores = torch.zeros(classes, 2, SCORE_BINS, dtype=torch.int64)
    for label in range(classes):
        for is_class in (0, 1):
            chosen = bins[(labels == label) == bool(is_class), label]
            scores[label, is_class] = torch.bincount(chosen, minlength=SCORE_BINS)
    return Evaluation(confusion, scores)


def secure_evaluation(
    domain: SecretDomain, own: Private[Evaluation] | None, classes: int, count_bound: int, opener: str, why: str
) -> Evaluation | None:
    """Sum all hospitals' evaluations and open the sum to `opener`; parties without patients pass `None`.

    One opening of classes^2 + 2 * classes * bins counts. Raises `HeadroomError` when a count exceeds `count_bound`.
    """
    cells, bins = classes * classes, 2 * classes * SCORE_BINS
    if own is None:
        flat = torch.zeros(cells + bins, dtype=torch.int64)
    else:
        evaluation = own.inside_protocol()
        flat = torch.cat([evaluation.confusion.reshape(-1), evaluation.scores.reshape(-1)])
    encoded = FixedPoint(0, float(count_bound)).encode(flat.double(), "an evaluation count")
    shared = secure_sum(domain, Private("evaluation counts", encoded), 0, "sum of evaluation counts")
    opened = open_to(domain, shared, [opener], why)
    if opened is None:
        return None
    counts = opened.long()
    return Evaluation(counts[:cells].reshape(classes, classes), counts[cells:].reshape(classes, 2, SCORE_BINS))
