"""A first configuration with comments, from a few answers and what was found in somebody's data: what `mpc-fl init` writes. Pure.

Its values are those of the files in `configs/`, which say what they reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import yaml

from mpc_fl.config.columns import ColumnSection, plain_name
from mpc_fl.config.data import FETCHED_WEIGHTS

Source = Literal["phantoms", "images", "csv"]
Backbone = Literal["efficientnet_lite0", "scattering", "none"]

SMALLEST_FOR_FULL_BATCHES = 2000  # patients of a hospital up to which every step takes all of them
LARGEST_OVER_SMALLEST = 4  # what is assumed of hospitals without privacy.largest_hospital
_TABLE_BATCH = 64
_NORMALISE_NOISE = 21.6  # over epsilon: a tenth of the budget


@dataclass(frozen=True)
class Films:
    """What is known of the films at the hospital of whoever begins.

    `patients_from`: what says whose they are, in some words, None where nothing does. `other_sizes`: some are to be resized,
    `not_square`, `several_frames`, `colours`: some are so.
    """

    patients_from: str | None
    other_sizes: bool = False
    not_square: bool = False
    several_frames: bool = False
    colours: bool = False


@dataclass(frozen=True)
class Answers:
    """What somebody who begins says of the federation. `name` is of its runs, in reports and ledgers.

    `smallest_hospital`: the fewest training patients of any hospital, which is public; `shared_out` where it is so many that
    each has if all hospitals share what was found, and `largest_hospital` then the most that one has. `backbone`: what gives
    the features of images. `columns` are the names of a table's columns that become features, `guesses` what some of them may
    be, and `identifiers` those that are never read. `films`: what was found in a folder.
    """

    source: Source = "phantoms"
    classes: tuple[str, ...] = ("normal", "bacterial", "viral")
    hospitals: int = 3
    epsilon: float = 8.0
    smallest_hospital: int = 800
    largest_hospital: int | None = None
    shared_out: bool = False
    backbone: Backbone = "efficientnet_lite0"
    columns: tuple[str, ...] = ("age", "crp")
    label_column: str = "label"
    patient_column: str | None = None
    guesses: tuple[ColumnSection, ...] = ()
    identifiers: tuple[str, ...] = ()
    films: Films | None = None
    name: str = "phantoms"

    @property
    def image_size(self) -> int:
        """Pixels of each side of an image."""
        return 224 if self.backbone == "efficientnet_lite0" else 64


def first_configuration(answers: Answers) -> str:
    """The text of a YAML configuration."""
    lines = [
        "# Written by mpc-fl init. Every party needs this file; only `site` may differ (mpc-fl config explain site).",
        "# What is not said here has a default: mpc-fl config explain lists all settings.",
        f"name: {_written(answers.name)}    # of its runs, in reports and privacy ledgers",
        *_data(answers),
        *_training(answers),
        *_privacy(answers),
        "federation:",
        f"  hospitals: {answers.hospitals}",
    ]
    if answers.source != "phantoms":
        lines += [
            "  # quorum: 2        # go on while so many hospitals are left; without it losing one ends the run",
            "  # addresses:       # who runs where, for mpc-fl party; on one machine mpc-fl train starts all",
            "  #   aggregator: aggregator.example.org:47100",
            "  #   hospital-0: hospital-0.example.org:47100   # and so for each hospital",
            "  # names: {hospital-0: charite}   # that sites chose, in logs and reports; certificates bind them (mpc-fl pki)",
            "  # session: 2026-01-first   # for mpc-fl party: a fresh name for each run",
        ]
    if answers.source == "images":
        lines += ["inference:", "  engine: fast       # encrypted diagnosis of images"]
    return "\n".join(lines) + "\n"


def _data(answers: Answers) -> list[str]:
    lines = ["data:", f"  source: {answers.source}", f"  classes: {_written(list(answers.classes))}"]
    if answers.source == "images":
        lines[1] += "     # DIR/{train,test}/<class>/ at every hospital"
        lines += [f"  image_size: {answers.image_size}    # pixels of each side", "  channels: 1        # grey"]
        resized = answers.backbone == "none" or (answers.films is not None and answers.films.other_sizes)
        lines += ["  wrong_size: resize" if resized else ""]
        lines += [] if answers.films is None else _films(answers.films)
    if answers.source == "images" and answers.backbone != "none":
        lines += ["  features:          # computed in the clear at each hospital, by something public"]
        lines += [f"    extractor: {answers.backbone}"]
        if answers.backbone in FETCHED_WEIGHTS:
            weights = FETCHED_WEIGHTS[answers.backbone]
            lines += [f"    weights: {weights}  # mpc-fl model fetch {answers.backbone}, once a machine"]
        else:
            lines += ["    mirror: false    # the mirror image costs as much again and was worth nothing"]
        lines += ["  normalise: secure  # takes the noised mean of all patients' features off"]
        noise = round(_NORMALISE_NOISE / answers.epsilon, 3) if answers.epsilon > 0 else 0  # which is refused
        lines += [f"  normalise_noise_multiplier: {min(1000.0, max(0.001, noise))}  # about a tenth of the budget"]
    if answers.source == "csv":
        lines[2] += "  # as one hospital's table has them; do others have more?" if answers.guesses else ""
        if answers.patient_column is None:
            lines += ["  unit: image        # no column says whose a row is: privacy is counted per row"]
        lines += ["  table:", f"    label_column: {_written(answers.label_column)}"]
        lines += [f"    patient_column: {_written(answers.patient_column)}  # null: every row counts by itself"]
        lines += _columns(answers)
    return [line for line in lines if line]


def _films(films: Films) -> list[str]:
    """What was found of films at one hospital, for all to look over."""
    lines = [
        "  # The following is guessed from some films at one hospital: look it over; all hospitals and diagnoses must do alike."
    ]
    if films.not_square:
        lines += ["  not_square: pad    # black beside films that are not square; or crop, stretch"]
    if films.several_frames:
        lines += ["  frame: first       # some files have several frames or slices; or middle, error"]
    if films.colours:
        lines += ["  # some films have colours, which become grey; set channels: 3 to keep them"]
    if films.patients_from is not None:
        return [*lines, f"  # whose a film is: by {films.patients_from}; see whether that is right"]
    return [
        *lines,
        "  # NOTHING SAYS WHOSE A FILM IS, and a run will be refused. Give DIR/patients.csv (file, patient), or:",
        "  # patient_pattern: '(P[0-9]+)[ _-]'   # the beginning of a file's name, with the patient in brackets",
        "  # unit: image                         # weaker: privacy is counted per image",
    ]


def _column(name: str, guesses: tuple[ColumnSection, ...]) -> str:
    guess = next((column for column in guesses if plain_name(column.name) == plain_name(name)), None)
    if guess is None:
        return f"      - {_written({'name': name, 'kind': 'number'})}"
    said = guess.model_dump(mode="json", exclude_defaults=True, exclude={"name", "kind"})
    line = f"      - {_written({'name': name, 'kind': guess.kind, **said})}"
    if guess.kind in ("number", "date"):
        line += "  # range: [low, high], of what can be, not of this table" + (
            ", in years" if guess.kind == "date" else ""
        )
    return line + ("  # other categories?" if guess.kind == "category" else "")


def _columns(answers: Answers) -> list[str]:
    """What all sites agree on about columns: names as given, and as comments what else may be said."""
    taken = [plain_name(name) for name in (*answers.columns, answers.label_column, answers.patient_column or "")]
    left = (*(column.name for column in answers.guesses), *answers.identifiers)  # what nobody chose is never read
    identifiers = [*{plain_name(name): name for name in left if plain_name(name) not in taken}.values()]
    guessed = "      # Guessed from the table of one hospital: look over every line, with all others."
    left_out = "# never read: numbers and names of people, free text, what is empty; look them over"
    return [
        "    columns:           # what all sites agree on; each file is read by these names, whatever the order (docs/data.md)",
        *([guessed] if answers.guesses else []),
        *(_column(name, answers.guesses) for name in answers.columns),
        "      # - {name: crp, kind: number, unit: mg/l, range: [0, 500], censored: half, missing: indicator}",
        "      # - {name: sex, kind: category, categories: [f, m, other], missing: leave_out}",
        '      # - {name: smoker, kind: boolean, missing: fill, fill: "no"}',
        "      # - {name: admitted, kind: date, since: 2020-01-01, range: [0, 10], order: day_month_year}",
        f"    identifiers: {_written(identifiers)}  {left_out}"
        if identifiers
        else "    # identifiers: [mrn]   # columns that are never read, at whoever has them",
    ]


def _training(answers: Answers) -> list[str]:
    if answers.source == "images" and answers.backbone != "none":
        full = answers.smallest_hospital <= SMALLEST_FOR_FULL_BATCHES
        batch = answers.smallest_hospital if full else SMALLEST_FOR_FULL_BATCHES
        return [
            "model:",
            "  architecture: linear",
            "training:",
            "  rounds: 12",
            "  local_steps: 5     # each a secure sum of its own",
            f"  batch_size: {batch}    # "
            + ("every patient is in every step" if full else "expected patients of a step"),
            f"  learning_rate: {30 if answers.epsilon > 1 else 15}  # large, because a clipped gradient is small",
            "  momentum: 0.9",
            "  average_last: 30",
        ]
    mlp = answers.source == "csv"
    batch = min(answers.smallest_hospital, _TABLE_BATCH if mlp else 250)
    return [
        "model:",
        f"  architecture: {'mlp' if mlp else 'small_cnn'}",
        *(["  hidden: [16]"] if mlp else []),
        "training:",
        f"  rounds: {5 if mlp else 8}",
        f"  local_steps: {10 if mlp else 14}",
        f"  batch_size: {batch}     # expected number of patients of a step and hospital",
        f"  learning_rate: {0.2 if mlp else 0.08}",
        "  momentum: 0.9",
    ]


def _privacy(answers: Answers) -> list[str]:
    features = answers.source == "images" and answers.backbone != "none"
    lines = [
        "privacy:",
        f"  epsilon: {answers.epsilon:g}         # for each patient, over all runs of a privacy ledger; noise is calibrated to it",
        f"  delta: {_delta(answers)}",
        f"  clipping_norm: {0.1 if features else 1.0}",
        f"  mechanism: {'distributed' if features else 'local'}   # mpc-fl config explain privacy",
    ]
    if answers.source != "phantoms":
        public = "public: the fewest training patients of any hospital; mpc-fl check counts them"
        if answers.shared_out:
            lines += [
                f"  # {public}. This is a round number below the share of",
                "  # each hospital if all share the data that were found; raise it where each has as many of its own.",
                f"  smallest_hospital: {answers.smallest_hospital}",
            ]
        else:
            lines += [f"  smallest_hospital: {answers.smallest_hospital}  # {public}"]
        if answers.largest_hospital is not None:
            lines += [
                f"  largest_hospital: {answers.largest_hospital}  # public: the most; without it four times the fewest"
            ]
    return lines


def _delta(answers: Answers) -> str:
    """A power of ten below one over the number of patients of a large hospital."""
    largest, exponent = max(LARGEST_OVER_SMALLEST * answers.smallest_hospital, answers.largest_hospital or 0), 3
    while 10**exponent <= 2 * largest:
        exponent += 1
    return f"1.0e-{max(4, exponent)}"


def _written(value: object) -> str:
    """A value as YAML on one line, texts in quotes where they would be read as something else."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
