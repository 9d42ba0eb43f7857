"""Answers that somebody's own data give: what `mpc-fl init --data` takes from a folder or a table, unless it was said. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from mpc_fl.apps.first_configuration import Answers, Films
from mpc_fl.learning.data.column_guesses import GuessedTable
from mpc_fl.learning.data.dicom_files import COLOUR, FIRST_FRAME
from mpc_fl.learning.data.first_look import FilmsFound
from mpc_fl.learning.data.image_files import PADDED, RESIZED


def with_table(answers: Answers, found: GuessedTable, given: Collection[str] = ()) -> Answers:
    """The answers with what a table seems to hold, but for those that were `given`."""
    classes = answers.classes if "classes" in given else found.classes
    return replace(
        answers,
        classes=classes,
        label_column=found.label_column or answers.label_column,
        patient_column=found.patient_column,
        columns=tuple(column.name for column in found.columns),
        guesses=found.columns,
        identifiers=found.left_out,
    )


def with_films(answers: Answers, found: FilmsFound, given: Collection[str] = ()) -> Answers:
    """The answers with the classes of a folder, but for those that were `given`, and what says whose its films are."""
    classes = answers.classes if "classes" in given else found.classes
    return replace(answers, classes=classes, films=Films(found.patients_from))


def with_sizes(answers: Answers, found: FilmsFound) -> Answers:
    """The answers with what becomes of the films of a folder at the size that was chosen; some of them are read."""
    done = found.treatments(answers.image_size)
    films = Films(
        found.patients_from,
        other_sizes=bool(done[RESIZED] + done[PADDED]),
        not_square=bool(done[PADDED]),
        several_frames=bool(done[FIRST_FRAME]),
        colours=bool(done[COLOUR]),
    )
    return replace(answers, films=films)
