"""What protocols and training ask of a hospital's data, wherever they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class PatientRecords(Protocol):
    """Training data in memory: `inputs` float32 (N, ...), `labels` int64 (N,), and the rows of each patient."""

    @property
    def inputs(self) -> torch.Tensor: ...

    @property
    def labels(self) -> torch.Tensor: ...

    @property
    def records_of_patient(self) -> Sequence[torch.Tensor]: ...
