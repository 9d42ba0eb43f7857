"""What a run says about itself when it is over, one dataclass per kind of run: the content of summary.json.

`to_json` writes the keys in the order of the fields, `from_json` reads what any version wrote: a field with a default is one
that an earlier version did not record. `Header` is what every kind has, and all that a report cannot do without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from mpc_fl.apps.costs import PartyCosts
from mpc_fl.apps.group_scores import GroupScores
from mpc_fl.apps.scores import Scores
from mpc_fl.apps.typed_json import typed
from mpc_fl.audit.model_origin import ModelOrigin
from mpc_fl.errors import DataError
from mpc_fl.parsing import parse_json
from mpc_fl.roles import HOSPITAL, hospital_names

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Header:
    """What summaries of all kinds say; `hospital` is the one that asked, of a diagnosis. `names` are those that sites chose, by
    identity: all else in a summary says identities."""

    kind: str
    name: str = ""
    hospital: str = HOSPITAL
    synthetic: bool = False
    classes: list[str] | None = None
    command: str = "not recorded"
    versions: dict[str, str] | None = None
    names: dict[str, str] | None = None


@dataclass(frozen=True)
class ChosenRound:
    """The round whose model became that of the run, and the figures of all validated rounds, by their numbers as text."""

    round: int
    figures: dict[str, float]


@dataclass(frozen=True)
class FittedCalibration:
    """Temperature of the probabilities and class offsets of the decision, in logits."""

    temperature: float
    offsets: list[float]


@dataclass(frozen=True)
class PrivacySpent:
    """What the patients of a hospital have spent; `epsilon` and `noise_multiplier` are None without noise."""

    hospital: str
    epsilon: float | None
    delta: float
    noise_multiplier: float | None
    target_epsilon: float
    mechanism: str
    per_sample_gradients: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """Of `mpc-fl train` and `mpc-fl simulate`.

    `took_part` has the hospitals of each round, by its number as text; `lost` those that went.

    `final` is the last evaluation that was opened, after round `evaluated_round`. `shared_patients` counts test patients who
    are also training patients by name. `began_with` is the SHA-256 of the weights it began with, of others or of an earlier run.
    `unit` is what privacy is counted by, a patient unless it says otherwise, and `treatments` says to how many images of all
    hospitals was done what. `validation` is the opened validation of the final model where there is one, `chosen` the round that
    the model is of where it was chosen, `calibration` what was fitted to it, `groups` how groups of test patients fare with it.
    `simulated`: hospitals were no parties of their own, and nobody signed anything (`mpc-fl simulate`). `central`: all patients
    were in one place, and there was nothing to sum. `costs` are those of each party that ran on this machine.
    """

    KIND: ClassVar[str] = "train"

    name: str
    synthetic: bool
    rounds: int
    parameters: int
    hospitals: list[str]
    skipped_files: int | None = None
    seconds: float
    command: str
    versions: dict[str, str]
    final: Scores | None = None
    privacy: list[PrivacySpent]
    took_part: dict[str, list[str]] | None = None
    lost: list[str] | None = None
    evaluated_round: int | None = None
    shared_patients: int | None = None
    began_with: str | None = None
    unit: str | None = None
    treatments: dict[str, int] | None = None
    validation: Scores | None = None
    chosen: ChosenRound | None = None
    calibration: FittedCalibration | None = None
    simulated: bool = False
    groups: GroupScores | None = None
    names: dict[str, str] | None = None
    costs: dict[str, PartyCosts] | None = None
    central: bool = False

    def to_json(self) -> dict[str, Any]:
        """The content of summary.json."""
        return {"kind": self.KIND, **asdict(self)}

    @classmethod
    def from_json(cls, value: object, where: str = SUMMARY_FILE) -> TrainingSummary:
        """Raises `DataError` when `value` is not the content of such a file; `where` names it."""
        return typed(cls, value, where)

    @property
    def counted_unit(self) -> str:
        """What privacy is counted by, in a word."""
        return self.unit or "patient"

    def absences(self) -> dict[str, list[str]]:
        """Hospitals that took no part, by the number of the round; rounds that all took part in are left out."""
        missing = {
            number: [name for name in self.hospitals if name not in here]
            for number, here in (self.took_part or {}).items()
        }
        return {number: names for number, names in missing.items() if names}


@dataclass(frozen=True, kw_only=True)
class PartySummary:
    """Of `mpc-fl party` in training: what this party alone has of the run. The fields of a hospital stay at it.

    `patients` and `records` count its own by what they are for (train, test, validation), `class_counts` these records by class,
    `left_aside` what lies beside them and is none. `own_accuracy` is that of the final model on its own test records, None where
    it has none. `openings` counts what was opened to anybody. The aggregator
    has `final`, `groups` and `took_part` as `TrainingSummary`, and no `privacy`; among peers each hospital has all of them.
    `costs` has this party's alone.
    """

    KIND: ClassVar[str] = "party"

    name: str
    party: str
    synthetic: bool
    rounds: int
    rounds_made: int
    hospitals: int
    parameters: int
    seconds: float
    command: str
    versions: dict[str, str]
    classes: list[str]
    unit: str
    openings: int
    patients: dict[str, int] | None = None
    records: dict[str, int] | None = None
    class_counts: dict[str, list[int]] | None = None
    skipped_files: int | None = None
    left_aside: dict[str, int] | None = None
    treatments: dict[str, int] | None = None
    own_accuracy: float | None = None
    privacy: PrivacySpent | None = None
    final: Scores | None = None
    evaluated_round: int | None = None
    took_part: dict[str, list[str]] | None = None
    began_with: str | None = None
    groups: GroupScores | None = None
    names: dict[str, str] | None = None
    costs: dict[str, PartyCosts] | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of summary.json."""
        return {"kind": self.KIND, **asdict(self)}

    @classmethod
    def from_json(cls, value: object, where: str = SUMMARY_FILE) -> PartySummary:
        """Raises `DataError` when `value` is not the content of such a file; `where` names it."""
        return typed(cls, value, where)

    def as_training(self) -> TrainingSummary:
        """The same as that of a training run, as far as this party knows it: what sections of a report read."""
        return TrainingSummary(
            name=self.name,
            synthetic=self.synthetic,
            rounds=self.rounds,
            parameters=self.parameters,
            hospitals=hospital_names(self.hospitals),
            skipped_files=self.skipped_files,
            seconds=self.seconds,
            command=self.command,
            versions=self.versions,
            final=self.final,
            privacy=[] if self.privacy is None else [self.privacy],
            took_part=self.took_part,
            evaluated_round=self.evaluated_round,
            began_with=self.began_with,
            unit=self.unit,
            treatments=self.treatments,
            groups=self.groups,
            names=self.names,
            costs=self.costs,
        )


@dataclass(frozen=True)
class ImageResult:
    """The diagnosis of one image, as in results.jsonl; the probabilities are None where the class alone was opened.

    `label` is the index of the true class, -1 where it is unknown, `predicted` that of the class diagnosed.
    """

    index: int
    name: str
    label: int
    predicted: int
    probabilities: list[float] | None
    logits: list[float] | None
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """The encrypted diagnoses beside those of the same network in the clear."""

    largest_logit_difference: float | None
    classes_agree: bool
    plaintext_seconds_per_image: float


@dataclass(frozen=True, kw_only=True)
class DiagnosisSummary:
    """Of `mpc-fl infer` with all parties on this machine; `model_file` says whether the model is the one that was signed.

    `unreported` says why summary.json and the report could not be written, so it stands in none. `costs` are by party.
    """

    KIND: ClassVar[str] = "infer"
    hospital: ClassVar[str] = HOSPITAL
    refused: ClassVar[None] = None
    revealed: ClassVar[None] = None

    name: str
    synthetic: bool
    images: int
    skipped_files: int | None = None
    classes: list[str]
    seconds: float
    seconds_per_image: float
    command: str
    versions: dict[str, str]
    comparison: Comparison | None = None
    model_file: ModelOrigin | None = None
    unreported: str | None = None
    results: list[ImageResult] | None = None
    names: dict[str, str] | None = None
    costs: dict[str, PartyCosts] | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of summary.json."""
        return {"kind": self.KIND, **asdict(self)}

    @classmethod
    def from_json(cls, value: object, where: str = SUMMARY_FILE) -> DiagnosisSummary:
        """Raises `DataError` when `value` is not the content of such a file; `where` names it."""
        return typed(cls, value, where)


@dataclass(frozen=True, kw_only=True)
class ServedDiagnosisSummary:
    """Of `mpc-fl infer` at a hospital that asks a model owner that stays up; `refused` says why not all was answered.

    `revealed` is what that opens: 'label' or 'logits'. `costs` has those of this hospital.
    """

    KIND: ClassVar[str] = "ask"
    skipped_files: ClassVar[None] = None
    comparison: ClassVar[None] = None
    model_file: ClassVar[None] = None

    name: str
    hospital: str
    synthetic: bool
    images: int
    classes: list[str]
    seconds: float
    seconds_per_image: float
    command: str
    versions: dict[str, str]
    refused: str | None = None
    revealed: str | None = None
    unreported: str | None = None
    results: list[ImageResult] | None = None
    names: dict[str, str] | None = None
    costs: dict[str, PartyCosts] | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of summary.json."""
        return {"kind": self.KIND, **asdict(self)}

    @classmethod
    def from_json(cls, value: object, where: str = SUMMARY_FILE) -> ServedDiagnosisSummary:
        """Raises `DataError` when `value` is not the content of such a file; `where` names it."""
        return typed(cls, value, where)


AnyDiagnosisSummary = DiagnosisSummary | ServedDiagnosisSummary
Summary = TrainingSummary | PartySummary | DiagnosisSummary | ServedDiagnosisSummary
KINDS: Mapping[str, type[Summary]] = {
    kind.KIND: kind for kind in (TrainingSummary, PartySummary, DiagnosisSummary, ServedDiagnosisSummary)
}


def parse_summary(text: str) -> tuple[Header, dict[str, Any]]:
    """Header and whole content of a summary.json, which its kind's `from_json` reads.

    Raises `DataError` when the text is no JSON object, its kind is unknown, or what all kinds have is damaged.
    """
    try:
        content = parse_json(text)
    except ValueError as error:
        raise DataError(f"{SUMMARY_FILE} cannot be read: {error}") from None
    header = typed(Header, content, SUMMARY_FILE)
    if header.kind not in KINDS:
        raise DataError(f"{SUMMARY_FILE} is of an unknown kind")
    return header, content
