"""Which patients train, validate and test, and at which hospital: by public hashes of their names, a patient never split.

One patient more or less leaves all others where they were: exactly, where patients train or are held out (`place_of`); all
but a few, where one data set is divided over simulated hospitals of equal size (`partition_equal`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence

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


def place_of(patient: str, purpose: str, seed: int = 0) -> float:
    """Where in [0, 1) a patient falls for a purpose: from SHA-256 of purpose, seed and the patient's name, and nothing else.

    So no patient's place depends on who else there is. The function is public, and applied where the names are.
    """
    text = json.dumps([purpose, seed, patient]).encode()
    return (int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 11) * 2.0**-53


def places_of(patients: Sequence[str], purpose: str, seed: int = 0) -> np.ndarray:
    """`place_of` each of the patients, float64 (patients,)."""
    return np.array([place_of(patient, purpose, seed) for patient in patients], dtype=np.float64)


def partition_equal(patients: Sequence[str], labels: np.ndarray, hospitals: int, seed: int) -> list[np.ndarray]:
    """Divide patients (by name, int labels, shape (patients,)) evenly, each class on its own; disjoint and complete.

    Each class is cut into pieces of equal length in the order of places (`place_of`). One patient more moves each cut in
    the patient's own class by one patient at most, so at most `hospitals` - 1 others go to the hospital beside theirs.
    Within a hospital the order is by places, with classes interleaved, so that its first patients are a fair sample.
    """
    parts: list[list[np.ndarray]] = [[] for _ in range(hospitals)]
    for label, members in _classes_in_order(patients, labels, seed):
        # Beginning elsewhere in every class, the pieces that are longer by one go to hospitals in turn.
        cuts = [(rank * len(members) + label % hospitals) // hospitals for rank in range(1, hospitals)]
        _share_out(parts, members, cuts)
    return [_interleaved(np.concatenate(part), patients, labels, seed) for part in parts]


def partition_dirichlet(
    patients: Sequence[str], labels: np.ndarray, hospitals: int, alpha: float, seed: int
) -> list[np.ndarray]:
    """Divide each class in proportions drawn from Dirichlet(alpha): the smaller alpha, the less alike the hospitals.

    Hsu, Qi, Brown 2019, section 3, with one draw per class. A hospital may get no patient; the caller says so.
    The proportions depend on the seed alone, so a hospital's test patients are like its training patients. Cuts and order are
    as in `partition_equal`.
    """
    shares = generator(seed, 2).dirichlet([min(alpha, _EVEN)] * hospitals, size=int(labels.max(initial=-1)) + 1)
    parts: list[list[np.ndarray]] = [[] for _ in range(hospitals)]
    for label, members in _classes_in_order(patients, labels, seed):
        cuts = np.floor(np.cumsum(shares[label])[:-1] * len(members) + 0.5).astype(int)
        _share_out(parts, members, cuts.tolist())
    return [_interleaved(np.concatenate(part), patients, labels, seed) for part in parts]


def _classes_in_order(patients: Sequence[str], labels: np.ndarray, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each class with the numbers of its patients, in the order of their places."""
    order = np.lexsort((np.arange(len(labels)), places_of(patients, "hospital", seed)))
    for label in np.unique(labels).tolist():
        yield label, order[labels[order] == label]


def _share_out(parts: list[list[np.ndarray]], members: np.ndarray, cuts: list[int]) -> None:
    for part, piece in zip(parts, np.split(members, cuts), strict=True):
        part.append(piece)


def _interleaved(members: np.ndarray, patients: Sequence[str], labels: np.ndarray, seed: int) -> np.ndarray:
    """By places, so that every prefix holds each class in its share, as nearly as possible."""
    places = places_of([patients[number] for number in members], "order", seed)
    order = np.lexsort((members, places))
    members, places = members[order], places[order]
    position = np.empty(len(members))
    for label in np.unique(labels[members]):
        own = np.flatnonzero(labels[members] == label)
        position[own] = (np.arange(len(own)) + place_of(str(label), "order of classes", seed)) / len(own)
    return members[np.argsort(position, kind="stable")]
