"""Evaluation of groups of test patients: which groups may be shown, by noised numbers of patients, and the counts of those.

Two sums over all hospitals after the evaluation of the final model; k classes, A attributes with G groups in all:
  1. each test patient becomes one vector of G numbers: for each attribute, the mean of its records' groups as unit vectors. Its L2
     norm is at most sqrt(A). The vectors are added up with integer noise (`distributed_gaussian`) and opened: no number of
     patients of a group is ever opened exactly, whatever the run's mechanism
  2. all decide alike from the opened numbers (`shown_cells`): a group is shown when it has at least `fewest_in_group` patients, two
     deviations of the noise being taken off. The others are withheld: their counts are in no sum
  3. of each group that is shown the counts of `evaluation` enter the second sum, as vectors one behind the other, exact where
     evaluation is exact; else its confusion matrix in patients alone, noised as `noised_evaluation` does it

What a difference would show. Where counts are exact, those of all patients are opened, too: whoever takes all shown groups of an
attribute away from them has the withheld ones together. If these are not shown to be `fewest_in_group` patients, they are
joined with the smallest group that is shown, which is shown with them under both names. Between attributes nothing is done: two
groups of exact counts that differ by few patients show these few. Noised counts are protected by their noise in any difference.

Privacy, where counts are noised. Unit: one test patient, all records together. Each of the two sums is one release of the
Gaussian mechanism without sampling, with the noise multiplier of evaluation, and sensitivity sqrt(A) before rounding; both are
charged before they leave. Which groups are shown is read from the first, and costs nothing. Where evaluation is exact
nothing is charged, as for all else of it: the noise of step 1 then serves the rule alone, and no epsilon follows from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpc_fl.config.config import Config
from mpc_fl.crypto.ring import EXACT_IN_FLOAT64
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, HeadroomError, ProtocolError
from mpc_fl.federation.noised_evaluation import NoisedEvaluation
from mpc_fl.learning.data.attributes import Attribute, attributes_of
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.models.evaluation import (
    Evaluation,
    decode_evaluation,
    encode_evaluation,
    evaluate_locally,
    evaluation_length,
)
from mpc_fl.learning.models.group_comparison import FIGURES, GroupCounts, gaps_between, share_of
from mpc_fl.learning.models.shares import area_interval, error_by_chance
from mpc_fl.learning.privacy.accounting import SubsampledGaussian
from mpc_fl.learning.privacy.distributed_gaussian import (
    DistributedGaussian,
    MechanismTerms,
    add_patients,
    noised_share,
    plan_mechanism,
)

_SURE = 2  # deviations of its noise that a number of patients must stand above the fewest


@dataclass(frozen=True, repr=False)
class OwnDecisions:
    """A hospital's own evaluation, and of each of its records the probabilities, float64 (N, k), and the decision, int64 (N,)."""

    own: Evaluation
    probabilities: torch.Tensor
    decided: torch.Tensor


@dataclass(frozen=True)
class Cell:
    """What is counted together: one group of an attribute, or one joined with those that are withheld, by their numbers."""

    attribute: str
    members: tuple[int, ...]


@dataclass(frozen=True)
class GroupPlan:
    """Public constants of one run's groups, equal at all parties. `noise`: of counts, None where they are exact."""

    attributes: tuple[Attribute, ...]
    classes: int
    fewest: int
    noise: float | None
    sizes: DistributedGaussian

    @property
    def places(self) -> dict[str, int]:
        """Where the groups of each attribute begin in the sum of step 1."""
        places, place = dict[str, int](), 0
        for attribute in self.attributes:
            places[attribute.name] = place
            place += len(attribute.groups)
        return places

    @property
    def length(self) -> int:
        """Elements of the sum of step 1, G."""
        return sum(len(attribute.groups) for attribute in self.attributes)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every group by itself."""
        return tuple(Cell(of.name, (number,)) for of in self.attributes for number in range(len(of.groups)))

    def name(self, cell: Cell) -> str:
        """The names of a cell's groups."""
        groups = next(of.groups for of in self.attributes if of.name == cell.attribute)
        return " or ".join(groups[number] for number in cell.members)

    def counts(self, cells: Sequence[Cell]) -> DistributedGaussian | None:
        """The mechanism of the second sum over these cells, at least one; None where counts are exact."""
        if self.noise is None:
            return None
        norm, length = math.sqrt(len({cell.attribute for cell in cells})), len(cells) * self.classes**2
        return _mechanism(self.sizes, length, norm, self.noise)

    def counts_length(self, cells: Sequence[Cell]) -> int:
        """Elements of the second sum."""
        return len(cells) * (evaluation_length(self.classes) if self.noise is None else self.classes**2)

    def event(self) -> SubsampledGaussian | None:
        """What each of the two sums costs every test patient, whatever is shown; None where counts are exact."""
        mechanism = self.counts(self.cells)
        return None if mechanism is None else mechanism.event(1.0, 1)


def _mechanism(terms: MechanismTerms, length: int, norm: float, noise: float) -> DistributedGaussian:
    of = MechanismTerms(length, terms.hospitals, terms.colluders, terms.expected_patients, norm, noise)
    mechanism = plan_mechanism(of, ring_bits=64)
    if mechanism.largest_sum >= EXACT_IN_FLOAT64:
        raise HeadroomError("counts of groups do not fit 53 bits", "lower aggregation.count_bound")
    return mechanism


def plan_groups(config: Config) -> GroupPlan | None:
    """The plan of a run, from public values alone; None without groups. Raises `HeadroomError`."""
    evaluation, hospitals = config.evaluation, config.federation.hospitals
    attributes = attributes_of(evaluation.groups, hospitals)
    if not attributes:
        return None
    noise = config.evaluation_noise("test")
    # Without a mechanism each hospital still knows its own part of the noise.
    absent = config.absent_noise() if noise is not None else min(1, hospitals - 1)
    terms = MechanismTerms(1, hospitals, absent, config.aggregation.count_bound, 1.0, 1.0)
    length = sum(len(attribute.groups) for attribute in attributes)
    sizes = _mechanism(terms, length, math.sqrt(len(attributes)), noise or evaluation.group_size_noise)
    return GroupPlan(attributes, len(config.data.classes), evaluation.fewest_in_group, noise, sizes)


# ---- step 1 and 2: numbers of patients ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupSizes:
    """Opened numbers of test patients by group, float64 (G,), each with noise of standard deviation `deviation`."""

    patients: torch.Tensor
    deviation: float


def encode_sizes(plan: GroupPlan, tests: Dataset, seed: Seed, threads: int = 1) -> Private[torch.Tensor]:
    """Step 1 at a hospital: its summand with its part of the noise, int64 (G,). `seed` must be fresh for every attempt.

    Raises `HeadroomError` for more patients than `aggregation.count_bound`.
    """
    rows = torch.zeros(len(tests), plan.length)
    for name, place in plan.places.items():
        rows[torch.arange(len(tests)), place + tests.groups[name]] = 1.0
    return _noised(plan.sizes, _of_patients(rows, tests), seed, threads)


def _of_patients(rows: torch.Tensor, tests: Dataset) -> torch.Tensor:
    """The mean of each patient's records, float32 (patients, ...)."""
    if not len(tests):
        return rows
    return torch.stack([rows[records].mean(dim=0) for records in tests.records_of_patient])


def _noised(mechanism: DistributedGaussian, vectors: torch.Tensor, seed: Seed, threads: int) -> Private[torch.Tensor]:
    if len(vectors) > mechanism.expected_patients:
        raise HeadroomError("a hospital has more test patients than aggregation.count_bound", "raise that bound")
    total = torch.zeros(mechanism.parameters, dtype=torch.int64)
    add_patients(mechanism, total, [vectors])
    return noised_share(mechanism, Private("counts of groups", total), seed, threads)


def _opened(mechanism: DistributedGaussian, total: torch.Tensor, hospitals: int) -> tuple[torch.Tensor, float]:
    """What a noised sum over so many hospitals says, float64 (P,), and the deviation of its noise. Raises `ProtocolError`."""
    if total.dtype != torch.int64 or total.shape != (mechanism.parameters,):
        raise ProtocolError("the opened counts of groups have another shape", SAME_VERSION)
    if max(int(total.max()), -int(total.min())) > mechanism.largest_sum:
        raise ProtocolError("the opened counts of groups exceed their bound", "a hospital does not follow the protocol")
    deviation = math.sqrt(hospitals * float(mechanism.noise_share.variance)) / mechanism.scale
    return total.double() / mechanism.scale, deviation


def decode_sizes(plan: GroupPlan, total: torch.Tensor, hospitals: int) -> GroupSizes:
    """From the sum opened over so many hospitals, int64 (G,). Raises `ProtocolError` for one that cannot be."""
    return GroupSizes(*_opened(plan.sizes, total, hospitals))


def shown_cells(plan: GroupPlan, sizes: GroupSizes) -> tuple[Cell, ...]:
    """Step 2: what is counted in the second sum, in order; empty where no group of any attribute may be shown."""
    shown, places = list[Cell](), plan.places
    for attribute in plan.attributes:
        place = places[attribute.name]
        of = sizes.patients[place : place + len(attribute.groups)].tolist()
        shown += [Cell(attribute.name, members) for members in _shown_of(plan, of, sizes.deviation)]
    return tuple(shown)


def _shown_of(plan: GroupPlan, sizes: Sequence[float], deviation: float) -> list[tuple[int, ...]]:
    """Of one attribute, whose groups have these noised sizes."""

    def suffices(groups: Sequence[int]) -> bool:
        patients = sum(sizes[group] for group in groups)
        return patients - _SURE * deviation * math.sqrt(len(groups)) >= plan.fewest

    large = [group for group in range(len(sizes)) if suffices([group])]
    withheld = [group for group in range(len(sizes)) if group not in large]
    if plan.noise is not None or not withheld or suffices(withheld):
        return [(group,) for group in large]
    if len(large) < 2:  # what is left would be all patients
        return []
    smallest = min(large, key=lambda group: sizes[group])
    return [(group, *(withheld if group == smallest else ())) for group in large]


# ---- step 3: counts ----------------------------------------------------------------------------------------------------


def _records_of(cell: Cell, tests: Dataset) -> torch.Tensor:
    return torch.isin(tests.groups[cell.attribute], torch.tensor(cell.members))


def encode_exact(cells: Sequence[Cell], tests: Dataset, found: OwnDecisions, count_bound: int) -> Private[torch.Tensor]:
    """Exact counts of these cells at a hospital, int64 (`counts_length`,). Raises `HeadroomError` as `encode_evaluation`."""
    parts = []
    for cell in cells:
        rows = _records_of(cell, tests)
        of = evaluate_locally(found.probabilities[rows], tests.labels[rows], found.decided[rows])
        parts.append(encode_evaluation(of, count_bound))
    return Private("counts of groups", torch.cat(parts))


def encode_noised(
    plan: GroupPlan, cells: Sequence[Cell], tests: Dataset, found: OwnDecisions, seed: Seed, threads: int = 1
) -> Private[torch.Tensor]:
    """Noised confusion matrices of these cells at a hospital, int64 (`counts_length`,). `seed` must be fresh for every attempt.

    Raises `HeadroomError` for more patients than `aggregation.count_bound`.
    """
    mechanism, size = plan.counts(cells), plan.classes**2
    assert mechanism is not None
    rows = torch.zeros(len(tests), len(cells) * size)
    places = tests.labels * plan.classes + found.decided
    for number, cell in enumerate(cells):
        members = torch.nonzero(_records_of(cell, tests))[:, 0]
        rows[members, number * size + places[members]] = 1.0
    return _noised(mechanism, _of_patients(rows, tests), seed, threads)


@dataclass(frozen=True)
class GroupsOpened:
    """What is known of groups: the counts of each cell that is shown, and the groups that are withheld, by attribute."""

    plan: GroupPlan
    cells: tuple[Cell, ...]
    counts: tuple[Evaluation | NoisedEvaluation, ...]

    @property
    def withheld(self) -> dict[str, list[str]]:
        """The groups that are in no cell."""
        found = dict[str, list[str]]()
        for attribute in self.plan.attributes:
            shown = {number for cell in self.cells if cell.attribute == attribute.name for number in cell.members}
            found[attribute.name] = [name for number, name in enumerate(attribute.groups) if number not in shown]
        return {name: groups for name, groups in found.items() if groups}

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for metrics files and reports."""
        named = [(cell.attribute, self.plan.name(cell)) for cell in self.cells]
        counted = [_counts_of(*of, counts) for of, counts in zip(named, self.counts, strict=True)]
        shown = [
            {"attribute": of.attribute, "group": of.group, "scores": counts.to_json(), "classes": _classes(of, counts)}
            | _calibration(counts)
            for of, counts in zip(counted, self.counts, strict=True)
        ]
        gaps = [gap.to_json() for gap in gaps_between(counted)]
        return {"fewest": self.plan.fewest, "shown": shown, "withheld": self.withheld, "gaps": gaps}


def _counts_of(attribute: str, group: str, counts: Evaluation | NoisedEvaluation) -> GroupCounts:
    if isinstance(counts, Evaluation):
        return GroupCounts(attribute, group, counts.confusion)
    return GroupCounts(attribute, group, counts.counts, counts.deviation)


def _classes(of: GroupCounts, counts: Evaluation | NoisedEvaluation) -> list[dict[str, Any]]:
    """Sensitivity, specificity and AUC of each class, with intervals."""
    found = list[dict[str, Any]]()
    for label in range(len(of.confusion)):
        shares: dict[str, Any] = {figure: share_of(of, label, figure).to_json() for figure in FIGURES}
        found.append(shares | {"auc": _area(counts, label)})
    return found


def _area(counts: Evaluation | NoisedEvaluation, label: int) -> dict[str, float] | None:
    """AUC of a class, its interval, and how far its bins may put it off; None where it was not opened or does not exist."""
    if not isinstance(counts, Evaluation):
        return None
    area, resolution = counts.areas[label], counts.area_resolutions[label]
    if area is None or resolution is None:
        return None
    negatives, positives = (int(number) for number in counts.scores[label].sum(dim=1))
    low, high = area_interval(area, negatives, positives, resolution)
    named = {"area": area, "low": low, "high": high, "resolution": resolution}
    return {name: round(value, 5) for name, value in named.items()}


def _calibration(counts: Evaluation | NoisedEvaluation) -> dict[str, float | None]:
    if not isinstance(counts, Evaluation):
        return {"error_by_chance": None}
    return {"error_by_chance": round(error_by_chance(counts.reliability_bins), 5)}


def decode_groups(
    plan: GroupPlan, cells: tuple[Cell, ...], total: torch.Tensor, hospitals: int, whole: Evaluation | None
) -> GroupsOpened:
    """Step 3, from the sum opened over so many hospitals, int64 (`counts_length`,).

    `whole`: the exact counts of all test patients over the same hospitals, where there are any. Raises `ProtocolError` for a sum
    that cannot be.
    """
    mechanism = plan.counts(cells)
    if mechanism is not None:
        values, deviation = _opened(mechanism, total, hospitals)
        matrices = values.reshape(len(cells), plan.classes, plan.classes)
        return GroupsOpened(plan, cells, tuple(NoisedEvaluation(matrix, deviation) for matrix in matrices))
    if total.dtype != torch.int64 or total.shape != (plan.counts_length(cells),):
        raise ProtocolError("the opened counts of groups have another shape", SAME_VERSION)
    parts = total.reshape(len(cells), -1)
    opened = GroupsOpened(plan, cells, tuple(decode_evaluation(part, plan.classes) for part in parts))
    if whole is not None:
        _require_parts_of(whole, cells, parts)
    return opened


def _require_parts_of(whole: Evaluation, cells: Sequence[Cell], parts: torch.Tensor) -> None:
    """Raise `ProtocolError` where the groups of an attribute have more together than all test patients."""
    of_all = encode_evaluation(whole, whole.records)
    for attribute in {cell.attribute for cell in cells}:
        rows = [number for number, cell in enumerate(cells) if cell.attribute == attribute]
        if bool((parts[rows].sum(dim=0) > of_all).any()):
            raise ProtocolError(
                f"the opened counts of groups by {attribute} exceed those of all test patients",
                "a hospital does not follow the protocol",
            )
