"""Evaluation of a classifier from integer counts, which add up over hospitals: pure, no message and no secret.

A hospital counts its own test records (`evaluate_locally`), the counts become one vector (`encode_evaluation`), and what
the sum of these vectors says about all hospitals together is read from it (`decode_evaluation`): class counts, confusion
matrix, ROC and AUC, calibration, Brier score. No hospital's own number is needed for any of them.

Resolution. Counts are exact. Predicted probabilities enter as histograms of 64 bins and as sums of whole multiples of
2^-10, no finer than the results need: a bin may hold a single patient, whose probability the sum then shows.
- AUC: two scores in one bin count as a tie. That moves it by at most half the share of pairs that meet in a bin
  (`area_resolution`), because scores in different bins keep their order. Bins are even in asinh of the log odds: a seventh of
  a log odds wide near probability 1/2, a seventh of the log odds where a model is sure. So a model that is sure of
  most, as linear layers on good features are, fills as many bins as a model that is sure of nothing. A bin of a single patient
  shows its probability to about 0.03 in the middle, and the logarithm of its odds to a seventh elsewhere.
- Expected calibration error: mean confidences are off by at most 2^-11 (`CALIBRATION_RESOLUTION`), and it with them.
- Brier score of a class: off by at most 2^-11; that of all classes by as much for each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpc_fl.crypto.ring import EXACT_IN_FLOAT64
from mpc_fl.errors import SAME_VERSION, HeadroomError, ProtocolError
from mpc_fl.learning.models.shares import wilson_interval

SCORE_BINS = 64
RELIABILITY_BINS = 10
CALIBRATION_BITS = 10
EVALUATION_CHUNK = 64  # records at a time
CALIBRATION_RESOLUTION = 2.0 ** -(CALIBRATION_BITS + 1)
_UNIT = float(1 << CALIBRATION_BITS)
_LARGEST_LOG_ODDS = 36.0  # above, 1 - p is no float64


@dataclass(frozen=True)
class Evaluation:
    """Counts of one evaluation over `confusion.sum()` records, all int64.

    `confusion` (classes, classes), rows are true classes. `scores` (classes, 2, 64): for each class the histogram of its
    predicted probability among records of other classes (0) and of the class itself (1). `reliability` (3, 10): by the
    predicted class's probability, how many records, how many of them right, and the sum of that probability in units of
    2^-10. `squared_errors` (classes,): sum over records of (probability of the class - [it is the class])^2, in 2^-10.
    """

    confusion: torch.Tensor
    scores: torch.Tensor
    reliability: torch.Tensor
    squared_errors: torch.Tensor

    @property
    def records(self) -> int:
        """Number of evaluated records."""
        return int(self.confusion.sum())

    @property
    def class_counts(self) -> list[int]:
        """Number of records of each true class."""
        return [int(count) for count in self.confusion.sum(dim=1)]

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

    @property
    def areas(self) -> list[float | None]:
        """AUC of each class versus the rest; `None` where one of the two is absent."""
        return [area_under_curve(negative, positive) for negative, positive in self.scores.tolist()]

    @property
    def macro_area(self) -> float | None:
        """Mean of the AUCs that exist."""
        return _mean([area for area in self.areas if area is not None])

    @property
    def macro_area_resolution(self) -> float | None:
        """How far `macro_area` may be from that of the scores themselves."""
        return _mean([bound for bound in self.area_resolutions if bound is not None])

    @property
    def area_resolutions(self) -> list[float | None]:
        """How far each of `areas` may be from that of the scores themselves."""
        return [area_resolution(negative, positive) for negative, positive in self.scores.tolist()]

    @property
    def brier_scores(self) -> list[float]:
        """Each class's part of the Brier score: mean of (probability of the class - [it is the class])^2."""
        return [float(total) / _UNIT / max(1, self.records) for total in self.squared_errors]

    @property
    def brier_score(self) -> float:
        """Brier score over all classes, from 0 to 2 (Brier, Monthly Weather Review 1950)."""
        return sum(self.brier_scores)

    @property
    def reliability_bins(self) -> list[tuple[int, float | None, float | None]]:
        """For each tenth of confidence: records, mean confidence, share that is right; `None` in an empty bin."""
        bins: list[tuple[int, float | None, float | None]] = []
        for count, right, confidence in self.reliability.T.tolist():
            bins.append((count, confidence / _UNIT / count, right / count) if count else (0, None, None))
        return bins

    @property
    def calibration_error(self) -> float:
        """Expected calibration error over the bins (Guo et al., ICML 2017, equation 3)."""
        _, right, confidence = self.reliability.double()
        return float((right - confidence / _UNIT).abs().sum()) / max(1, self.records)

    def confidence_interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson score interval of the accuracy (Wilson, JASA 1927); z = 1.96 for 95 %."""
        return wilson_interval(self.accuracy, max(1, self.records), z)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for metrics files and reports."""
        low, high = self.confidence_interval()
        return {
            "records": self.records,
            "accuracy": round(self.accuracy, 5),
            "accuracy_low": round(low, 5),
            "accuracy_high": round(high, 5),
            "balanced_accuracy": round(self.balanced_accuracy, 5),
            "class_counts": self.class_counts,
            "confusion": self.confusion.tolist(),
            "scores": self.scores.tolist(),
            "auc": [_rounded(area) for area in self.areas],
            "auc_macro": _rounded(self.macro_area),
            "auc_resolution": _rounded(self.macro_area_resolution),
            "brier": round(self.brier_score, 5),
            "brier_by_class": [round(score, 5) for score in self.brier_scores],
            "calibration_error": round(self.calibration_error, 5),
            "reliability": [[count, _rounded(mean), _rounded(right)] for count, mean, right in self.reliability_bins],
            "noise": None,
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def roc_points(negative: Sequence[int], positive: Sequence[int]) -> tuple[list[float], list[float]]:
    """Points of the ROC curve from score histograms (counts per bin, low scores first), from (0, 0) to (1, 1).

    Returns (false positive rates, true positive rates); both empty when one of the groups is empty.
    """
    negatives, positives = sum(negative), sum(positive)
    if not negatives or not positives:
        return [], []
    false_rates, true_rates = [0.0], [0.0]
    false_count = true_count = 0
    for others, own in zip(reversed(negative), reversed(positive), strict=True):
        false_count, true_count = false_count + others, true_count + own
        if others or own:
            false_rates.append(false_count / negatives)
            true_rates.append(true_count / positives)
    return false_rates, true_rates


def area_under_curve(negative: Sequence[int], positive: Sequence[int]) -> float | None:
    """AUC from score histograms, or `None` when one group is empty.

    Two scores in the same bin count as a tie (one half), so the result differs from the AUC of the scores themselves by
    at most `area_resolution`.
    """
    x, y = roc_points(negative, positive)
    if not x:
        return None
    return sum((x[i] - x[i - 1]) * (y[i] + y[i - 1]) / 2 for i in range(1, len(x)))


def area_resolution(negative: Sequence[int], positive: Sequence[int]) -> float | None:
    """Half the share of pairs, one of each group, whose scores fall into one bin; `None` when one group is empty."""
    pairs = sum(negative) * sum(positive)
    if not pairs:
        return None
    return sum(others * own for others, own in zip(negative, positive, strict=True)) / pairs / 2


@functools.lru_cache
def score_edges() -> torch.Tensor:
    """Probabilities between neighbouring bins of scores, increasing, float64 (63,): even steps of asinh(log(p / (1 - p)))."""
    largest = math.asinh(_LARGEST_LOG_ODDS)
    steps = torch.arange(1, SCORE_BINS, dtype=torch.float64) / SCORE_BINS
    return torch.sigmoid(torch.sinh((2 * steps - 1) * largest))


def evaluate_locally(
    probabilities: torch.Tensor, labels: torch.Tensor, decided: torch.Tensor | None = None
) -> Evaluation:
    """Count predictions: float probabilities (records, classes) against int64 labels (records,).

    Give float64 of a model that is sure of much: float32 knows no probability between 1 - 2^-24 and 1. The class `decided` for
    each record, int64 (records,), is by default the most probable one.
    A probability that is not finite counts as 0: a model that diverged is bad, and its counts stay in their range.
    """
    classes = probabilities.shape[1]
    chances = torch.where(torch.isfinite(probabilities), probabilities, 0.0).double().clamp(0.0, 1.0)
    predicted = chances.argmax(dim=1) if decided is None else decided
    confidence = chances.gather(1, predicted.unsqueeze(1)).squeeze(1)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    bins = torch.bucketize(chances, score_edges(), right=True)
    scores = torch.zeros(classes, 2, SCORE_BINS, dtype=torch.int64)
    for label in range(classes):
        for is_class in (0, 1):
            chosen = bins[(labels == label) == bool(is_class), label]
            scores[label, is_class] = torch.bincount(chosen, minlength=SCORE_BINS)
    tenth = (confidence * RELIABILITY_BINS).long().clamp(0, RELIABILITY_BINS - 1)
    reliability = torch.zeros(3, RELIABILITY_BINS, dtype=torch.int64)
    for row, values in enumerate((torch.ones_like(labels), (predicted == labels).long(), _fixed(confidence))):
        reliability[row].index_add_(0, tenth, values)
    errors = chances - torch.nn.functional.one_hot(labels, classes).double()
    return Evaluation(confusion, scores, reliability, _fixed(errors.square()).sum(dim=0))


def _fixed(values: torch.Tensor) -> torch.Tensor:
    """Each value as a whole number of units, so that sums are exact."""
    return (values * _UNIT).round().long()


def evaluation_length(classes: int) -> int:
    """Elements of an encoded evaluation: 9 + 384 + 30 + 3 for three classes."""
    return classes * classes + 2 * classes * SCORE_BINS + 3 * RELIABILITY_BINS + classes


def require_evaluation_headroom(hospitals: int, count_bound: int) -> None:
    """Raise `HeadroomError` where sums over `hospitals` of up to `count_bound` records each could be inexact."""
    if hospitals * count_bound << CALIBRATION_BITS >= EXACT_IN_FLOAT64:
        raise HeadroomError(
            f"evaluation counts of {hospitals} hospitals of {count_bound} records do not fit 53 bits",
            "lower aggregation.count_bound",
        )


def encode_evaluation(evaluation: Evaluation, count_bound: int) -> torch.Tensor:
    """One hospital's summand, int64 (`evaluation_length`,): no element exceeds count_bound * 2^10.

    Raises `HeadroomError` for more than `count_bound` records.
    """
    if evaluation.records > count_bound:
        raise HeadroomError(
            "a hospital has more test records than aggregation.count_bound", "raise aggregation.count_bound"
        )
    parts = (evaluation.confusion, evaluation.scores, evaluation.reliability, evaluation.squared_errors)
    return torch.cat([part.reshape(-1) for part in parts])


def decode_evaluation(total: torch.Tensor, classes: int) -> Evaluation:
    """The opened sum, int64 (`evaluation_length`,). Raises `ProtocolError` for one that no hospitals can have."""
    if total.dtype != torch.int64 or total.shape != (evaluation_length(classes),):
        raise ProtocolError("the opened evaluation has another shape", SAME_VERSION)
    sizes = [classes * classes, 2 * classes * SCORE_BINS, 3 * RELIABILITY_BINS, classes]
    confusion, scores, reliability, squared_errors = total.split(sizes)
    evaluation = Evaluation(
        confusion.reshape(classes, classes),
        scores.reshape(classes, 2, SCORE_BINS),
        reliability.reshape(3, RELIABILITY_BINS),
        squared_errors,
    )
    records, (count, right, _) = evaluation.records, evaluation.reliability
    same = bool((evaluation.scores.sum(dim=(1, 2)) == records).all()) and int(count.sum()) == records
    right_too = int(right.sum()) == int(evaluation.confusion.diagonal().sum()) and bool((right <= count).all())
    if int(total.min()) < 0 or not same or not right_too:
        raise ProtocolError("the opened evaluation contradicts itself", "a hospital does not follow the protocol")
    return evaluation


@torch.no_grad()
def predict(model: nn.Module, inputs: torch.Tensor, chunk: int = EVALUATION_CHUNK) -> torch.Tensor:
    """Logits of a model in evaluation mode, float32 (records, classes)."""
    model.eval()
    pieces = [model(inputs[start : start + chunk]) for start in range(0, len(inputs), chunk)]
    return torch.cat(pieces) if pieces else torch.zeros(0, 1)


@torch.no_grad()
def predict_each(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """`predict`, so that a record's logits are a function of that record alone, bit for bit, whoever else is in the data.

    Kernels round differently by number of rows, place in a batch and alignment: every record goes by itself, in memory of its own.
    """
    return (
        torch.cat([predict(model, record.clone()[None], chunk=1) for record in inputs])
        if len(inputs)
        else predict(model, inputs)
    )
