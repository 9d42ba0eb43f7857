"""What a change of films does to a diagnosis, with intervals and a paired test. Pure.

The patient is what is drawn anew and what is tested, with all records: films of one patient are alike. Intervals of 95 % are
percentiles over resampled patients (Efron 1979), before and after a change with the same ones, so that a difference has an interval
of its own. The paired test flips, for each patient, which of both answers was before (Fisher's randomisation test): its
p-value is how often the share of right records then differs by as much as it does. Over all changes of one model p-values are
corrected as Holm says (`learning.models.shares.holm`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from mpc_fl.evidence.membership import confidences
from mpc_fl.evidence.shortcuts_perturbed import Kind

Finding = Literal["shortcut", "contrast", "none"]
LEVEL = 0.05  # of all tests of one model together
LEAST_LOSS = 0.05  # of accuracy that is called a finding; exposure alone costs phantoms 3 points (docs/results.md)
LEAST_KEPT = 0.25  # of the ranking that is called a finding where lungs are hidden
_RESAMPLES, _FLIPS = 1000, 9999


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval of 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Answers:
    """What a model says of N records: logits float32 (N, k), the class `decided` of each, int64 (N,), and what is true of them:
    `labels` int64 (N,) and `patients` int64 (N,) from 0 on without gaps."""

    logits: torch.Tensor
    decided: torch.Tensor
    labels: torch.Tensor
    patients: torch.Tensor

    @property
    def right(self) -> np.ndarray:
        """Whether each record is decided rightly, float64 (N,)."""
        return np.asarray((self.decided == self.labels).double().numpy())


@dataclass(frozen=True)
class Changed:
    """What one change of films did. `log_odds`: mean change of the log odds of a patient's true class.

    `beyond_seams`: accuracy less that with the same places changed to what says the same of the diagnosis; None where there is
    no such change. `kept`: which share of the ranking by the untouched films is left, (AUC - 1/2) over that before; 0 if none was.
    `p_value` is that of the paired test of accuracy, `p_holm` with Holm's correction.
    """

    name: str
    kind: Kind
    accuracy: Estimate
    accuracy_change: Estimate
    area: Estimate
    area_change: Estimate
    log_odds_change: Estimate
    beyond_seams: Estimate | None
    kept: float
    p_value: float
    p_holm: float = 1.0

    @property
    def finding(self) -> Finding:
        """Whether this shows a shortcut, or that the model leans on a scanner's contrast."""
        if self.kind == "lungs":
            return "shortcut" if self.area.low > 0.5 and self.kept >= LEAST_KEPT else "none"
        lost = self.accuracy_change if self.beyond_seams is None else self.beyond_seams
        if self.p_holm >= LEVEL or lost.value > -LEAST_LOSS or lost.high >= 0:
            return "none"
        return "shortcut" if self.kind == "places" else "contrast"


class Resampled:
    """Figures of records whose patients are drawn anew, always the same ones.

    `labels` and `patients` int64 (N,) of the records, patients from 0 on without gaps.
    """

    def __init__(self, labels: torch.Tensor, patients: torch.Tensor, draw: np.random.Generator) -> None:
        self._labels, self._of = labels.numpy(), patients.numpy()
        count = int(self._of.max()) + 1
        drawn = draw.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
        self._once, self._often = np.ones((1, len(self._of))), drawn[:, self._of].astype(float)
        self._patients = count

    def mean(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        """Of values float64 (N,): the mean over records, and that of each resample, float64 (R,)."""
        return float(values.mean()), self._often @ values / self._often.sum(axis=1)

    def mean_of_patients(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        """The same of one value of each patient, float64 (patients,)."""
        first = np.unique(self._of, return_index=True)[1]
        drawn = self._often[:, first]
        return float(values.mean()), drawn @ values / drawn.sum(axis=1)

    def area(self, scores: np.ndarray) -> tuple[float, np.ndarray]:
        """Of scores float64 (N, k): the mean area below the curves of each class against the others, once and resampled."""
        return float(_areas(scores, self._labels, self._once)[0]), _areas(scores, self._labels, self._often)


def _areas(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Macro AUC where records count as often as `weights` (R, N) say, float64 (R,): over classes that are there, else one half."""
    found = []
    for label in range(scores.shape[1]):
        order = np.argsort(scores[:, label], kind="stable")
        values, own = scores[order, label], labels[order] == label
        starts = np.flatnonzero(np.append(True, np.diff(values) != 0))
        drawn = weights[:, order]
        of_class = np.add.reduceat(drawn * own, starts, axis=1)
        others = np.add.reduceat(drawn * ~own, starts, axis=1)
        pairs = of_class.sum(axis=1) * others.sum(axis=1)
        below = (of_class * (others.cumsum(axis=1) - others / 2)).sum(axis=1)
        found.append(np.where(pairs > 0, below / np.maximum(pairs, 1e-300), np.nan))
    known = np.isfinite(found)
    means = np.nansum(found, axis=0) / np.maximum(1, known.sum(axis=0))
    return np.asarray(np.where(known.any(axis=0), means, 0.5))


def estimate(value: float, resampled: np.ndarray) -> Estimate:
    """A figure with the interval that resamples give."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def accuracy_and_area(answers: Answers, seed: int) -> tuple[Estimate, Estimate]:
    """Accuracy and macro AUC of a model, with intervals over resampled patients; `seed` is that of the resamples."""
    drawn = Resampled(answers.labels, answers.patients, np.random.default_rng(seed))
    return estimate(*drawn.mean(answers.right)), estimate(*drawn.area(_probabilities(answers)))


def changed(name: str, kind: Kind, before: Answers, after: Answers, seed: int, seams: Answers | None = None) -> Changed:
    """What a change of films did to what a model says of the same records, beyond its `seams` where there are any; `p_holm` is left
    at 1."""
    draw = np.random.default_rng(seed)
    drawn = Resampled(before.labels, before.patients, draw)
    right, area = drawn.mean(after.right), drawn.area(_probabilities(after))
    was_right, was_area = drawn.mean(before.right), drawn.area(_probabilities(before))
    odds = drawn.mean_of_patients(_log_odds(after) - _log_odds(before))
    known = was_area[0] - 0.5
    beyond = None if seams is None else estimate(*drawn.mean(after.right - seams.right))
    return Changed(
        name,
        kind,
        estimate(*right),
        estimate(right[0] - was_right[0], right[1] - was_right[1]),
        estimate(*area),
        estimate(area[0] - was_area[0], area[1] - was_area[1]),
        estimate(*odds),
        beyond,
        max(0.0, (area[0] - 0.5) / known) if known > 0 else 0.0,
        paired_p_value(_by_patient(after.right - before.right, before.patients), draw),
    )


def paired_p_value(differences: np.ndarray, draw: np.random.Generator) -> float:
    """How likely a mean as far from zero is when the sign of each patient's difference, float64 (patients,), is a fair coin's."""
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    signs = 2.0 * draw.integers(0, 2, size=(_FLIPS, len(moved)), dtype=np.int8) - 1
    farther = np.abs(signs @ moved) >= abs(moved.sum()) - 1e-9
    return float((1 + farther.sum()) / (1 + _FLIPS))


def _probabilities(answers: Answers) -> np.ndarray:
    return np.asarray(torch.softmax(answers.logits.double(), dim=1).numpy())


def _log_odds(answers: Answers) -> np.ndarray:
    """Of each patient's true class, the mean over records, float64 (patients,)."""
    return confidences(answers.logits, answers.labels, answers.patients)


def _by_patient(values: np.ndarray, patients: torch.Tensor) -> np.ndarray:
    """Sum over each patient's records, float64 (patients,)."""
    return np.bincount(patients.numpy(), weights=values)
