"""Figures of classifiers that were trained several times, with intervals over both trainings and test patients. Pure.

A figure of one model on one test set hides two accidents: which patients were tested, and how its training fell out (who was at
which hospital, what noise was drawn). Intervals of 95 % are percentiles over draws in which both are drawn anew (bootstrap, Efron
1979): one of the trainings, one of its models, and as many patients as there are, each with all records. Two ways of training
are compared on the same patients and the same division of them, so that their difference has an interval of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mpc_fl.evidence.shortcuts_tested import Estimate

FIGURES = ("accuracy", "balanced accuracy", "macro AUC", "MCC")
_RESAMPLES = 2000
Trainings = Sequence[np.ndarray]


@dataclass(frozen=True)
class JudgedRecords:
    """What is true of N test records: `labels` int64 (N,), and `patients` int64 (N,) from 0 on without gaps."""

    labels: np.ndarray
    patients: np.ndarray

    @property
    def of_patient(self) -> list[np.ndarray]:
        """The rows of each patient, int64."""
        order = np.argsort(self.patients, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(self.patients[order])) + 1)


def figures_of(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> tuple[float, ...]:
    """The `FIGURES` of one model, probabilities float64 (N, classes), each record counted as often as `weights` (N,) say."""
    classes = probabilities.shape[1]
    pairs = np.bincount(labels * classes + probabilities.argmax(axis=1), weights, classes**2).reshape(classes, classes)
    found, right, total = pairs.sum(axis=1), pairs.trace(), pairs.sum()
    said = pairs.sum(axis=0)
    spread = (total**2 - said @ said) * (total**2 - found @ found)
    correlation = (right * total - said @ found) / math.sqrt(spread) if spread else 0.0
    areas = [_area(probabilities[:, own], labels == own, weights) for own in range(classes)]
    return right / total, float(np.mean(pairs.diagonal() / found)), float(np.mean(areas)), correlation


def _area(scores: np.ndarray, own: np.ndarray, weights: np.ndarray) -> float:
    """Under the curve of one class against the others: how often a record of it has the higher score, equal ones half."""
    places = np.unique(scores, return_inverse=True)[1]
    of_class, others = np.bincount(places, weights * own), np.bincount(places, weights * ~own)
    return float(of_class @ (others.cumsum() - others / 2) / (of_class.sum() * others.sum()))


def _mean_figures(trainings: Trainings, labels: np.ndarray) -> np.ndarray:
    once = np.ones(len(labels))
    return np.mean([[figures_of(model, labels, once) for model in models] for models in trainings], axis=(0, 1))


def _draws(sides: Sequence[Trainings], tested: JudgedRecords) -> Iterator[list[tuple[float, ...]]]:
    """The `FIGURES` of a model of each side, on the same training by number and the same patients; sets that lack a class are
    left out."""
    labels, rows = tested.labels, tested.of_patient
    draw, classes = np.random.default_rng(0), len(np.unique(tested.labels))
    for _ in range(_RESAMPLES):
        training = int(draw.integers(len(sides[0])))
        models = [side[training][draw.integers(len(side[training]))] for side in sides]
        chosen = np.concatenate([rows[patient] for patient in draw.integers(len(rows), size=len(rows))])
        if len(np.unique(labels[chosen])) == classes:
            weights = np.bincount(chosen, minlength=len(labels)).astype(float)
            yield [figures_of(model, labels, weights) for model in models]


def with_intervals(trainings: Trainings, tested: JudgedRecords) -> list[Estimate]:
    """The mean of each of `FIGURES` over trainings and their models, each training float64 (models, N, classes)."""
    drawn = [figures for (figures,) in _draws([trainings], tested)]
    return _estimates(_mean_figures(trainings, tested.labels), np.array(drawn))


def differences(first: Trainings, second: Trainings, tested: JudgedRecords) -> list[Estimate]:
    """How much larger each of `FIGURES` is for the first way of training, on the same patients and the same trainings by number.

    Both are lists of as many trainings, each float64 (models, N, classes). Raises `ValueError` where they are not as many.
    """
    if len(first) != len(second):
        raise ValueError("only as many trainings of either kind can be compared")
    drawn = np.array(list(_draws([first, second], tested)))
    means = [_mean_figures(side, tested.labels) for side in (first, second)]
    return _estimates(means[0] - means[1], drawn[:, 0] - drawn[:, 1])


def _estimates(values: np.ndarray, drawn: np.ndarray) -> list[Estimate]:
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return [Estimate(float(a), float(b), float(c)) for a, b, c in zip(values, low, high, strict=True)]
