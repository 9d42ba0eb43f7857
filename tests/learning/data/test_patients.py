"""Whose an image is: table, header, pattern, in this order; what nothing says is refused or counts by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from mpc_fl.apps.data_lines import data_lines
from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError, DataError
from mpc_fl.learning.data import loading
from mpc_fl.learning.data.loading import load_hospital, patients_per_hospital, shared_patients
from mpc_fl.learning.data.patients import (
    BY_ITSELF,
    FROM_HEADER,
    FROM_NAME,
    FROM_TABLE,
    UNREADABLE,
    owners_of,
    read_table,
    site_key,
)
from mpc_fl.learning.data.survey import PartCounts, survey
from tests.learning.data.dicom_writing import write_dicom

SIZE = 8


def _config(root: Path, **data: Any) -> Config:
    values = {"source": "images", "classes": ["ill", "well"], "image_size": SIZE, **data}
    site = {"data": str(root), "patient_key": str(root.parent / "patient.key")}
    return Config().with_values(data=values, federation={"hospitals": 2}, site=site)


def _png(path: Path, value: int = 0) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((SIZE, SIZE), value % 256, np.uint8)).save(path)
    return path


def _scan(path: Path, **tags: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_dicom(path, np.arange(64, dtype=np.uint8).reshape(8, 8), **tags)


def _keys(files: list[Path], config: Config) -> list[str]:
    return owners_of(files, config).keys


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("person1_bacteria_2.jpeg", "person1"),
        ("person1946_bacteria_4875.jpeg", "person1946"),
        ("NORMAL2-IM-1427-0001.jpeg", "NORMAL2-IM-1427"),
        ("IM-0115-0001-0002.jpeg", "IM-0115"),
    ],
)
def test_names_of_the_public_xrays_need_no_setting(tmp_path: Path, name: str, patient: str) -> None:
    files = [_png(tmp_path / "d" / "train" / "ill" / name)]
    assert owners_of(files, _config(tmp_path / "d")).sources == [FROM_NAME]
    assert _keys(files, _config(tmp_path / "d")) == [patient]


@pytest.mark.parametrize(
    "name", ["img_0001.png", "P01 AP.png", "1.2.840.113619.png", "IM0001.png", "personal.png", "a.png"]
)
def test_any_other_name_is_no_patient(tmp_path: Path, name: str) -> None:
    """Each of these was one: img_0001 to img_0300 the same, the two views of P01 two."""
    root = tmp_path / "d"
    files = [_png(root / "train" / "ill" / name)]
    with pytest.raises(
        DataError, match="no patient is known of 1 of 1 images, the first .*patients.csv.*pattern.*unit=image"
    ):
        _keys(files, _config(root))
    owners = owners_of(files, _config(root, unit="image"))
    assert owners.keys == [f"train/ill/{name}"] and owners.sources == [BY_ITSELF]


def test_a_pattern(tmp_path: Path) -> None:
    root = tmp_path / "d"
    files = [_png(root / "train" / "ill" / name) for name in ("P01 AP.png", "P01 LAT.png", "P02 AP.png")]
    assert _keys(files, _config(root, patient_pattern=r"(P\d+) ")) == ["P01", "P01", "P02"]
    with pytest.raises(DataError, match="no patient is known of 3"):
        _keys(files, _config(root, patient_pattern=r"(Q\d+)"))
    with pytest.raises(DataError, match="no patient is known of 3"):
        _keys(files, _config(root, patient_pattern=r"(X?)"))  # an empty group is nobody
    for wrong, why in (("P\\d+", "needs a group"), ("(", "no regular expression")):
        with pytest.raises(ConfigError, match=why):
            _config(root, patient_pattern=wrong)


def test_identifiers_of_headers_are_hashed_with_a_key_of_the_site(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, config = tmp_path / "d", _config(tmp_path / "d")
    numbers = ["4711", "4711", "4712", "04711 "]
    issuers: list[str | None] = [None, None, None, "elsewhere"]
    files = [
        _scan(root / "train" / "ill" / f"IM{row}", PatientID=number, IssuerOfPatientID=issuer)
        for row, (number, issuer) in enumerate(zip(numbers, issuers, strict=True))
    ]
    owners = owners_of(files, config)
    assert set(owners.sources) == {FROM_HEADER}
    assert owners.keys[0] == owners.keys[1] == owners.keys[3] and len(set(owners.keys)) == 2  # whoever issued it
    assert not any(number in key for number in numbers for key in owners.keys)
    key = tmp_path / "patient.key"
    assert key.stat().st_mode & 0o777 == 0o600 and len(key.read_bytes()) == 32
    assert _keys(files, config) == owners.keys  # the same in every process of this site
    key.unlink()
    assert not set(_keys(files, config)) & set(owners.keys)  # and at no other
    assert "4711" not in caplog.text


def test_headers_without_a_patient_leave_it_to_the_name(tmp_path: Path) -> None:
    root = tmp_path / "d"
    files = [
        _scan(root / "train" / "ill" / "person3_a.dcm", PatientID=None),
        _scan(root / "train" / "ill" / "person3_b.dcm", PatientID=""),
    ]
    assert owners_of(files, _config(root)).sources == [FROM_NAME] * 2
    nobody = _scan(root / "train" / "ill" / "scan.dcm", PatientID=None)
    with pytest.raises(DataError, match="no patient is known of 1 of 3"):
        _keys([*files, nobody], _config(root))


def test_a_file_that_cannot_be_read_needs_no_patient_and_counts_as_none(tmp_path: Path) -> None:
    """Of a damaged header nobody knows the patient: it stopped the whole site, whatever `data.most_unreadable` said."""
    root = tmp_path / "d"
    for split, name in (("train", "ill"), ("train", "well"), ("test", "ill"), ("test", "well")):
        for number in range(4):
            _scan(root / split / name / f"IM{number}", PatientID=f"{split}-{name}-{number}")
    damaged = root / "train" / "ill" / "IM9.dcm"
    damaged.write_bytes(b"damaged")
    config = _config(root, most_unreadable=0.2).with_values(site={"data_of": "hospital"})
    owners = owners_of([damaged], config)
    assert owners.sources == [UNREADABLE] and owners.keys == ["train/ill/IM9.dcm"]
    assert patients_per_hospital(config) == [8]
    part, found = load_hospital(config, 0, "train"), survey(config)
    assert (part.patient_count, len(part), part.skipped) == (8, 8, 1)
    assert (found.records, found.patients, found.unreadable, found.patients_from) == (17, 16, 1, {FROM_HEADER: 16})
    assert found.parts["train"] == PartCounts(8, 8, [4, 4]) and part.class_counts(2) == [4, 4]
    with pytest.raises(DataError, match="1 of 5 train files of class 'ill' cannot be read"):
        load_hospital(config.with_values(data={"most_unreadable": 0.1}), 0, "train")


def test_a_file_that_is_mended_while_it_is_looked_for_is_nobodys_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "d"
    for number in range(4):
        _scan(root / "train" / "ill" / f"IM{number}", PatientID=f"{number}")
    damaged = root / "train" / "ill" / "IM9.dcm"
    damaged.write_bytes(b"damaged")
    config = _config(root, most_unreadable=0.5).with_values(site={"data_of": "hospital"})
    read = loading.read_files

    def mended_before(*arguments: Any) -> Any:
        _scan(damaged, PatientID="0")
        return read(*arguments)

    monkeypatch.setattr(loading, "read_files", mended_before)
    with pytest.raises(DataError, match="IM9.dcm was changed while data were read"):
        load_hospital(config, 0, "train")


def test_the_key_of_a_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert site_key(None) == (tmp_path / "state" / "mpc-fl" / "patient.key").read_bytes() == site_key(None)
    assert (tmp_path / "state" / "mpc-fl" / "patient.key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "short").write_bytes(b"12")
    (tmp_path / "short").chmod(0o640)
    with pytest.raises(DataError, match="can be read by other users"):
        site_key(tmp_path / "short")  # who has it can try all numbers of patients
    (tmp_path / "short").chmod(0o600)
    with pytest.raises(DataError, match="no key of 32 bytes"):
        site_key(tmp_path / "short")
    with pytest.raises(DataError, match="site.patient_key"):
        site_key(tmp_path)


TABLE = (
    "file,patient,sex,age,scanner,split\ntrain/ill/a.png,P1,f,7,X,train\nb.png,P1,,,,\ntrain\\well\\c.png,P2,m,9,Y,\n"
)


@pytest.mark.parametrize(
    "content",
    [
        TABLE.encode(),
        TABLE.replace(",", ";").replace("\n", "\r\n").encode("utf-8-sig"),
        TABLE.replace(",", "\t").replace("X", "Röntgen").encode("cp1252"),
        TABLE.replace("file,patient", " File , Patient ").encode(),
        TABLE.encode("utf-16"),
        TABLE.encode("utf-16-be"),
        ("sep=;\r\n" + TABLE.replace(",", ";")).encode("utf-8-sig"),
    ],
)
def test_the_table_goes_before_all_else(tmp_path: Path, content: bytes) -> None:
    root = tmp_path / "d"
    files = [_png(root / "train" / "ill" / "a.png"), _scan(root / "train" / "ill" / "b.png", PatientID="4711"),
             _png(root / "train" / "well" / "c.png")]  # fmt: skip
    (root / "patients.csv").write_bytes(content)
    owners = owners_of(files, _config(root))
    assert owners.keys == ["P1", "P1", "P2"] and owners.sources == [FROM_TABLE] * 3
    table = read_table(root)
    assert table is not None and table.rows["train/ill/a.png"].age == "7" and table.rows["b.png"].sex == ""
    # A table that names some files only is no table of this folder: names and headers are not asked.
    files.append(_png(root / "train" / "ill" / "person7_x.png"))
    with pytest.raises(DataError, match="patients.csv does not name 1 of 4 images.*person7_x.png.*complete the table"):
        _keys(files, _config(root))
    assert owners_of(files, _config(root, unit="image")).sources[-1] == BY_ITSELF


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no rows"),
        ("file,patient\n", "has no rows"),
        ("name,patient\na,b\n", "needs one column 'file'"),
        ("file,patient,patient\na,b,c\n", "two columns of the same name"),
        ("file,name\na,b\n", "needs one column 'patient'"),
        ("file,patient\na.png\n", "line 2 has 1 cells, the header 2"),
        ("file,patient\na.png,\n", "line 2 lacks a file or a patient"),
        ("file,patient\na.png,P1\n\na.png,P2\n", "line 4 names a file again"),
        ("file,patient,split\na.png,P1,holdout\n", "the split is none of train, validation, test"),
        ('file,patient\na.png,"P1\n', "line 2: quotes do not match"),
    ],
)
def test_damaged_tables(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "patients.csv").write_text(content)
    with pytest.raises(DataError, match=words):
        read_table(tmp_path)


def test_a_table_that_parts_patients_otherwise_than_the_folders_is_refused(tmp_path: Path) -> None:
    files = [_png(tmp_path / "d" / "test" / "ill" / "a.png")]
    for split in ("train", "validation"):
        (tmp_path / "d" / "patients.csv").write_text(f"file,patient,split\na.png,P1,{split}\n")
        with pytest.raises(DataError, match=f"says that test/ill/a.png is for '{split}', and it lies in 'test'"):
            _keys(files, _config(tmp_path / "d"))


def test_who_validates_lies_with_who_trains_and_is_chosen_by_no_table(tmp_path: Path) -> None:
    """The documents name the split `validation`, and it was refused in either folder."""
    root = _folder(tmp_path / "d", {f"{split}/{name}": [f"{split}{name}{n}.png" for n in range(3)]
                                    for split in ("train", "test") for name in ("ill", "well")})  # fmt: skip
    rows = [f"{path.name},{path.stem},{path.parts[-3]}" for path in sorted(root.rglob("*.png"))]
    marked = [row.replace(",train", ",validation") if "ill1" in row else row for row in rows]
    (root / "patients.csv").write_text("\n".join(["file,patient,split", *marked]))
    config = _config(root).with_values(site={"data_of": "hospital"})
    assert len(load_hospital(config, 0, "train")) == 6
    words = "1 file for validation; data.validation_fraction says how many patients validate, and a hash which"
    assert sum(words in warning for warning in survey(config).warnings) == 1
    (root / "patients.csv").write_text("\n".join(["file,patient,split", *rows]))
    assert not any("for validation" in warning for warning in survey(config).warnings)


@given(
    patients=st.lists(
        st.text("abcÄ7 _-,;'\"", min_size=1, max_size=8).filter(lambda name: name.strip()), min_size=1, max_size=12
    ),
    delimiter=st.sampled_from([",", ";", "\t"]),
)
def test_tables_at_random_are_read_back(
    patients: list[str], delimiter: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import csv

    root = tmp_path_factory.mktemp("table")
    with (root / "patients.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["file", "patient"])
        writer.writerows([f"{row}.png", patient] for row, patient in enumerate(patients))
    table = read_table(root)
    assert table is not None and [row.patient for row in table.rows.values()] == [name.strip() for name in patients]


@given(
    patients=st.lists(st.text("abcÄ7 _-,;'\"", min_size=1, max_size=8).filter(str.strip), min_size=1, max_size=12),
    first=st.integers(0, 10**6),
    taken_out=st.sets(st.integers(0, 11)),
    mark=st.sampled_from([",", ";", "\t"]),
)
def test_numbers_of_rows_as_pandas_writes_them_are_left_out_and_it_is_said(
    patients: list[str], first: int, taken_out: set[int], mark: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import csv

    root = tmp_path_factory.mktemp("table")
    kept = [row for row in range(len(patients)) if row not in taken_out or row == len(patients) - 1]
    with (root / "patients.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=mark)
        writer.writerow(["", "file", "patient"])
        writer.writerows([first + row, f"{row}.png", patients[row]] for row in kept)
    table = read_table(root)
    assert table is not None and {name: row.patient for name, row in table.rows.items()} == {
        f"{row}.png": patients[row].strip() for row in kept
    }
    assert "without the numbers of rows in its first column" in table.read_as


@pytest.mark.parametrize("cells", [("2", "1"), ("1", "1"), ("1", "x"), ("1", ""), ("-1", "0"), ("1.0", "2.0")])
def test_a_first_column_without_a_name_that_numbers_no_rows_is_refused(tmp_path: Path, cells: tuple[str, str]) -> None:
    """It may be patients, or a column that lost its name: nothing is passed over that could matter."""
    rows = [f"{cell},{row}.png,P{row}" for row, cell in enumerate(cells)]
    (tmp_path / "patients.csv").write_text("\n".join([",file,patient", *rows]))
    with pytest.raises(DataError, match="has a column without a name, number 1"):
        read_table(tmp_path)


def test_check_says_how_the_table_of_patients_was_read(tmp_path: Path) -> None:
    root = _folder(tmp_path / "d", {f"{split}/{name}": [f"{split}{name}{n}.png" for n in range(3)]
                                    for split in ("train", "test") for name in ("ill", "well")})  # fmt: skip
    rows = [f"{row};{path.name};{path.stem}" for row, path in enumerate(sorted(root.rglob("*.png")))]
    (root / "patients.csv").write_text("\n".join([";file;patient", *rows]), encoding="utf-16")
    config = _config(root).with_values(site={"data_of": "hospital"})
    said = "  patients.csv: read as UTF-16-LE, parted by semicolon, without the numbers of rows in its first column"
    assert any(line.startswith(said) for line in data_lines(survey(config), config))
    (root / "patients.csv").unlink()
    config = config.with_values(data={"unit": "image"})
    assert not any("patients.csv:" in line for line in data_lines(survey(config), config))


def _folder(root: Path, names: dict[str, list[str]]) -> Path:
    for folder, files in names.items():
        for number, name in enumerate(files):
            _png(root / folder / name, number)
    return root


def _serial(count: int, start: int = 0) -> list[str]:
    return [f"img_{number:04d}.png" for number in range(start, start + count)]


def test_the_survey_says_what_a_run_will_do(tmp_path: Path) -> None:
    root = _folder(
        tmp_path / "d",
        {
            "train/ill": [f"P{n // 2}-{n}.png" for n in range(24)], "train/well": [f"Q{n}-0.png" for n in range(20)],
            "test/ill": ["R1-0.png", "R2-0.png"], "test/well": ["S1-0.png", "S1-1.png", "S2-0.png"],
        },
    )  # fmt: skip
    (root / "train" / "well" / "Q7-0.png").write_bytes(b"damaged")
    (root / "train" / "well" / "notes.txt").write_text("words")
    config = _config(root, patient_pattern=r"([PQRS]\d+)-")
    found = survey(config)
    assert (found.records, found.patients, found.unreadable) == (49, 35, 1)  # of one patient nothing can be read
    assert found.parts == {"train": PartCounts(31, 43, [24, 19]), "test": PartCounts(4, 5, [2, 3])}
    assert found.training_patients == [
        len(set(load_hospital(config, rank, "train").patients.tolist())) for rank in (0, 1)
    ]
    assert sum(found.training_patients) == 31 and patients_per_hospital(config) == [16, 16]
    assert found.left_aside == {"no image (.txt)": 1} and found.patients_from == {FROM_NAME: 48}
    assert "Q7-0.png" in found.first_unreadable[0] and not found.warnings
    assert sum(found.treatments.values()) == 48


def test_more_unreadable_files_than_allowed_stop_the_site(tmp_path: Path) -> None:
    folders = ("train/ill", "train/well", "test/ill", "test/well")
    names = {folder: [f"person{rank}{n}_x.png" for n in range(10)] for rank, folder in enumerate(folders)}
    root = _folder(tmp_path / "d", names)
    for number in range(2):
        (root / "train" / "ill" / f"person0{number}_x.png").write_bytes(b"")
    config = _config(root).with_values(data={"partition": {"method": "none"}})
    words = "2 of 10 train files of class 'ill' cannot be read, more than data.most_unreadable=0.1 of them; the first"
    for action in (lambda: survey(config), lambda: load_hospital(config, 0, "train")):
        with pytest.raises(DataError, match=words):
            action()
    lenient = config.with_values(data={"most_unreadable": 0.2})
    assert survey(lenient).unreadable == load_hospital(lenient, 0, "train").skipped == 2


@pytest.mark.parametrize(
    ("pattern", "patients", "words"),
    [
        (r"(img)_\d+", 1, "and 1 patient: is that right"),
        (r"(img_\d+)", 300, "300 files, 300 patients with serial numbers"),
    ],
)
def test_numbers_that_look_wrong_are_said(tmp_path: Path, pattern: str, patients: int, words: str) -> None:
    """As the issue has them: 300 files, 1 patient; 300 files, 300 patients with serial names."""
    names = {
        "train/ill": _serial(120),
        "train/well": _serial(120, 120),
        "test/ill": _serial(30, 240),
        "test/well": _serial(30, 270),
    }
    config = _config(_folder(tmp_path / "d", names), patient_pattern=pattern, shared_patients="keep")
    config = config.with_values(data={"partition": {"method": "none"}})
    found = survey(config)
    assert (found.records, found.patients, found.unit) == (300, patients, "patient")
    assert any(words in warning for warning in found.warnings)


def test_with_the_unit_image_each_image_counts_by_itself_and_it_is_said(tmp_path: Path) -> None:
    names = {f"{split}/{name}": _serial(12) for split in ("train", "test") for name in ("ill", "well")}
    config = _config(_folder(tmp_path / "d", names), unit="image")
    found = survey(config)
    assert (found.unit, found.patients, found.training_patients) == ("image", 48, [12, 12])
    assert shared_patients(config).names == ()  # equal names in two folders are not one image


def test_records_of_archives_and_tables_have_patients_or_are_refused(tmp_path: Path) -> None:
    images, labels = np.zeros((12, SIZE, SIZE), np.uint8), np.array([0, 1] * 6)
    whose = np.arange(12) // 4 * 2 + labels
    arrays = {
        f"{split}_{name}": value
        for split in ("train", "test")
        for name, value in (("images", images), ("labels", labels))
    }
    np.savez(tmp_path / "none.npz", **arrays)
    np.savez(tmp_path / "some.npz", **arrays, train_patients=whose, test_patients=np.array([f"T{n}" for n in whose]))
    np.savez(tmp_path / "short.npz", **arrays, train_patients=whose[:3], test_patients=whose)
    np.savez(tmp_path / "shared.npz", **arrays, train_patients=whose, test_patients=whose + 4)

    def config(name: str, **data: Any) -> Config:
        return _config(tmp_path / name, source="npz", **data)

    with pytest.raises(DataError, match="which of the 12 records are of one patient: store arrays train_patients"):
        load_hospital(config("none.npz"), 0, "train")
    assert load_hospital(config("none.npz", unit="image"), 0, "train").patient_count == 6
    part = load_hospital(config("some.npz"), 0, "train")
    assert (part.patient_count, len(part)) == (4, 8) or part.patient_count * 2 == len(part)
    with pytest.raises(DataError, match="train_patients of .*short.npz is not one whole number or text a record"):
        load_hospital(config("short.npz"), 0, "train")
    assert shared_patients(config("shared.npz")).names == ("4", "5")

    table = tmp_path / "t.csv"
    table.write_text("age,label\n" + "".join(f"{n},{('ill', 'well')[n % 2]}\n" for n in range(40)))
    rows = _config(table, source="csv", table={"features": 1})
    with pytest.raises(DataError, match="which of the .* records are of one patient: set data.table.patient_column"):
        load_hospital(rows, 0, "train")
    assert rows.with_values(data={"unit": "image"}).data.counted_unit == "record"
    assert load_hospital(rows.with_values(data={"unit": "image"}), 0, "train").patient_count


def test_check_says_how_many_unreadable_files_it_does_not_name(tmp_path: Path) -> None:
    root = _folder(tmp_path / "d", {f"{split}/{name}": [f"P{n}_{split}{name}.png" for n in range(8)]
                                    for split in ("train", "test") for name in ("ill", "well")})  # fmt: skip
    values: dict[str, Any] = {"data": {"most_unreadable": 0.9, "unit": "image"}, "site": {"data_of": "hospital"}}
    config = _config(root).with_values(**values)
    for count, line in ((5, None), (7, "  unreadable: 2 more; the log of a run names all")):
        for path in sorted((root / "train" / "ill").iterdir())[:count]:
            path.write_bytes(b"")
        lines = [each for each in data_lines(survey(config), config) if each.startswith("  unreadable:")]
        assert len(lines) == min(count, 5) + (line is not None) and line in (None, lines[-1])
