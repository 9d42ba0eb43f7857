"""What is guessed of a folder or a table tells of no single patient, and is a configuration that reads the same data."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mpc_fl.config.config import Config
from mpc_fl.errors import DataError
from mpc_fl.learning.data.column_guesses import FEWEST_ROWS, guess_table
from mpc_fl.learning.data.first_look import look_at_films, look_at_table
from mpc_fl.learning.data.image_files import PADDED, RESIZED
from mpc_fl.learning.data.patients import FROM_HEADER, FROM_NAME, FROM_TABLE
from mpc_fl.learning.data.table_files import read_table_file
from mpc_fl.learning.data.tables import read_csv
from tests.learning.data.dicom_writing import write_dicom


def _table(path: Path, header: list[str], rows: list[list[str]], delimiter: str = ",") -> Path:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows([header, *rows])
    path.write_text(text.getvalue(), encoding="utf-8")
    return path


def test_the_columns_of_a_clinics_table(tmp_path: Path) -> None:
    header = ["Diagnose", "CRP [mg/l]", "Alter", "mrn", "Patient ID", "sex", "smoker", "Aufnahme", "remarks", "empty"]
    rows = [
        [
            "krank" if row % 2 else "gesund",
            "<0,5" if row == 0 else "" if row == 1 else f"{row * 1.3:.1f}".replace(".", ","),
            str(30 + row), str(1000 + row), f"P{row // 2}", "fm"[row % 2] if row else "divers", "ja" if row % 3 else "nein",
            f"{1 + row % 28}.{1 + row % 12}.2021", f"free text {row}", "",
        ]
        for row in range(40)
    ]  # fmt: skip
    found = look_at_table(_table(tmp_path / "t.csv", header, rows, ";"))
    assert found.classes == ("gesund", "krank") and (found.label_column, found.patient_column) == (
        "Diagnose",
        "Patient ID",
    )
    assert set(found.left_out) == {"mrn", "remarks", "empty"}
    columns = {column.name: column for column in found.columns}
    assert {name: column.kind for name, column in columns.items()} == {
        "CRP": "number", "Alter": "number", "sex": "category", "smoker": "boolean", "Aufnahme": "date",
    }  # fmt: skip
    crp = columns["CRP"]
    assert (crp.unit, crp.missing, crp.censored, crp.range) == ("mg/l", "indicator", "half", None)
    assert columns["Aufnahme"].order == "day_month_year"
    assert columns["sex"].categories == ("f", "m")  # the one patient who is neither is not named
    with pytest.raises(DataError, match="has no column 'outcome'"):
        look_at_table(tmp_path / "t.csv", "outcome")
    assert look_at_table(tmp_path / "t.csv", "SEX").classes == ("f", "m")


CELLS = {
    "number": st.floats(-1e3, 1e3).map("{:.2f}".format),
    "whole": st.integers(0, 10**6).map(str),
    "yes": st.sampled_from(["yes", "no"]),
    "colour": st.sampled_from(["red", "green", "blue"]),
    "day": st.dates().map(str),
    "text": st.text(st.characters(codec="ascii", categories=("L", "N")), max_size=30),
}


@given(data=st.data())
def test_what_is_guessed_reads_the_table_again_and_names_nothing_that_few_have(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kinds = data.draw(st.lists(st.sampled_from(sorted(CELLS)), min_size=1, max_size=6))
    rows = data.draw(st.integers(2 * FEWEST_ROWS, 30))
    columns = [data.draw(st.lists(CELLS[kind], min_size=rows, max_size=rows)) for kind in kinds]
    header = ["label", "patient", *(f"{kind} {number}" for number, kind in enumerate(kinds))]
    body = [["ab"[row % 2], f"p{row}", *(column[row] for column in columns)] for row in range(rows)]
    path = _table(tmp_path_factory.mktemp("table") / "t.csv", header, body)
    file = read_table_file(path, header)
    found = guess_table(file)
    assert {column.name for column in found.columns} | set(found.left_out) == set(header[2:])
    for column in found.columns:
        cells = columns[header.index(column.name) - 2]
        assert column.range is None and all(cells.count(name) >= FEWEST_ROWS for name in column.categories)
    sure = [column for column in found.columns if column.kind != "category"]
    if not sure:
        return
    table = {
        "patient_column": "patient",
        "identifiers": [name for name in header[2:] if name not in {column.name for column in sure}],
        "columns": [column.model_dump(mode="json") for column in sure],
    }
    values: dict[str, Any] = {"source": "csv", "classes": list(found.classes), "table": table}
    read = read_csv(path, Config().with_values(data=values, model={"architecture": "mlp"}), None)
    assert len(read.labels) == rows and np.isfinite(read.inputs).all()


def _film(path: Path, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 100).save(path)


def test_films_and_whose_they_are(tmp_path: Path) -> None:
    for number in range(20):
        _film(tmp_path / "train" / "well" / f"person{number}_a.png")
        _film(tmp_path / "test" / "ill" / f"person{100 + number}_a.png", (8, 8) if number else (12, 8))
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "well" / "notes.txt").write_text("none")
    found = look_at_films(tmp_path)
    assert found.classes == ("ill", "well") and dict(found.kinds) == {"PNG": 40}
    assert found.patients_from == FROM_NAME and len(found.sample) == 24
    assert found.treatments(8)[PADDED] == 1 and found.treatments(8)[RESIZED] == 0
    _film(tmp_path / "train" / "well" / "a.png")
    assert look_at_films(tmp_path).patients_from is None
    (tmp_path / "patients.csv").write_text("file,patient\n")
    assert look_at_films(tmp_path).patients_from == FROM_TABLE
    with pytest.raises(DataError, match="has no folders of classes with images.*train,test"):
        look_at_films(tmp_path / "train")


def test_films_whose_headers_say_it(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "ill"
    folder.mkdir(parents=True)
    for number in range(3):
        write_dicom(folder / f"IM{number}", np.zeros((8, 8), np.uint8))
    found = look_at_films(tmp_path)
    assert dict(found.kinds) == {"DICOM": 3} and found.patients_from == FROM_HEADER
    (folder / "IM9.dcm").write_bytes(b"damaged")
    assert look_at_films(tmp_path).treatments(8)  # one that cannot be read stops nobody who begins
