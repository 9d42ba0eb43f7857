"""What a run will do with the data, said beforehand: every file is read that training will read, and nothing is kept of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpc_fl.config.config import Config
from mpc_fl.config.data import KERMANY_NAMES
from mpc_fl.errors import DataError
from mpc_fl.learning.data.file_kinds import UnreadableImageError
from mpc_fl.learning.data.image_files import ImageForm, read_image
from mpc_fl.learning.data.loading import records_per_hospital
from mpc_fl.learning.data.patients import FROM_HEADER, FROM_NAME, FROM_TABLE, TABLE_FILE, read_table
from mpc_fl.learning.data.reading import nothing_of_class, require_readable
from mpc_fl.learning.data.records import Index, is_one_hospitals
from mpc_fl.learning.data.table_columns import OUTSIDE
from mpc_fl.learning.data.tables import Part

_MANY_IMAGES = 20  # of one patient, on average: a pattern that takes a word for a patient gives more
_FEW_FILES = 20  # fewer say nothing about their names
_MANY_OUTSIDE = 0.1  # of the values of a column: more are hardly those of unusual patients
_NAMED = 5  # unreadable files that are named
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class PartCounts:
    """What can be read of one part: patients, records, and records of each class."""

    patients: int
    records: int
    class_counts: list[int]


@dataclass(frozen=True)
class Survey:
    """Of all hospitals whose data are here: files or records of both splits, and patients of whom something can be read, each
    counted once.

    `treatments` says to how many images what was done, `left_aside` what else lies in the folders, `patients_from` how many
    readable files have their patient from where, `first_unreadable` names some files and what to do about them. `parts` counts
    what can be read by what it is for. `training_patients` are those of each hospital of whom something can be read.
    `patient_table` says how the table of patients was read, None without one.
    """

    records: int
    patients: int
    unreadable: int
    unit: str
    parts: dict[str, PartCounts]
    training_patients: list[int]
    treatments: dict[str, int]
    left_aside: dict[str, int]
    patients_from: dict[str, int]
    patient_table: str | None
    first_unreadable: list[str]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Its fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _SplitSurvey:
    """Of one split, what `Survey` adds up."""

    index: Index
    rows: set[int]
    unreadable: dict[int, UnreadableImageError]
    treatments: Counter[str]
    patients_left: list[int]

    @property
    def readable(self) -> list[int]:
        """The rows that training or testing will have."""
        return sorted(self.rows - set(self.unreadable))

    @property
    def keys(self) -> set[str]:
        """The patients of whom something can be read."""
        return {self.index.patients[row] for row in self.readable}

    def counts(self, classes: int) -> PartCounts:
        """What can be read, of so many classes."""
        of_class = Counter(self.index.labels[self.readable].tolist())
        return PartCounts(len(self.keys), len(self.readable), [of_class[label] for label in range(classes)])


def survey(config: Config) -> Survey:
    """Read all that training and testing will read. Raises what `load_hospital` would raise, before any process starts."""
    parts: tuple[Part, ...] = ("train", "test", "validation") if config.data.validation_fraction else ("train", "test")
    found = [_survey_of(config, part) for part in parts]
    keys = set[str]().union(*(of.keys for of in found))
    sources, left_aside, treatments = Counter[str](), Counter[str](), Counter[str]()
    for of in found:
        sources.update(of.index.sources[row] for row in of.readable if of.index.sources)
        treatments.update(of.treatments)
    for of in found[:2]:  # who validate lie in the folders of those who train
        left_aside.update(of.index.left_aside)
    records, unreadable = sum(len(of.rows) for of in found), sum(len(of.unreadable) for of in found)
    return Survey(
        records=records,
        patients=len(keys),
        unreadable=unreadable,
        unit=config.data.unit,
        parts={part: of.counts(len(config.data.classes)) for part, of in zip(parts, found, strict=True)},
        training_patients=found[0].patients_left,
        treatments=dict(treatments),
        left_aside=dict(left_aside),
        patients_from=dict(sources),
        patient_table=_patient_table(config) if sources[FROM_TABLE] else None,
        first_unreadable=[str(error) for of in found for error in of.unreadable.values()][:_NAMED],
        warnings=[
            *(_warnings(sources, sorted(keys), records - unreadable, config) if sources else ()),
            *_warnings_of_columns(config, treatments, records),
            *_lacks(found, parts, config),
        ],
    )


def _patient_table(config: Config) -> str | None:
    table = read_table(config.site.data or Path())
    return None if table is None else table.read_as


def patient_warnings(config: Config) -> list[str]:
    """What looks wrong about whose the images are, from names and headers alone. Raises what `load_hospital` would raise."""
    if config.data.source != "images":
        return []
    sources, keys = Counter[str](), set[str]()
    parts: tuple[Part, ...] = ("train", "test", "validation") if config.data.validation_fraction else ("train", "test")
    for part in parts:
        index, hospitals = records_per_hospital(config, part)
        for row in set().union(*hospitals):
            sources[index.sources[row]] += 1
            keys.add(index.patients[row])
    return _warnings(sources, sorted(keys), sources.total(), config) if keys else []


def _survey_of(config: Config, part: Part) -> _SplitSurvey:
    index, parts = records_per_hospital(config, part)
    rows, unreadable = set().union(*parts), dict[int, UnreadableImageError]()
    treatments, form = index.treatments_of(rows), ImageForm.of(config.data)
    for row in sorted(rows) if index.files else []:
        try:
            treatments.update(read_image(index.files[row], form).treatments)
        except UnreadableImageError as error:
            unreadable[row] = error
    for label in range(len(config.data.classes)) if index.files else ():
        of_class = [row for row in sorted(rows) if index.labels[row] == label]
        lacks_class = not (index.labels == label).any() and not is_one_hospitals(config)
        if lacks_class or (of_class and all(row in unreadable for row in of_class)):
            raise nothing_of_class(label, unreadable[of_class[0]] if of_class else None, config)
    left = []
    for own in parts:
        failed = {place: unreadable[row] for place, row in enumerate(own) if row in unreadable}
        require_readable([int(index.labels[row]) for row in own], failed, part, config)
        left.append(len({index.patients[row] for row in own if row not in unreadable}))
        if not left[-1] and failed:
            first = next(iter(failed.values()))
            raise DataError(f"no {part} image can be read; the first: {first.what}", first.fix)
    return _SplitSurvey(index, rows, unreadable, treatments, left)


def _warnings(sources: Counter[str], keys: Sequence[str], files: int, config: Config) -> list[str]:
    """What looks wrong about numbers of patients: only a person who knows the data can say whether it is."""
    said = []
    if files >= _FEW_FILES and files > _MANY_IMAGES * len(keys):
        said.append(
            f"{files} files and {len(keys)} patient{'s' if len(keys) > 1 else ''}: is that right? Anonymised headers may have one "
            "PatientID for all, and a pattern may take a word for a patient; a table patients.csv says it surely"
        )
    one_each = sources[FROM_NAME] >= _FEW_FILES and sources[FROM_NAME] == files == len(keys)
    if one_each and not _are_serial(keys) and config.data.patient_pattern != KERMANY_NAMES:
        said.append(
            f"{files} files, {files} patients: data.patient_pattern makes each file a patient. If patients have several, epsilon "
            "holds per image, not per patient; a table patients.csv says whose they are"
        )
    if one_each and _are_serial(keys):
        said.append(
            f"{files} files, {files} patients with serial numbers: do the names number patients, or images? If images, epsilon "
            "holds per image, not per patient; a table patients.csv says whose they are"
        )
    if any(key.removeprefix("NORMAL2-").startswith("IM-") for key in keys) and sources[FROM_NAME]:
        said.append(
            "patients are the first numbers of names like IM-0123-0001: right for the public chest X-rays; viewers that export "
            "pictures number series so, and a patient may have several"
        )
    if sources[FROM_HEADER] and sources[FROM_NAME]:
        said.append(
            f"{sources[FROM_HEADER]} files have their patient from DICOM headers and {sources[FROM_NAME]} from their names: a "
            "patient under both counts twice; a table patients.csv mends that"
        )
    table = read_table(config.site.data or Path()) if sources[FROM_TABLE] else None
    validating = 0 if table is None else sum(row.split == "validation" for row in table.rows.values())
    if validating:
        said.append(
            f"{TABLE_FILE} names {validating} file{'s' if validating > 1 else ''} for validation; data.validation_fraction says "
            "how many patients validate, and a hash which: the table does not"
        )
    return said


def _lacks(found: Sequence[_SplitSurvey], parts: Sequence[Part], config: Config) -> list[str]:
    """What one hospital by itself has nobody of, which is no error there and may be a mistake."""
    if not is_one_hospitals(config):
        return []
    said = []
    for of, part in zip(found, parts, strict=True):
        here = {int(of.index.labels[row]) for row in of.rows}
        missing = [name for label, name in enumerate(config.data.classes) if label not in here]
        if not here:
            said.append(f"no {part} patients here: this hospital adds zeros to what is counted of them")
        elif missing:
            said.append(f"no {part} patient of {', '.join(missing)} here")
    return said


def _warnings_of_columns(config: Config, treatments: Mapping[str, int], records: int) -> list[str]:
    """Columns of which many values lie outside of the public range: perhaps they have another unit here."""
    said = []
    for column in config.data.table.columns or ():
        count = treatments.get(f"'{column.name}' {OUTSIDE}", 0)
        if count > _MANY_OUTSIDE * records:
            unit = "in the agreed unit" if column.unit is None else f"in {column.unit}"
            said.append(
                f"{count} of {records} values of '{column.name}' lie outside of its range: see whether they are {unit}"
            )
    return said


def _are_serial(keys: Sequence[str]) -> bool:
    """Whether the last numbers of all keys follow each other nearly without gaps."""
    numbers = [int(found[-1]) for found in map(_NUMBER.findall, keys) if found]
    return len(set(numbers)) == len(keys) and max(numbers) - min(numbers) < 1.1 * len(keys)
