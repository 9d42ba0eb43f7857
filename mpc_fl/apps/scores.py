"""An evaluation as it stands in files of a run. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scores:
    """An evaluation of a classifier on the test records of all hospitals, as `Evaluation.to_json` writes it.

    `confusion` (classes, classes) counts, rows are true classes. `scores` (classes, 2, bins): histograms of each class's
    predicted probability among other records and its own. `reliability`: records, mean confidence, share right by bin.

    With `noise`, the standard deviation of each of its counts, it has neither: patients were counted, not records, and the
    confusion matrix alone was opened.
    """

    records: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    balanced_accuracy: float
    class_counts: list[int] | None = None
    confusion: list[list[int]]
    scores: list[list[list[int]]] | None = None
    auc: list[float | None] | None = None
    auc_macro: float | None = None
    auc_resolution: float | None = None
    brier: float | None = None
    brier_by_class: list[float] | None = None
    calibration_error: float | None = None
    reliability: list[tuple[int, float | None, float | None]] | None = None
    noise: float | None = None

    @property
    def baseline(self) -> float:
        """Accuracy of always naming the class that most records have, in [1 / classes, 1]; noise of the counts does not lower it
        below what it can be."""
        return min(1.0, max(1 / len(self.confusion), max(map(sum, self.confusion)) / max(1, self.records)))
