"""Division of patients over hospitals. A patient is never split; the seed fixes the outcome."""

from __future__ import annotations

import re

import numpy as np

_KERMANY = re.compile(r"^(person\d+|(?:NORMAL2-)?IM-\d+)(?=[-_.])")
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]*$")  # the last part of a DICOM identifier, `.123`, is no suffix
_EVEN = 1e6  # shares are equal from here on; numpy's draw overflows far above


def generator(seed: int, *purpose: int) -> np.random.Generator:
    """Random numbers for splits and synthetic data from the user's seed; never for masks, shares or noise."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *purpose])))


def patient_of(file_name: str) -> str:
    """The patient a file belongs to, from its name.

    Kermany et al. (Cell 2018): `person12_bacteria_3.jpeg` -> `person12`, `NORMAL2-IM-0123-0001.jpeg` ->
    `NORMAL2-IM-0123`. The same person number in two classes counts as one patient, the safe reading. Other names:
    what stands before the first underscore, or the whole stem without one.
    """
    match = _KERMANY.match(file_name)
    if match is not None:
        return match.group(1)
    stem = _SUFFIX.sub("", file_name) or file_name
    return stem.split("_", 1)[0] or stem


def partition_equal(labels: np.ndarray, hospitals: int, seed: int) -> list[np.ndarray]:
    """Divide patients (int labels, shape (patients,)) evenly, each class on its own; disjoint and complete.

    Within a hospital the order is random, with classes interleaved, so that its first patients are a fair sample.
    """
    draw = generator(seed, 1)
    order = draw.permutation(len(labels))
    ranked = order[np.argsort(labels[order], kind="stable")]
    return [_interleaved(ranked[rank::hospitals], labels, draw) for rank in range(hospitals)]


def partition_dirichlet(labels: np.ndarray, hospitals: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Divide each class in proportions drawn from Dirichlet(alpha): the smaller alpha, the less alike the hospitals.

    Hsu, Qi, Brown 2019, section 3, with one draw per class. A hospital may get no patient; the caller says so.
    The proportions depend on the seed alone, so a hospital's test patients are like its training patients.
    """
    draw, classes = generator(seed, 2), np.unique(labels)
    shares = draw.dirichlet([min(alpha, _EVEN)] * hospitals, size=len(classes))
    parts: list[list[np.ndarray]] = [[] for _ in range(hospitals)]
    for label, share in zip(classes, shares, strict=True):
        members = draw.permutation(np.flatnonzero(labels == label))
        cuts = np.floor(np.cumsum(share)[:-1] * len(members) + 0.5).astype(int)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [_interleaved(np.concatenate(part), labels, draw) for part in parts]


def _interleaved(patients: np.ndarray, labels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Random order in which every prefix holds each class in its share, as nearly as possible."""
    patients = draw.permutation(patients)
    position = np.empty(len(patients))
    for label in np.unique(labels[patients]):
        members = np.flatnonzero(labels[patients] == label)
        position[members] = (np.arange(len(members)) + draw.random()) / len(members)
    return patients[np.argsort(position, kind="stable")]
