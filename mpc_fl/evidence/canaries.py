"""Canaries: patients made to be found again, each in the data with probability 1/2, and the records of hospitals that hold them.

A canary's record has one feature of its own, and a linear network without offset, zero at first, has weights of that feature
which no other record moves. So its gradient lies along a direction of its own (`along_canaries`), whatever the others do, and is
longer than the clipping norm as long as training has not learned it (`largest_movement`): the worst that a patient can be for
whoever bounds privacy. Blank patients, who share one feature more and are all different in it, move none of the canaries'
weights; they make up the number that a hospital must have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from mpc_fl.crypto.stream_cipher import Stream
from mpc_fl.learning.data.dataset import Dataset

CLASSES = ("absent", "present")
_PRESENT = 1
_OVER_CLIPPING = 2.0  # how many times the clipping norm a canary's gradient is, before anything is learned
_BLANK = 1e-3  # of the feature of blank patients
RECORDS_OF_PATIENT = 2


@dataclass(frozen=True)
class Canaries:
    """Which of m canaries are `inside` the data, bool (m,), and at which of the honest hospitals each would be, int64 (m,)."""

    inside: np.ndarray
    place: np.ndarray
    clipping_norm: float
    records_of_each: int

    def __len__(self) -> int:
        return len(self.inside)

    @property
    def size(self) -> float:
        """Of the one feature that a canary's record has. Its gradient is then this over sqrt(2), half in each class's weights."""
        return _OVER_CLIPPING * math.sqrt(2) * self.clipping_norm

    def count_at(self, place: int) -> int:
        """How many are in the data of one hospital."""
        return int((self.inside & (self.place == place)).sum())

    @property
    def features(self) -> int:
        """Of each record: one for each canary, and that of blank patients."""
        return len(self) + 1

    def records(self, place: int, patients: int) -> Dataset:
        """Training records of the hospital at this place, float32 (N, features), made up by blank patients to so many at least."""
        own = torch.from_numpy(np.flatnonzero(self.inside & (self.place == place)))
        inputs = torch.zeros(len(own), self.features)
        inputs[torch.arange(len(own)), own] = self.size
        blank = blank_inputs(max(0, patients - len(own)), self.features)
        return records_of(torch.cat([inputs, blank]), self.records_of_each)


def drawn_canaries(stream: Stream, count: int, places: int, clipping_norm: float, records_of_each: int) -> Canaries:
    """So many canaries, each inside with probability 1/2 by the stream cipher, dealt out to the honest hospitals in turn."""
    inside = (stream.words(count, np.uint8) & 1).astype(bool)
    return Canaries(inside, np.arange(count) % places, clipping_norm, records_of_each)


def blank_inputs(patients: int, features: int) -> torch.Tensor:
    """One record of each of so many blank patients, no two alike, float32 (patients, features)."""
    inputs = torch.zeros(patients, features)
    inputs[:, -1] = _BLANK * (1 + torch.arange(patients)) / max(1, patients)
    return inputs


def records_of(inputs: torch.Tensor, of_each: int) -> Dataset:
    """Patients with so many records each, all of one patient alike: `inputs`, float32 (patients, features), holds one of each."""
    owners = torch.arange(len(inputs)).repeat_interleave(of_each)
    labels = torch.full((len(owners),), _PRESENT, dtype=torch.int64)
    return Dataset(inputs[owners], labels, owners, tuple(f"record-{row}" for row in range(len(owners))))


def along_canaries(parameters: torch.Tensor) -> np.ndarray:
    """What of a vector like the network's parameters, (2 features,) by class, lies along each canary's gradient: float64 (m,)."""
    absent, present = parameters.double().reshape(len(CLASSES), -1)[:, :-1].numpy()
    return np.asarray((absent - present) / math.sqrt(2))


def largest_movement() -> float:
    """How far along its gradient a canary's weights may go, in units of one over the clipping norm, while that stays too long to
    pass unclipped: logits then differ by one at most, so that the class that is not named keeps a probability of a quarter."""
    return 1 / (math.sqrt(2) * _OVER_CLIPPING * math.sqrt(2))
