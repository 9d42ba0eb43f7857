"""What the steps found, read from their files: rows with intervals, comparisons, runs, diagnoses, audits. No text.

A file that is missing or damaged costs what it says, and `damaged` names it; the study's other results stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from case_study.runner import Record
from case_study.steps import Study
from mpc_fl.apps.audit_summary import AUDIT_FILE, AuditSummary
from mpc_fl.apps.comparing import read_run
from mpc_fl.apps.rows import GlobalRound, OwnModel, PartyTraffic, read_object
from mpc_fl.apps.shortcut_summary import SHORTCUTS_FILE, ShortcutSummary
from mpc_fl.apps.summaries import SUMMARY_FILE, DiagnosisSummary
from mpc_fl.apps.typed_json import typed
from mpc_fl.apps.views_summary import VIEWS_FILE, ViewsSummary
from mpc_fl.errors import MpcFlError
from mpc_fl.evidence.models_compared import FIGURES, JudgedRecords, differences
from mpc_fl.evidence.shortcuts_tested import Estimate
from mpc_fl.learning.data.survey import PartCounts
from mpc_fl.parsing import parse_json

T = TypeVar("T")
_TABLE = "-table"


@dataclass(frozen=True)
class Row:
    """One row of `chest_xray_table.py`: which network, who trained, at which epsilon (None: no privacy), and what it reached."""

    features: str
    row: str
    epsilon: float | None
    seeds: int
    spent: float | None
    seconds: float
    figures: dict[str, Estimate]


@dataclass(frozen=True)
class Predictions:
    """What the models of one row at one seed said: probabilities (models, records, classes)."""

    features: str
    row: str
    epsilon: float | None
    seed: int
    probabilities: list[list[list[float]]]


@dataclass(frozen=True)
class Truth:
    """Of test records."""

    labels: list[int]
    patients: list[int]


@dataclass(frozen=True)
class AccuracyTable:
    """The JSON of `chest_xray_table.py`."""

    command: str
    test: Truth
    table: list[Row]
    results: list[Predictions]

    def trainings(self, row: str, epsilon: float | None) -> list[np.ndarray]:
        """Of one row, by seed, each float64 (models, records, classes)."""
        of = sorted((at for at in self.results if (at.row, at.epsilon) == (row, epsilon)), key=lambda at: at.seed)
        return [np.array(at.probabilities) for at in of]

    @property
    def epsilons(self) -> list[float | None]:
        """In order, without privacy first."""
        found = {of.epsilon for of in self.table}
        return [epsilon for epsilon in (None, *sorted(found - {None}, reverse=True)) if epsilon in found]

    def federated(self, epsilon: float | None) -> str:
        """The row of the federation as it is meant: with distributed noise, or none."""
        return "local" if epsilon is None else "distributed"


@dataclass(frozen=True)
class Comparison:
    """How much better `first` is than `second` on the same patients, in accuracy and macro AUC."""

    network: str
    first: str
    second: str
    epsilon: float | None
    accuracy: Estimate
    area: Estimate

    @property
    def shown(self) -> bool:
        """Whether the interval of the accuracy leaves no difference out."""
        return self.accuracy.low > 0 or self.accuracy.high < 0


@dataclass(frozen=True)
class RunFound:
    """A run of `mpc-fl train` with real parties: what `mpc-fl compare` says of it, bytes that a hospital sent, seconds of the
    command, and own models beside the federation's, by hospital."""

    figures: Mapping[str, Any]
    bytes_sent: float | None
    own: dict[str, OwnModel] = field(default_factory=dict)


@dataclass(frozen=True)
class DiagnosisFound:
    """Encrypted diagnoses; `right` of those whose class is known."""

    summary: DiagnosisSummary
    known: int
    right: int


@dataclass(frozen=True)
class PeersFound:
    """membership.json of `peers.py`."""

    hospitals: list[str]
    newcomer: str
    leaver: str
    joined: dict[str, str]
    left: dict[str, str]
    one_model: bool
    blocks: int
    statuses: dict[str, int]
    rounds: list[GlobalRound]

    def rounds_with(self, hospital: str) -> list[int]:
        """The rounds of training that a hospital took part in."""
        return [of.round for of in self.rounds if of.round and hospital in of.hospitals]


@dataclass(frozen=True)
class Survey:
    """What `mpc-fl check` counted."""

    parts: dict[str, PartCounts]
    training_patients: list[int]


@dataclass(frozen=True)
class Findings:
    """All that there is; what was not run, or failed, is lacking."""

    study: Study
    records: dict[str, Record]
    tables: dict[str, AccuracyTable] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    runs: dict[str, RunFound] = field(default_factory=dict)
    diagnoses: dict[str, DiagnosisFound] = field(default_factory=dict)
    audits: dict[str, AuditSummary] = field(default_factory=dict)
    views: ViewsSummary | None = None
    shortcuts: ShortcutSummary | None = None
    peers: PeersFound | None = None
    survey: Survey | None = None
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def lacking(self) -> dict[str, str]:
        """Why a step has no result, by its name."""
        why = {name: of.said or of.outcome for name, of in self.records.items() if of.outcome != "done"}
        return why | self.damaged

    def row(self, features: str, row: str, epsilon: float | None) -> Row | None:
        """A row of a table that there is."""
        rows = self.tables[features].table if features in self.tables else []
        return next((of for of in rows if (of.row, of.epsilon) == (row, epsilon)), None)


def _run(directory: Path) -> RunFound:
    figures, sent, own = read_run(directory).figures(), list[int](), dict[str, OwnModel]()
    for place in sorted((directory / "parties").glob("hospital-*")):
        sent.append(read_object(PartyTraffic, place, "traffic.json").costs().total.bytes_sent)
        if (place / "own_model.json").exists():
            own[place.name] = read_object(OwnModel, place, "own_model.json")
    return RunFound(figures, sum(sent) / len(sent) if sent else None, own)


def _diagnosis(directory: Path) -> DiagnosisFound:
    summary = read_object(DiagnosisSummary, directory, SUMMARY_FILE)
    known = [of for of in summary.results or [] if of.label >= 0]
    return DiagnosisFound(summary, len(known), sum(of.label == of.predicted for of in known))


def _survey(study: Study) -> Survey:
    content = parse_json((study.out / "steps" / "check.stdout").read_text("utf-8"))
    data = content.get("data") if isinstance(content, dict) else None
    return typed(Survey, data, "check.stdout")


def _table(directory: Path) -> AccuracyTable:
    return read_object(AccuracyTable, directory, "table.json")


def comparisons_within(network: str, table: AccuracyTable) -> Iterator[Comparison]:
    """Federation against hospitals alone and against central training, distributed noise against local, and what privacy costs."""
    for epsilon in table.epsilons:
        own = table.federated(epsilon)
        pairs = {("federated", second): (own, second, epsilon) for second in ("alone", "central")}
        if epsilon is not None:
            pairs["distributed noise", "local noise"] = ("distributed", "local", epsilon)
            pairs["distributed noise", "no noise"] = ("distributed", "local", None)
        for names, (first, second, of_second) in pairs.items():
            sides = table.trainings(first, epsilon), table.trainings(second, of_second)
            if sides[0] and len(sides[0]) == len(sides[1]):
                yield _compared(network, names, epsilon, sides, table.test)


def comparisons_between(names: tuple[str, str], first: AccuracyTable, second: AccuracyTable) -> Iterator[Comparison]:
    """Federations with two networks, on the same test records, at each epsilon that both have."""
    if first.test != second.test:
        return
    for epsilon in first.epsilons:
        sides = tuple(of.trainings(of.federated(epsilon), epsilon) for of in (first, second))
        if sides[0] and len(sides[0]) == len(sides[1]):
            yield _compared("both", names, epsilon, (sides[0], sides[1]), first.test)


def _compared(
    network: str,
    names: tuple[str, str],
    epsilon: float | None,
    sides: tuple[list[np.ndarray], list[np.ndarray]],
    truth: Truth,
) -> Comparison:
    found = differences(*sides, JudgedRecords(np.array(truth.labels), np.array(truth.patients)))
    accuracy, area = (found[FIGURES.index(name)] for name in ("accuracy", "macro AUC"))
    return Comparison(network, *names, epsilon, accuracy, area)


def all_comparisons(study: Study, tables: Mapping[str, AccuracyTable]) -> list[Comparison]:
    """Of the tables that there are: some seconds each."""
    found = list[Comparison]()
    for name in (study.head, "small"):
        if name in tables:
            found += comparisons_within(name, tables[name])
    for other in ("small", "scattering"):
        if study.head in tables and other in tables and other != study.head:
            found += comparisons_between((study.head, other), tables[study.head], tables[other])
    return found


def collect(study: Study, records: dict[str, Record]) -> Findings:
    """Read the results of all steps that have come to their end."""
    damaged = dict[str, str]()

    def read(name: str, reader: Callable[[], T]) -> T | None:
        if name not in records or records[name].outcome != "done":
            return None
        try:
            return reader()
        except (MpcFlError, OSError, ValueError) as error:
            damaged[name] = f"its result cannot be read: {error}"
            return None

    def each(prefixes: tuple[str, ...], reader: Callable[[Path], T]) -> dict[str, T]:
        names = [name for name in records if name.startswith(prefixes) and not name.endswith(_TABLE)]
        found = {name: read(name, partial(reader, study.run(name))) for name in names}
        return {name: of for name, of in found.items() if of is not None}

    tables = dict[str, AccuracyTable]()
    for name in records:
        found = read(name, partial(_table, study.run(name))) if name.endswith(_TABLE) else None
        if found is not None:
            tables[study.head if name == "head-table" else name.removesuffix(_TABLE)] = found
    return Findings(
        study=study,
        records=records,
        tables=tables,
        comparisons=all_comparisons(study, tables),
        runs=each(("head-", "small-", "unequal-"), _run),
        diagnoses=each(("diagnosis-",), _diagnosis),
        audits=each(("membership-",), lambda place: read_object(AuditSummary, place, AUDIT_FILE)),
        views=read("views", lambda: read_object(ViewsSummary, study.run("views"), VIEWS_FILE)),
        shortcuts=read("shortcuts", lambda: read_object(ShortcutSummary, study.run("shortcuts"), SHORTCUTS_FILE)),
        peers=read("peers", lambda: read_object(PeersFound, study.run("peers"), "membership.json")),
        survey=read("check", lambda: _survey(study)),
        damaged=damaged,
    )
