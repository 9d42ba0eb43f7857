"""Calibration of a classifier: a temperature for its probabilities, class offsets for its decision. Pure.

Logits z (records, k) give probabilities softmax(z / T) (temperature scaling: Guo, Pleiss, Sun, Weinberger, ICML 2017) and the
class argmax(z + b). The temperature changes no decision, and the offsets no probability.

Both are chosen from public grids, by sums over patients of what each grid point would change (`changes`): for T the Brier
score, which is proper as the log loss is but bounded, so that clipping hardly ever touches it; for b, whether the record is
decided rightly. A grid point is taken when its sum says that it is better by more than the noise of all of them (`fit`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mpc_fl.errors import DataError

CALIBRATION = "calibration"  # under which descriptions of files hold it
TEMPERATURES = tuple(2.0 ** (quarters / 4) for quarters in range(-4, 13) if quarters)  # beside 1: from 1/2 to 8
SHIFTS = (-4.0, -2.0, -1.0, -0.5, -0.25, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the logit of one class
_TEMPERATURE_NORM = 2.0  # L2, of one patient's changes of the Brier score over all temperatures
_LARGEST = 1e6

Fitted = Literal["temperature", "offsets", "both"]


@dataclass(frozen=True)
class Calibration:
    """`temperature` > 0 and an offset for each class, in logits."""

    temperature: float
    offsets: tuple[float, ...]

    def __post_init__(self) -> None:
        values = (self.temperature, *self.offsets)
        if not self.offsets or not all(math.isfinite(value) and abs(value) <= _LARGEST for value in values):
            raise DataError("a calibration needs a temperature and an offset of every class, all finite")
        if self.temperature < 1 / _LARGEST:
            raise DataError("a calibration needs a temperature above zero")

    @classmethod
    def none(cls, classes: int) -> Calibration:
        """What changes nothing."""
        return cls(1.0, (0.0,) * classes)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Class probabilities of logits (..., k), of their dtype."""
        return torch.softmax(logits / self.temperature, dim=-1)

    def decided(self, logits: torch.Tensor) -> torch.Tensor:
        """The class of each record, int64 (...), of logits (..., k); one that is not a number counts as 0."""
        return (torch.nan_to_num(logits) + torch.tensor(self.offsets, dtype=logits.dtype)).argmax(dim=-1)

    def tensor(self) -> torch.Tensor:
        """As a message, float64 (1 + k,)."""
        return torch.tensor([self.temperature, *self.offsets], dtype=torch.float64)

    @classmethod
    def of_tensor(cls, values: torch.Tensor) -> Calibration:
        """Inverse of `tensor`. Raises `DataError` for what cannot be a calibration."""
        temperature, *offsets = values.tolist()
        return cls(temperature, tuple(offsets))

    def to_json(self) -> dict[str, Any]:
        """As descriptions of files hold it, under `CALIBRATION`."""
        return {"temperature": self.temperature, "offsets": list(self.offsets)}

    @classmethod
    def from_json(cls, values: Any) -> Calibration:
        """Inverse of `to_json`. Raises `DataError` for what cannot be a calibration."""
        try:
            temperature, offsets = float(values["temperature"]), [float(value) for value in values["offsets"]]
        except (TypeError, ValueError, LookupError, OverflowError):
            raise DataError("a calibration that cannot be") from None
        return cls(temperature, tuple(offsets))


def candidate_offsets(classes: int) -> torch.Tensor:
    """The grid of offsets, float32 (m, k), small shifts first: the logit of one class moved. Of two classes, the second's."""
    moved = range(1, 2) if classes == 2 else range(classes)
    rows = [(abs(shift), label, shift) for shift in SHIFTS for label in moved]
    grid = torch.zeros(len(rows), classes)
    for row, (_, label, shift) in enumerate(sorted(rows)):
        grid[row, label] = shift
    return grid


def _offsets_norm(classes: int) -> float:
    """L2, of one patient's changes of decisions: a record of two classes changes at most half of them, to either side."""
    return math.sqrt(len(SHIFTS) / 2 if classes == 2 else len(SHIFTS))


@dataclass(frozen=True)
class Grid:
    """What is fitted for k classes, and so what a patient's vector is made of: temperatures, then decisions by true class."""

    classes: int
    fitted: Fitted

    @property
    def parts(self) -> tuple[tuple[int, float], ...]:
        """Length and clipping norm of each part."""
        found = []
        if self.fitted != "offsets":
            found.append((len(TEMPERATURES), _TEMPERATURE_NORM))
        if self.fitted != "temperature":
            found.append((self.classes * len(candidate_offsets(self.classes)), _offsets_norm(self.classes)))
        return tuple(found)

    @property
    def length(self) -> int:
        """Elements of a patient's vector."""
        return sum(length for length, _ in self.parts)

    def has(self, calibration: Calibration) -> bool:
        """Whether this is a point of the grid, or what changes nothing: all that can be fitted."""
        offsets = torch.tensor([calibration.offsets], dtype=torch.float64)
        temperatures = () if self.fitted == "offsets" else TEMPERATURES
        known = calibration.temperature in (1.0, *temperatures) and offsets.shape[1] == self.classes
        if not known or self.fitted == "temperature":
            return known and not bool(offsets.any())
        return not bool(offsets.any()) or bool((candidate_offsets(self.classes).double() == offsets).all(dim=1).any())

    def scales(self) -> list[float]:
        """What each part is divided by after clipping, so that the whole has norm 1 at most."""
        return [norm * math.sqrt(len(self.parts)) for _, norm in self.parts]


def _brier(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (probabilities - torch.nn.functional.one_hot(labels, probabilities.shape[-1])).square().sum(dim=-1)


def changes(grid: Grid, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What every grid point would change for each record, float64 (records, `grid.length`), of float logits (records, k)."""
    z, columns = torch.nan_to_num(logits.double()).clamp(-_LARGEST, _LARGEST), []
    if grid.fitted != "offsets":
        now = _brier(torch.softmax(z, dim=1), labels)
        columns += [_brier(torch.softmax(z / value, dim=1), labels) - now for value in TEMPERATURES]
    found = [torch.stack(columns, dim=1)] if columns else []
    if grid.fitted != "temperature":
        right = (z.argmax(dim=1) == labels).double()
        moved = (z[:, None] + candidate_offsets(grid.classes).double()).argmax(dim=2) == labels[:, None]
        own = torch.nn.functional.one_hot(labels, grid.classes).double()
        found.append((own[:, :, None] * (moved.double() - right[:, None])[:, None, :]).flatten(1))
    return torch.cat(found, dim=1)


def patient_changes(
    grid: Grid, logits: torch.Tensor, labels: torch.Tensor, patients: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """One row per patient, float32 (patients, `grid.length`), of L2 norm at most 1: the mean over the patient's records, each
    part clipped to its norm and divided by its scale. `patients` are the row numbers of each patient's records.

    One patient after the other, so that a row is a function of that patient's logits alone, bit for bit.
    """
    rows = [_of_patient(grid, logits[records], labels[records]) for records in patients]
    return torch.stack(rows) if rows else torch.zeros(0, grid.length)


def _of_patient(grid: Grid, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    parts = changes(grid, logits, labels).mean(dim=0).split([length for length, _ in grid.parts])
    clipped = [
        part * (norm / part.norm().clamp(min=norm)) / scale
        for part, (_, norm), scale in zip(parts, grid.parts, grid.scales(), strict=True)
    ]
    return torch.cat(clipped).float()


def fit(grid: Grid, total: torch.Tensor, weights: torch.Tensor, deviation: float) -> Calibration:
    """The calibration that the sum of all patients' vectors says, float64 (`grid.length`,).

    `weights` float64 (k,) is what a right decision counts for, by true class. `deviation` is that of the noise in each
    element. Of m grid points that change nothing the best seems better by about sqrt(2 log m) deviations of the noise; one
    is taken that seems better by one more, else nothing is changed.
    """
    parts, scales = list(total.split([length for length, _ in grid.parts])), grid.scales()
    temperature, offsets = 1.0, (0.0,) * grid.classes
    if grid.fitted != "offsets":
        gains = -parts.pop(0) * scales[0]
        if float(gains.max()) > _threshold(len(gains), deviation * scales[0]):
            temperature = TEMPERATURES[int(gains.argmax())]
    if grid.fitted != "temperature":
        gains = weights @ (parts.pop(0) * scales[-1]).reshape(grid.classes, -1)
        if float(gains.max()) > _threshold(len(gains), deviation * scales[-1] * float(weights.norm())):
            offsets = tuple(candidate_offsets(grid.classes)[int(gains.argmax())].tolist())
    return Calibration(temperature, offsets)


def _threshold(points: int, deviation: float) -> float:
    return deviation * (math.sqrt(2 * math.log(points)) + 1)
