"""Poisson sampling: which patients a step takes, each independently, and which one record of each.

The order is secret, drawn from the stream cipher: the accountant counts on it. A number as seed is for simulation only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from mpc_fl.config.config import Config
from mpc_fl.crypto.stream_cipher import Seed, Stream


def sampling_seed_of(seed: Seed | int | None) -> Seed:
    """A `Seed` as it is, a fresh one for None; from a number one for simulation, the same for the same number."""
    if isinstance(seed, Seed):
        return seed
    if seed is None:
        return Seed.from_system()
    return Seed(hashlib.sha256(b"mpc-fl simulated sampling order" + str(seed).encode()).digest())


def sample_patients(records_of_patient: Sequence[torch.Tensor], sample_rate: float, stream: Stream) -> torch.Tensor:
    """Poisson sampling: each patient independently with `sample_rate`, one record of each at random. int64 (batch,)."""
    patients = len(records_of_patient)
    chosen = stream.uniform(patients) <= sample_rate
    position = stream.uniform(patients)
    rows = []
    for patient in chosen.nonzero()[0]:
        records = records_of_patient[int(patient)]
        rows.append(int(records[min(len(records) - 1, int(position[patient] * len(records)))]))
    return torch.tensor(rows, dtype=torch.int64)


def sampling_rate(config: Config, patients: int) -> float:
    """Probability with which a step takes a patient: `training.batch_size` / patients, at most 1."""
    return min(1.0, config.training.batch_size / patients)
