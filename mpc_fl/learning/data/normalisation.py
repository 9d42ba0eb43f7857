"""The common scale of inputs: a public mean and deviation of each channel or feature, applied before the network.

Who measures them is `federation.feature_statistics`; they travel as a tensor and stand in the model file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from mpc_fl.config.config import Config
from mpc_fl.errors import DataError

CONSTANTS = "normalisation_of_inputs"  # where descriptions of model files have them
# What `tables.scale_features` gives is no larger in magnitude: with reference ranges, and the log of the largest float64.
_LARGEST_RANGED_FEATURE = 2.0
_LARGEST_FEATURE = 710.0


def range_of_inputs(config: Config) -> tuple[float, float]:
    """Between which two numbers every input of such a configuration lies before it is normalised, whatever the data."""
    if config.data.features is not None:
        return -1.0, 1.0
    if not config.data.is_table:
        return 0.0, 1.0
    largest = _LARGEST_RANGED_FEATURE if config.data.table.bounded else _LARGEST_FEATURE
    return -largest, largest


@dataclass(frozen=True)
class Normalisation:
    """Public constants of the inputs: each channel or feature x becomes (x - mean) / deviation, kept as float64 numbers.

    `to_norm_1`: records are features of images and a constant (`models.feature_extractor`), and all but the constant is
    brought to L2 norm 1 afterwards.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    to_norm_1: bool = False

    def __post_init__(self) -> None:
        values = (*self.mean, *self.deviation)
        if len(self.mean) != len(self.deviation) or not self.mean or not all(map(math.isfinite, values)):
            raise DataError("a normalisation needs a finite mean and deviation of every channel or feature")
        if min(self.deviation) <= 0:
            raise DataError("a normalisation needs deviations above zero")

    def apply(self, inputs: torch.Tensor) -> torch.Tensor:
        """Normalised copies of float32 (N, C, H, W) or (N, F), C or F the number of constants. Raises `DataError`."""
        if inputs.dim() < 2 or inputs.shape[1] != len(self.mean):
            raise DataError(f"inputs have {tuple(inputs.shape[1:])}, the normalisation has {len(self.mean)} constants")
        shape = (1, -1, *[1] * (inputs.dim() - 2))
        mean, deviation = torch.tensor([self.mean, self.deviation], dtype=torch.float32)
        scaled = (inputs - mean.reshape(shape)) / deviation.reshape(shape)
        if self.to_norm_1:
            scaled[:, :-1] = torch.nn.functional.normalize(scaled[:, :-1], dim=1)
        return scaled

    def to_json(self) -> dict[str, list[float]]:
        """As descriptions of files hold it, under `CONSTANTS`."""
        return {"mean": list(self.mean), "deviation": list(self.deviation)}

    @classmethod
    def from_json(cls, values: Any, to_norm_1: bool = False) -> Normalisation:
        """Inverse of `to_json`. Raises `DataError` for what cannot be constants."""
        try:
            mean, deviation = ([float(value) for value in values[key]] for key in ("mean", "deviation"))
        except (TypeError, ValueError, LookupError, OverflowError):
            raise DataError("a normalisation of inputs that cannot be") from None
        return cls(tuple(mean), tuple(deviation), to_norm_1)

    def tensor(self) -> torch.Tensor:
        """Means and deviations as a message, float64 (2, d)."""
        return torch.tensor([self.mean, self.deviation], dtype=torch.float64)

    @classmethod
    def of_tensor(cls, values: torch.Tensor, config: Config) -> Normalisation:
        """Inverse of `tensor`, for the records of `config`. Raises `DataError` for constants that cannot be."""
        mean, deviation = values.tolist()
        return cls(tuple(mean), tuple(deviation), to_norm_1=config.data.features is not None)
