"""What the sections of a report read: a run's directory with its summary, read when a section needs it, and notes on gaps.

A file that is missing, damaged or of another version costs the section that needs it (`guarded`), not the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from mpc_fl.apps.report.markup import Markup, paragraph
from mpc_fl.apps.rows import HospitalRound, read_rows
from mpc_fl.apps.summaries import (
    AnyDiagnosisSummary,
    DiagnosisSummary,
    Header,
    PartySummary,
    ServedDiagnosisSummary,
    Summary,
    TrainingSummary,
)
from mpc_fl.chosen_names import ChosenNames
from mpc_fl.errors import DataError
from mpc_fl.roles import HOSPITAL, is_hospital, split_name

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A run directory; `content` is that of its summary.json. `config` is empty when config.yaml is unreadable."""

    directory: Path
    header: Header
    content: dict[str, Any]
    config: dict[str, Any]

    @cached_property
    def training(self) -> TrainingSummary:
        """The summary of a training run, or what one party's says of it. Raises `DataError` when it is damaged."""
        return self.party.as_training() if self.is_of_a_party else TrainingSummary.from_json(self.content)

    @cached_property
    def party(self) -> PartySummary:
        """The summary of one party of a training run. Raises `DataError` when it is damaged."""
        return PartySummary.from_json(self.content)

    @cached_property
    def diagnosis(self) -> AnyDiagnosisSummary:
        """The summary of an inference. Raises `DataError` when it is damaged."""
        served = self.header.kind == ServedDiagnosisSummary.KIND
        return (ServedDiagnosisSummary if served else DiagnosisSummary).from_json(self.content)

    @cached_property
    def names(self) -> ChosenNames:
        """What the parties are called; the names in the files are not trusted."""
        return ChosenNames.readable(self.header.names)

    @property
    def is_training(self) -> bool:
        """Whether hospitals trained in this run, and did not diagnose."""
        return self.header.kind == TrainingSummary.KIND or self.is_of_a_party

    @property
    def is_of_a_party(self) -> bool:
        """Whether this is the directory of one party that trained by itself, and has no other's files."""
        return self.header.kind == PartySummary.KIND

    def by_short_name(self, of: Mapping[str, T]) -> dict[str, T]:
        """The same by what parties are called in a figure."""
        return {self.names.short(party): value for party, value in of.items()}

    def file_of(self, party: str, name: str) -> str:
        """Where a file of a party lies, below the run's directory."""
        return name if self.is_of_a_party else f"parties/{party}/{name}"

    def parties(self) -> list[str]:
        """Names of the parties that left files, hospital-2 before hospital-10."""
        if self.is_of_a_party:
            return [self.party.party]
        return sorted((path.name for path in self.directory.glob("parties/*") if path.is_dir()), key=split_name)

    @property
    def hospital(self) -> str:
        """The hospital that asked, of an inference; untrusted like all else, so a name of another form counts as none."""
        return self.header.hospital if is_hospital(self.header.hospital) else HOSPITAL

    def classes(self, count: int) -> list[str]:
        """Names of the classes, or their numbers when the names on file do not fit `count` classes."""
        names = self.header.classes or (self.config.get("data") or {}).get("classes") or []
        return [str(name) for name in names] if len(names) == count else [f"class {index}" for index in range(count)]


def each(read: Callable[[str], T], names: Iterable[str]) -> tuple[dict[str, T], Markup]:
    """What could be read for each name, and a note on what could not."""
    found: dict[str, T] = {}
    notes = ""
    for name in names:
        try:
            found[name] = read(name)
        except DataError as error:
            notes += missing(str(error))
    return found, Markup(notes)


def hospital_rounds(run: Run) -> tuple[dict[str, list[HospitalRound]], Markup]:
    """The rounds of each hospital that left its metrics, and a note on what could not be read."""
    names = filter(is_hospital, run.parties())
    return each(lambda name: read_rows(HospitalRound, run.directory, run.file_of(name, "metrics.jsonl")), names)


def missing(what: str) -> Markup:
    """A line that stands for what cannot be shown."""
    return paragraph(f"Not shown: {what}.", "missing")


def guarded(build: Callable[[Run], Markup], run: Run) -> Markup:
    """What `build` makes, or one line that says why it cannot: files may be missing or of another version."""
    try:
        return build(run)
    except DataError as error:
        return missing(str(error))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return missing("the files of this part are not of the form that this version reads")


def skipped(summary: Summary) -> list[tuple[str, object, str]]:
    """A headline number where files were left out; a run that says nothing about it is of an older version."""
    count = summary.skipped_files
    return [("Skipped files", count, "could not be read and were left out")] if count else []
