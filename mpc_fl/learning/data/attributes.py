"""What is known of a record beside its image or row: sex, age, scanner; and in which group of each attribute it therefore is.

Which groups there are is public (`config.groups`); which a record is in never leaves the hospital but in sums. What cannot be
read counts as unknown: it is nothing that training needs, so no file is refused for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpc_fl.config.columns import plain_name
from mpc_fl.config.groups import SITE, UNKNOWN, GroupsSection, age_band_names
from mpc_fl.learning.data.partition import generator
from mpc_fl.roles import hospital_names

_AGE = re.compile(r"([0-9]{1,3})(?:[.,][0-9]+)?\s*(y|m|w|d|)")  # DICOM writes 045Y, 006M, 010W, 003D
_PER_YEAR = {"": 1, "y": 1, "m": 12, "w": 52, "d": 365}
_PHANTOMS = {"train": 13, "test": 14}
_UNKNOWN_SHARE = 0.05  # of phantoms, in each attribute


@dataclass(frozen=True)
class Attributes:
    """Of one record, as they are written at the hospital; '' where nothing is."""

    sex: str = ""
    age: str = ""
    scanner: str = ""


@dataclass(frozen=True)
class Attribute:
    """One attribute by which test patients are grouped, and its groups in order, the unknown ones last."""

    name: str
    groups: tuple[str, ...]


def attributes_of(section: GroupsSection, hospitals: int) -> tuple[Attribute, ...]:
    """All attributes of a run with so many hospitals, from public values alone."""
    named = {
        "sex": section.sex,
        "age": age_band_names(section.age_bands),
        "scanner": section.scanner,
    }
    found = [Attribute(name, (*named[name], UNKNOWN)) for name in section.recorded]
    return (*found, Attribute(SITE, tuple(hospital_names(hospitals)))) if section.site else tuple(found)


def age_in_years(text: str) -> int | None:
    """Completed years of an age as tables and DICOM headers write it; None for what is none, or above 130."""
    written = _AGE.fullmatch(text.strip().casefold())
    if written is None:
        return None
    years = int(written[1]) // _PER_YEAR[written[2]]
    return years if years <= 130 else None


def group_numbers(
    section: GroupsSection, known: Sequence[Attributes], rank: int, records: int
) -> dict[str, torch.Tensor]:
    """The group of each of so many records of hospital `rank`, int64 (records,), by attribute.

    `known` may be empty, where nothing is known of any.
    """
    known = known or [Attributes()] * records
    numbers: dict[str, list[int]] = {
        "sex": [_category(section.sex, of.sex) for of in known],
        "age": [_band(section.age_bands, of.age) for of in known],
        "scanner": [_category(section.scanner, of.scanner) for of in known],
    }
    found = {name: torch.tensor(numbers[name], dtype=torch.int64) for name in section.recorded}
    return found | ({SITE: torch.full((records,), rank, dtype=torch.int64)} if section.site else {})


def _category(categories: tuple[str, ...], value: str) -> int:
    """The number of a category, that of the unknown where it is none."""
    plain = [plain_name(name) for name in categories]
    return plain.index(plain_name(value)) if plain_name(value) in plain else len(plain)


def _band(edges: tuple[int, ...], value: str) -> int:
    years = age_in_years(value)
    return len(edges) + 1 if years is None else sum(years >= edge for edge in edges)


def phantom_attributes(section: GroupsSection, patients: Sequence[int], seed: int, split: str) -> list[Attributes]:
    """Made-up attributes of the patients of phantom records, which say nothing about their images; from public numbers alone."""
    draw = generator(seed, _PHANTOMS[split])
    count = max(patients, default=-1) + 1
    chances, ages = draw.random((count, 2)), draw.integers(0, 91, count)
    unknown = draw.random((count, 3)) < _UNKNOWN_SHARE

    def one_of(categories: tuple[str, ...], chance: float) -> str:
        return categories[int(chance * len(categories))] if categories else ""

    made = [
        Attributes(
            "" if unknown[patient, 0] else one_of(section.sex, chances[patient, 0]),
            "" if unknown[patient, 1] else str(ages[patient]),
            "" if unknown[patient, 2] else one_of(section.scanner, chances[patient, 1]),
        )
        for patient in range(count)
    ]
    return [made[patient] for patient in patients]
