"""Answers that somebody's own data give: what `mpc-fl init --data` takes from a folder or a table, unless it was said. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from mpc_fl.apps.first_configuration import LARGEST_OVER_SMALLEST, Answers, Films
from mpc_fl.learning.data.column_guesses import GuessedTable
from mpc_fl.learning.data.dicom_files import COLOUR, FIRST_FRAME
from mpc_fl.learning.data.first_look import FilmsFound
from mpc_fl.learning.data.image_files import PADDED, RESIZED

_UNREADABLE = 0.1  # of the files of a class, as data.most_unreadable allows


def with_table(answers: Answers, found: GuessedTable, given: Collection[str] = ()) -> Answers:
    """The answers with what a table seems to hold, but for those that were `given`."""
    classes = answers.classes if "classes" in given else found.classes
    columns = tuple(column.name for column in found.columns)
    return replace(
        answers,
        classes=classes,
        label_column=found.label_column or answers.label_column,
        patient_column=answers.patient_column if "patient_column" in given else found.patient_column,
        columns=answers.columns if "columns" in given else columns,
        guesses=found.columns,
        identifiers=found.left_out,
    )


def with_films(answers: Answers, found: FilmsFound, given: Collection[str] = ()) -> Answers:
    """The answers with the classes of a folder, but for those that were `given`, and what says whose its films are."""
    classes = answers.classes if "classes" in given else found.classes
    return replace(answers, classes=classes, films=Films(found.patients_from))


def with_patients(answers: Answers, training_patients: int) -> Answers:
    """The answers with public numbers of patients that hold for so many training patients, be they divided or one hospital's.

    Round ones: what is public says less of the data then.
    """
    # A tenth may be unreadable, and of each class a hospital may have one less.
    least = int((1 - _UNREADABLE) * training_patients) // answers.hospitals - len(answers.classes)
    smallest = _round_below(max(1, least))
    largest = None
    if training_patients > LARGEST_OVER_SMALLEST * smallest:
        largest = _round_below(training_patients - 1) + _step(training_patients - 1)
    return replace(answers, smallest_hospital=smallest, largest_hospital=largest, shared_out=True)


def _step(number: int) -> int:
    """1, 5, 50, 500, ... for numbers of so many digits."""
    return max(1, 10 ** (len(str(number)) - 1) // 2)


def _round_below(number: int) -> int:
    return number // _step(number) * _step(number)


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
