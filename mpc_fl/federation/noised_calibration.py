"""What calibration is fitted with: one sum over all hospitals' validation patients of what each grid point would change.

Protocol, hospital i of n, in the round after the last one of training (`final_round`), with the final model:
  1. each validation patient becomes one vector, what the points of a public grid would change (`calibration.patient_changes`)
  2. with `evaluation.noise_multiplier` the hospital charges `CalibrationPlan.event` to its privacy ledger
  3. the vectors are rounded to a grid and added up exactly, integer noise is added (`distributed_gaussian`), and the sum is
     masked and opened to the aggregator alone (`quorum_sum`)
  4. temperature and offsets are read from the sum (`calibration.fit`) and told to all: post-processing

Privacy. Unit: one validation patient, all its records together, added or removed. Its vector is the mean over its records of a
part about temperatures and one about offsets; each is clipped to an L2 norm of its own, divided by it and by the root of the
number of parts, so the whole has an L2 norm of at most 1. The sum over patients therefore has sensitivity 1 before rounding,
and is one release of the Gaussian mechanism without sampling, as `noised_evaluation` is: colluders and quorum, ledger and
headroom are those said there. Without noise multiplier (mechanism none, or public validation patients) the sum is exact, and
opened over all hospitals or not at all. A patient's logits are computed record by record, and so are the same, bit for bit,
whoever else validates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mpc_fl.config.config import Config
from mpc_fl.crypto.ring import EXACT_IN_FLOAT64
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, HeadroomError, ProtocolError
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.models.calibration import Grid, patient_changes
from mpc_fl.learning.privacy.accounting import SubsampledGaussian
from mpc_fl.learning.privacy.distributed_gaussian import (
    DistributedGaussian,
    MechanismTerms,
    add_patients,
    noised_share,
    plan_mechanism,
)

_EXACT_SCALE = float(1 << 20)


@dataclass(frozen=True)
class CalibrationPlan:
    """Public constants of one run's calibration, equal at all parties; without `mechanism` the sum is exact.

    `most` patients of each of `hospitals` at most.
    """

    grid: Grid
    mechanism: DistributedGaussian | None
    hospitals: int
    most: int

    @property
    def scale(self) -> float:
        """Grid units per unit of a patient's vector."""
        return _EXACT_SCALE if self.mechanism is None else self.mechanism.scale

    @property
    def largest_sum(self) -> int:
        """Largest possible magnitude of an opened element."""
        if self.mechanism is not None:
            return self.mechanism.largest_sum
        return self.hospitals * self.most * int(_EXACT_SCALE)

    def event(self) -> SubsampledGaussian | None:
        """What it costs every validation patient; None without noise."""
        return None if self.mechanism is None else self.mechanism.event(1.0, 1)

    def deviation(self, hospitals: int) -> float:
        """Of the noise in each element of a sum over so many hospitals, in units of a patient's vector."""
        if self.mechanism is None:
            return 0.0
        return math.sqrt(hospitals * float(self.mechanism.noise_share.variance)) / self.scale


def plan_calibration(config: Config) -> CalibrationPlan | None:
    """The plan of a run, from public values alone; `None` without calibration. Raises `HeadroomError`."""
    fitted, classes, noise = (
        config.evaluation.calibrate,
        len(config.data.classes),
        config.evaluation_noise("validation"),
    )
    if fitted == "none":
        return None
    grid, hospitals, most = Grid(classes, fitted), config.federation.hospitals, config.aggregation.count_bound
    mechanism = None
    if noise is not None:
        terms = MechanismTerms(grid.length, hospitals, config.absent_noise(), most, 1.0, noise)
        mechanism = plan_mechanism(terms, ring_bits=64)
    plan = CalibrationPlan(grid, mechanism, hospitals, most)
    if plan.largest_sum >= EXACT_IN_FLOAT64:
        raise HeadroomError("calibration sums do not fit 53 bits", "lower aggregation.count_bound")
    return plan


def encode_changes(
    plan: CalibrationPlan, validation: Dataset, logits: torch.Tensor, seed: Seed, threads: int = 1
) -> Private[torch.Tensor]:
    """Steps 1 and 3 at a hospital: its summand, int64 (`grid.length`,), of logits float32 (records, k).

    `seed` must be fresh for every attempt. Raises `HeadroomError` for more patients than `aggregation.count_bound`.
    """
    if validation.patient_count > plan.most:
        raise HeadroomError("a hospital has more validation patients than aggregation.count_bound", "raise that bound")
    rows = patient_changes(plan.grid, logits, validation.labels, validation.records_of_patient)
    if plan.mechanism is None:
        return Private("changes by calibration", (rows.double() * plan.scale).round().long().sum(dim=0))
    total = torch.zeros(plan.grid.length, dtype=torch.int64)
    add_patients(plan.mechanism, total, [rows])
    return noised_share(plan.mechanism, Private("changes by calibration", total), seed, threads)


def decode_changes(plan: CalibrationPlan, total: torch.Tensor) -> torch.Tensor:
    """The opened sum, int64 (`grid.length`,), as float64. Raises `ProtocolError` for one that cannot be."""
    if total.dtype != torch.int64 or total.shape != (plan.grid.length,):
        raise ProtocolError("the opened calibration has another shape", SAME_VERSION)
    if max(int(total.max()), -int(total.min())) > plan.largest_sum:
        raise ProtocolError("the opened calibration exceeds its bound", "a hospital does not follow the protocol")
    return total.double() / plan.scale
