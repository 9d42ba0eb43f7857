"""Who trained a model, guessed from the model alone: the likelihood ratio attack with shadow models (Carlini et al., S&P
2022). Pure.

Several models are trained alike, each on patients that are in with probability 1/2. Each in turn is the one that is attacked, and
the others are shadow models: of a patient they say how sure a model is of the patient's class if that patient trained it, and
if not, as two normal distributions. The score is the log of how much likelier the first one makes what the attacked model
says. With few shadow models deviations are those of all patients together (section VI-C there). An average over patients says
little: what counts is how many are recognised while next to nobody is taken for a member by mistake.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

_LEAST_DEVIATION = 1e-6


def confidences(logits: torch.Tensor, labels: torch.Tensor, patients: torch.Tensor) -> np.ndarray:
    """How sure a model is of each patient's class: the mean over records of log(p / (1 - p)), float64 (patients,).

    `logits` float32 (N, classes), `labels` int64 (N,), `patients` int64 (N,) from 0 on without gaps. Raises `ValueError` for
    less than two classes.
    """
    if logits.shape[1] < 2:
        raise ValueError("a classifier has two classes or more")
    of_class = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
    own = logits.double()[of_class]
    others = torch.logsumexp(logits.double().masked_fill(of_class, -math.inf), dim=1)
    sums = torch.zeros(int(patients.max()) + 1, dtype=torch.float64).index_add_(0, patients, own - others)
    return np.asarray((sums / torch.bincount(patients)).numpy())


def likelihood_ratios(sure: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The score of each patient against each model, the others being its shadows: float64 (models, patients).

    `sure` float64 and `inside` bool, both (models, patients). Not a number where the others do not have the patient both in
    and out.
    """
    scores = np.full(sure.shape, np.nan)
    for attacked in range(len(sure)):
        others = np.arange(len(sure)) != attacked
        shadows, members = sure[others], inside[others]
        known = members.any(axis=0) & (~members).any(axis=0)
        means, deviations = list[np.ndarray](), list[float]()
        for of in (members, ~members):
            counts = np.maximum(1, of.sum(axis=0))
            means.append(np.where(of, shadows, 0.0).sum(axis=0) / counts)
            apart, free = np.where(of, shadows - means[-1], 0.0)[:, known], float((counts - 1)[known].sum())
            deviations.append(math.sqrt(float(np.square(apart).sum()) / free) if free else math.nan)
        if not np.isfinite(deviations).all():  # one model of each kind alone says nothing of how they vary
            deviations = [float(np.std(shadows[:, known]))] * 2 if known.any() else [1.0, 1.0]
        wide = [max(_LEAST_DEVIATION, deviation) for deviation in deviations]
        logs = [
            -np.square((sure[attacked] - mean) / deviation) / 2 - math.log(deviation)
            for mean, deviation in zip(means, wide, strict=True)
        ]
        scores[attacked, known] = (logs[0] - logs[1])[known]
    return scores


@dataclass(frozen=True)
class Roc:
    """How many members are recognised (`true`) while so many others are taken for members (`false`), both rates, increasing."""

    false: np.ndarray
    true: np.ndarray

    @property
    def area(self) -> float:
        """Below the curve; one half is chance."""
        return float(np.sum(np.diff(self.false) * (self.true[1:] + self.true[:-1]) / 2))

    def true_rate_at(self, false_rate: float) -> float:
        """The largest rate of members recognised with at most this rate of mistakes."""
        return float(self.true[self.false <= false_rate].max())


def roc_of(scores: np.ndarray, inside: np.ndarray) -> Roc:
    """The curve of these scores, of any shape; those that are not a number are left out.

    Equal scores are one step. Raises `ValueError` without members, or without others.
    """
    known = np.isfinite(scores)
    values, members = scores[known], inside[known]
    if not members.any() or members.all():
        raise ValueError("a curve needs members and others")
    order = np.argsort(-values, kind="stable")
    ends = np.append(np.diff(values[order]) != 0, True)
    true, false = np.cumsum(members[order])[ends], np.cumsum(~members[order])[ends]
    return Roc(np.append(0.0, false / (~members).sum()), np.append(0.0, true / members.sum()))
