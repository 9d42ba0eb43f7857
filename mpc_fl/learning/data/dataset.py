"""Records in memory, and which of them belong to one patient: the patient, not the record, is the unit of privacy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch

from mpc_fl.learning.data.normalisation import Normalisation


@dataclass(frozen=True)
class Dataset:
    """Records of one hospital: inputs float32 (N, C, H, W) in [0, 1] or (N, F), labels int64 (N,), patient index of each
    record int64 (N,) from 0, names of the records, how many files were unreadable and left out, to how many of the others
    was done what (`image_files.Picture`), and what else lies beside them and is none (`records.Index`).

    `groups`: in which group of each attribute a record is, int64 (N,), by the attribute's name (`attributes`)."""

    inputs: torch.Tensor
    labels: torch.Tensor
    patients: torch.Tensor
    names: tuple[str, ...]
    skipped: int = 0
    treatments: Mapping[str, int] = field(default_factory=dict)
    left_aside: Mapping[str, int] = field(default_factory=dict)
    groups: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def records_of_patient(self) -> tuple[torch.Tensor, ...]:
        """Row numbers of each patient's records."""
        rows: list[list[int]] = [[] for _ in range(self.patient_count)]
        for row, patient in enumerate(self.patients.tolist()):
            rows[patient].append(row)
        return tuple(torch.tensor(item, dtype=torch.int64) for item in rows)

    @cached_property
    def patient_count(self) -> int:
        """Number of patients."""
        return int(self.patients.max()) + 1 if len(self.patients) else 0

    def only(self, rows: torch.Tensor) -> Dataset:
        """Some of the records, by row numbers int64 (n,); patients keep their numbers."""
        return replace(
            self,
            inputs=self.inputs[rows],
            labels=self.labels[rows],
            patients=self.patients[rows],
            names=tuple(self.names[row] for row in rows.tolist()),
            groups={attribute: numbers[rows] for attribute, numbers in self.groups.items()},
        )

    def class_counts(self, classes: int) -> list[int]:
        """Records of each of so many classes."""
        return torch.bincount(self.labels, minlength=classes).tolist()


def normalised(dataset: Dataset, normalisation: Normalisation | None) -> Dataset:
    """The same records with normalised inputs; unchanged without a normalisation. Raises `DataError` if it does not fit."""
    if normalisation is None:
        return dataset
    return replace(dataset, inputs=normalisation.apply(dataset.inputs))


class Rows(Protocol):
    """A tensor float32 (N, ...), or something that has rows as it does."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: torch.Tensor, /) -> torch.Tensor: ...


class PatientRecords(Protocol):
    """Training data in memory: `inputs` float32 (N, ...), `labels` int64 (N,), and the rows of each patient."""

    @property
    def inputs(self) -> Rows: ...

    @property
    def labels(self) -> torch.Tensor: ...

    @property
    def records_of_patient(self) -> Sequence[torch.Tensor]: ...
