"""Who counts as a patient, and where records come from: spellings, suffixes and names of classes that would make it false."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mpc_fl.config.config import Config, parse_config
from mpc_fl.errors import ConfigError, DataError
from mpc_fl.learning.data.loading import load_hospital, shared_patients
from mpc_fl.learning.data.patients import FROM_HEADER, owners_of
from mpc_fl.learning.data.spellings import in_one_spelling, plain_patient
from mpc_fl.learning.data.survey import patient_warnings
from tests.learning.data.dicom_writing import write_dicom

_SPELLINGS = ("M\u00fcller 7", "Mu\u0308ller  7", "M\u00dcLLER 7", "\uff2d\u00fcller 7", "M\u00fcl\u200bler 7")


def _config(
    root: Path, classes: tuple[str, ...] = ("ill", "well"), site: dict[str, Any] | None = None, **data: Any
) -> Config:
    values = {"data": {"source": "images", "classes": classes, "image_size": 8, "wrong_size": "resize", **data}}
    of_site = {
        "data": str(root),
        "data_of": "hospital",
        "patient_key": str(root.parent / "patient.key"),
        **(site or {}),
    }
    return parse_config({**values, "site": of_site, "privacy": {"mechanism": "none"}}, "a test")


def _png(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), 90).save(path, format="PNG")
    return path


def _scan(path: Path, patient: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_dicom(path, np.arange(64, dtype=np.uint8).reshape(8, 8), PatientID=patient)
    return path


def test_a_table_of_patients_with_several_spellings(tmp_path: Path) -> None:
    root = tmp_path / "d"
    files = [_png(root / "train" / "ill" / f"{row}.png") for row in range(len(_SPELLINGS) + 1)]
    rows = [f"{row}.png,{name}\n" for row, name in enumerate([*_SPELLINGS, "M\u00fcller 8"])]
    (root / "patients.csv").write_text("file,patient\n" + "".join(rows), encoding="utf-8")
    keys = owners_of(files, _config(root)).keys
    assert len(set(keys[:-1])) == 1 and keys[-1] != keys[0]


def test_a_patient_who_trains_under_one_spelling_tests_under_none(tmp_path: Path) -> None:
    root = tmp_path / "d"
    for name in ("P01_a", "P02_a", "P03_a"):
        _png(root / "train" / "ill" / f"{name}.png")
    for name in ("p01_b", "P09_b"):
        _png(root / "test" / "ill" / f"{name}.png")
    config = _config(root, patient_pattern=r"([Pp]\d+)_")
    assert shared_patients(config).names == ("p01",)
    assert load_hospital(config, 0, "test").names == ("P09_b.png",)


def test_a_column_of_patients_with_several_spellings(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    rows = [f"{number},{row % 2},{row}\n" for row, number in enumerate(["a1", "A1", "0012", "12", "13"])]
    table.write_text("pid,label,age\n" + "".join(rows))
    data = {
        "source": "csv",
        "table": {"patient_column": "pid", "columns": [{"name": "age"}], "test_fraction": 1e-9},
        "image_size": 32,
    }
    assert load_hospital(_config(table, **data), 0, "train").patient_count == 3


def test_another_seed_tests_no_patient_who_trained(tmp_path: Path) -> None:
    """Exact counts of test patients are in no privacy ledger: over some seeds they were of everybody who was promised epsilon."""
    table = tmp_path / "t.csv"
    table.write_text("pid,label,age\n" + "".join(f"p{row},{row % 2},{row}\n" for row in range(80)))
    data = {"source": "csv", "table": {"patient_column": "pid", "columns": [{"name": "age"}]}}
    config = _config(table, **data)
    first = load_hospital(config, 0, "test").names
    assert 0 < len(first) < 80
    assert all(load_hospital(config.with_values(seed=seed), 0, "test").names == first for seed in (1, 2, 3))


def test_an_archive_with_several_spellings(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    of = {
        "images": np.zeros((4, 8, 8), np.uint8),
        "labels": np.array([0, 1, 0, 1]),
        "patients": np.array(["a", "A", "b", "B "]),
    }
    np.savez(path, **{f"{split}_{name}": values for split in ("train", "test") for name, values in of.items()})
    assert load_hospital(_config(path, source="npz", shared_patients="keep"), 0, "train").patient_count == 2


def test_a_film_is_that_of_its_header_whatever_its_name(tmp_path: Path) -> None:
    """A DICOM file called .png was read as DICOM, and its patient taken from its name: one patient under two keys."""
    root = tmp_path / "d"
    files = [_scan(root / "train" / "ill" / name, "4711") for name in ("person1_a.dcm", "person2_b.png", "person3_c")]
    owners = owners_of(files, _config(root))
    assert set(owners.sources) == {FROM_HEADER} and len(set(owners.keys)) == 1


@given(st.text(st.characters(categories=("L", "N", "P", "S", "M"), codec="utf-8"), min_size=1, max_size=20))
def test_forms_of_a_name_are_one_patient(name: str) -> None:
    forms = [
        name,
        *(unicodedata.normalize(form, name) for form in ("NFC", "NFD", "NFKC", "NFKD")),
        f" {name} ",
        f"{name}\u200b",
    ]
    assert len({plain_patient(form) for form in forms}) == 1 and len(set(in_one_spelling(forms))) == 1


@given(st.lists(st.text("aAbB0 1", min_size=1, max_size=4)), st.randoms())
def test_the_spelling_of_a_patient_depends_on_nobody_else(names: list[str], random: Any) -> None:
    spelt = dict(zip(names, in_one_spelling(names), strict=True))
    patient = random.choice(names) if names else "a"
    own = [name for name in names if plain_patient(name) == plain_patient(patient)]
    assert in_one_spelling(own) == [spelt[name] for name in own]


@pytest.mark.parametrize(
    "name", ["../../private/secret", "..", ".", "a/b", "a\\b", ".git", " ", "", "a\x1b[2J", "a\nb", "x" * 300]
)
def test_a_class_is_no_way_to_another_folder_of_the_hospital(tmp_path: Path, name: str) -> None:
    """The configuration comes from the coordinator: ../../private/secret had a hospital train on what it had not given."""
    _png(tmp_path / "private" / "secret" / "person1_a.png")
    with pytest.raises(ConfigError, match="class"):
        _config(tmp_path / "d", classes=("ill", name))


def test_classes_of_tables_may_have_a_slash(tmp_path: Path) -> None:
    table = {"table": {"columns": [{"name": "age"}]}}
    assert _config(tmp_path, classes=("n/a", "ill"), source="csv", **table).data.classes == ("n/a", "ill")
    with pytest.raises(ConfigError, match="can be seen"):
        _config(tmp_path, classes=("n\x1ba", "ill"), source="csv", **table)


@pytest.mark.parametrize("name", ["Patients.CSV", "patients.csv.txt", "patients.xlsx"])
def test_no_table_of_patients_is_passed_over(tmp_path: Path, name: str) -> None:
    """Without it each file was a patient by its name, and nobody said so."""
    files = [_png(tmp_path / "d" / "train" / "ill" / "person1_a.png")]
    (tmp_path / "d" / name).write_text("file,patient\nperson1_a.png,P1\n")
    with pytest.raises(DataError, match=r"only patients.csv is read"):
        owners_of(files, _config(tmp_path / "d"))


def test_a_hospital_is_told_that_a_pattern_makes_each_file_a_patient(tmp_path: Path) -> None:
    """The coordinator writes it, and who does not call `check` did not hear of it."""
    for row in range(25):
        for split in ("train", "test"):
            _png(tmp_path / "d" / split / "ill" / f"{'abcde'[row % 5]}{row * row}_{split}.png")
    (warning,) = patient_warnings(_config(tmp_path / "d", patient_pattern="(.*)"))
    assert "50 files, 50 patients: data.patient_pattern makes each file a patient" in warning
    assert not patient_warnings(_config(tmp_path / "d", patient_pattern="(.*)_", shared_patients="keep"))


def test_no_patient_is_named_to_a_terminal_as_it_is_spelt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mpc_fl.apps.cli.options import say

    root = tmp_path / "d"
    for split in ("train", "test"):
        _png(root / split / "ill" / "\x1b[2J[b]1_a.png")
    found = shared_patients(_config(root, patient_pattern=r"(.*)_", shared_patients="keep"))
    assert len(found.names) == 1
    say(found.described)
    assert "\x1b" not in capsys.readouterr().out
    with pytest.raises(DataError) as refused:
        load_hospital(_config(root, patient_pattern=r"(.*)_", shared_patients="refuse"), 0, "test")
    assert "\x1b" not in str(refused.value)
