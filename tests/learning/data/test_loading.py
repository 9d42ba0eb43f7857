"""What each hospital gets: only its own patients, complete over all hospitals, mistakes in one line."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError, DataError, MpcFlError
from mpc_fl.learning.data import reading as data
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.image_files import Picture, WrongSizeError
from mpc_fl.learning.data.loading import (
    load_hospital,
    load_images,
    patients_per_hospital,
    public_sizes,
    shared_patients,
)
from mpc_fl.learning.data.partition import patient_of, place_of
from mpc_fl.learning.data.survey import survey
from mpc_fl.learning.data.tables import Part, Split

SPLITS: tuple[Split, ...] = ("train", "test")
SIZE = 8


def _image(path: Path, value: int, size: int = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size), value, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; 12 ill patients with one to three images each, 15 well ones; brightness tells each image."""
    root = tmp_path / "images"
    for split in SPLITS:
        for patient in range(12):
            for view in range(1 + patient % 3):
                _image(root / split / "ill" / f"person{patient}_virus_{view}.png", 10 * patient + view)
        for patient in range(15):
            _image(root / split / "well" / f"IM-{patient:04d}-0001.png", 200 + patient)
    return root


def _config(root: Path | None, hospitals: int = 3, partition: Any = None, subset: Any = None, **more: Any) -> Config:
    # The folder has the same patients in both splits; `test_a_test_patient_who_trains_...` are about that.
    values = {"source": "images", "classes": ["ill", "well"], "image_size": SIZE, "shared_patients": "keep", **more}
    config = Config().with_values(
        data={**values, "partition": partition or {}, "subset": subset or {}},
        evaluation={"noise_multiplier": 4.0},
        federation={"hospitals": hospitals},
        site={"data": None if root is None else str(root)},
    )
    return config


def _patients(dataset: Dataset) -> set[str]:
    return {patient_of(name) for name in dataset.names}


def _check(dataset: Dataset, config: Config) -> None:
    """Form of a dataset, and that rows, labels, names and patients belong together."""
    count = len(dataset)
    assert dataset.inputs.shape == (count, *config.data.input_shape) and dataset.inputs.dtype == torch.float32
    assert dataset.inputs.is_contiguous() and bool(dataset.inputs.isfinite().all())
    if not config.data.is_table:
        assert dataset.inputs.min() >= 0 and dataset.inputs.max() <= 1
    assert dataset.labels.dtype == dataset.patients.dtype == torch.int64
    assert dataset.labels.shape == dataset.patients.shape == (count,) and len(dataset.names) == count
    assert sorted(set(dataset.patients.tolist())) == list(range(dataset.patient_count))
    rows = [row for own in dataset.records_of_patient for row in own.tolist()]
    assert sorted(rows) == list(range(count))
    for patient, own in enumerate(dataset.records_of_patient):
        assert len(own) and (dataset.patients[own] == patient).all()


@pytest.mark.parametrize("partition", [{"method": "equal"}, {"method": "dirichlet", "alpha": 2.0}])
def test_hospitals_are_disjoint_by_patient_and_complete(folder: Path, partition: dict[str, Any]) -> None:
    config = _config(folder, partition=partition)
    for split in SPLITS:
        parts = [load_hospital(config, rank, split) for rank in range(3)]
        for part in parts:
            _check(part, config)
            for row, name in enumerate(part.names):
                number = int(name.split("_")[0].removeprefix("person")) if "person" in name else int(name[3:7])
                ill = name.startswith("person")
                view = int(name.split("_")[2][0]) if ill else 0
                assert part.labels[row] == (0 if ill else 1)
                value = 10 * number + view if ill else 200 + number
                torch.testing.assert_close(part.inputs[row], torch.full((1, SIZE, SIZE), value / 255))
            for own in part.records_of_patient:
                assert len({patient_of(part.names[row]) for row in own.tolist()}) == 1
            assert len(_patients(part)) == part.patient_count
        patients = Counter(patient for part in parts for patient in _patients(part))
        assert len(patients) == 27 and set(patients.values()) == {1}
        names = sorted(name for part in parts for name in part.names)
        assert names == sorted(path.name for path in (folder / split).rglob("*.png"))
        if split == "train":
            assert patients_per_hospital(config) == [part.patient_count for part in parts]


def test_equal_partition_gives_each_hospital_its_share_of_each_class(folder: Path) -> None:
    for rank in range(3):
        part = load_hospital(_config(folder), rank, "train")
        classes = Counter(name.startswith("person") for name in {patient_of(name) for name in part.names})
        assert classes == {True: 4, False: 5}


def test_a_hospital_reads_no_file_of_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = data.read_image

    def spy(path: Path, *arguments: Any) -> Picture:
        read.append(path.name)
        return original(path, *arguments)

    monkeypatch.setattr(data, "read_image", spy)
    part = load_hospital(_config(folder), 1, "train")
    assert sorted(read) == sorted(part.names)


def test_partition_none_gives_everything_to_this_hospital(folder: Path) -> None:
    config = _config(folder, partition={"method": "none"})
    parts = [load_hospital(config, rank, "train") for rank in range(3)]
    assert parts[0].names == parts[2].names and parts[0].patient_count == 27
    assert patients_per_hospital(config) == [27, 27, 27]


def test_a_patient_in_two_classes_stays_whole(folder: Path) -> None:
    for patient in range(12):
        _image(folder / "train" / "well" / f"person{patient}_virus_9.png", 5)
    parts = [load_hospital(_config(folder), rank, "train") for rank in range(3)]
    assert sum(len(_patients(part)) for part in parts) == 27
    both = [len(set(part.labels[own].tolist())) for part in parts for own in part.records_of_patient]
    assert both.count(2) == 12


@pytest.mark.parametrize("source", ["images", "phantoms"])
def test_subsets_are_limited_and_stratified(folder: Path, source: str) -> None:
    limits = {"train_patients": 6, "test_patients": 4}
    config = _config(folder, subset=limits, source=source)
    whole = _config(folder, source=source)
    for split, limit in (("train", 6), ("test", 4)):
        for rank in range(3):
            part = load_hospital(config, rank, split)
            _check(part, config)
            assert part.patient_count == limit
            first = [int(part.labels[own[0]]) for own in part.records_of_patient]
            assert abs(first.count(0) - limit / 2) <= 1
            assert set(part.names) < set(load_hospital(whole, rank, split).names)
    assert patients_per_hospital(config) == [6, 6, 6]


def test_seed_fixes_the_hospitals(folder: Path) -> None:
    config = _config(folder)
    names = load_hospital(config, 0, "train").names
    assert names == load_hospital(config, 0, "train").names
    assert names != load_hospital(config.with_values(seed=1), 0, "train").names


def test_unreadable_files_are_skipped_counted_and_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = _config(folder, hospitals=2, most_unreadable=0.5)
    whole = load_hospital(config, 0, "train")
    victim = whole.names[int(whole.records_of_patient[0][0])]
    gone = [whole.names[row] for row in whole.records_of_patient[0].tolist()]
    for name in gone:
        next((folder / "train").rglob(name)).write_bytes(b"no picture")
    with caplog.at_level(logging.WARNING):
        part = load_hospital(config, 0, "train")
    _check(part, config)
    assert part.skipped == len(gone) and whole.skipped == 0
    assert set(part.names) == set(whole.names) - set(gone)
    assert part.patient_count == whole.patient_count - 1
    skipped = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(skipped) == len(gone) and any(victim in line for line in skipped)
    assert load_hospital(config, 1, "train").skipped == 0


def test_nothing_readable_names_the_first_file(folder: Path) -> None:
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"no picture")
    first = "person0_virus_0.png"
    _fails(lambda: patients_per_hospital(_config(folder)), "no image of class 'ill' can be read", first)
    config = _config(folder, partition={"method": "none"})
    _fails(lambda: load_hospital(config, 0, "train"), "24 of 24 train files of class 'ill' cannot be read", first)
    tolerant = _config(folder, partition={"method": "none"}, most_unreadable=1)
    _fails(lambda: load_hospital(tolerant, 0, "train"), "no image can be read; the first: ", first)


def test_one_unreadable_file_per_class_does_not_stop_the_check(folder: Path) -> None:
    for split in SPLITS:
        (folder / split / "ill" / "person0_virus_0.png").write_bytes(b"")
    assert patients_per_hospital(_config(folder)) == [9, 9, 9]


def _fails(action: Callable[[], Any], *parts: str, kind: type[MpcFlError] = DataError) -> None:
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and caught.value.fix
    for part in parts:
        assert part in message, message


def _both(config: Config, *parts: str, rank: int = 0) -> None:
    """The check before the start and the hospital itself say the same."""
    _fails(lambda: patients_per_hospital(config), *parts)
    _fails(lambda: load_hospital(config, rank, "train"), *parts)


def test_mistakes_about_folders(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _both(_config(None), "data.source 'images' needs a path: pass --data")
    _both(_config(tmp_path / "absent"), "absent/train does not exist")
    (tmp_path / "file").write_text("x")
    _both(_config(tmp_path / "file"), "file/train does not exist")
    _both(_config(folder, classes=["ill", "well", "odd"]), "class folder", "train/odd does not exist")
    _both(_config(folder, classes=["ill", "odd"]), "wrong number of classes", "'well'", "2 classes")
    (folder / "train" / "odd").mkdir()
    _both(_config(folder), "wrong number of classes", "'odd'", "2 classes")
    _both(_config(folder, classes=["ill", "well", "odd"]), "train/odd has no images")
    _both(_config(folder, classes=["ill", "well", "odds"]), "has a folder 'odd' and none called 'odds'")
    (folder / "train" / "odd").rmdir()

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    _both(_config(folder), "cannot list", "Permission denied")


def test_a_mistake_in_the_test_split_is_found_before_training(folder: Path) -> None:
    for path in (folder / "test" / "well").iterdir():
        path.unlink()
    _fails(lambda: patients_per_hospital(_config(folder)), "test/well has no images")
    load_hospital(_config(folder), 0, "train")


def test_hidden_entries_and_other_files_are_left_aside(folder: Path) -> None:
    before = load_hospital(_config(folder), 0, "train").names
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    for name in (".DS_Store", "._person1_virus_1.png", "Thumbs.db", "README", "notes.txt"):
        (folder / "train" / "ill" / name).write_bytes(b"x" * 300)
    (folder / "train" / "ill" / "sub.png").mkdir()
    part = load_hospital(_config(folder), 0, "train")
    assert part.names == before and part.skipped == 0


def _shared_folder(folder: Path) -> Path:
    """As `folder`, but of its test patients only three ill and two well ones are by name also training patients."""
    for split in ("test",):
        for path in (folder / split / "ill").iterdir():
            number = int(path.name.split("_")[0].removeprefix("person"))
            if number >= 3:
                path.rename(path.with_name(path.name.replace(f"person{number}_", f"person{100 + number}_")))
        for path in (folder / split / "well").iterdir():
            number = int(path.name[3:7])
            if number >= 2:
                path.rename(path.with_name(f"IM-{1000 + number}-0001.png"))
    return folder


SHARED = ("IM-0000", "IM-0001", "person0", "person1", "person2")


def test_a_test_patient_who_trains_anywhere_is_found_and_left_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one that another hospital trains with: names of all hospitals are in one folder here."""
    config = _config(_shared_folder(folder), shared_patients="leave_out")
    found = shared_patients(config)
    assert found.names == SHARED and found.of == 27
    assert found.described == (
        "5 of 27 test patients are also training patients by name: IM-0000, IM-0001, person0, person1, person2"
    )
    with caplog.at_level(logging.INFO):
        tests = [_patients(load_hospital(config, rank, "test")) for rank in range(3)]
    trains = [_patients(load_hospital(config, rank, "train")) for rank in range(3)]
    assert not set.union(*tests) & set.union(*trains) and sum(map(len, tests)) == 27 - 5
    assert "5 of 27 test patients" in caplog.text and "person1" not in caplog.text, "no patient is named in a log"
    crossed = [rank for rank in range(3) for name in SHARED if name in trains[rank]]
    assert len(set(crossed)) > 1, "hospitals share them, not one alone"


def test_those_who_train_may_be_kept_or_the_run_refused(folder: Path) -> None:
    _shared_folder(folder)
    kept = _config(folder, shared_patients="keep")
    assert sum(load_hospital(kept, rank, "test").patient_count for rank in range(3)) == 27
    assert shared_patients(kept).names == SHARED
    refused = _config(folder, shared_patients="refuse")
    _fails(lambda: load_hospital(refused, 0, "test"), "5 of 27 test patients", "names them", "leave_out or keep")
    _fails(lambda: patients_per_hospital(refused), "5 of 27 test patients")


def test_tests_of_training_patients_alone_are_refused(folder: Path) -> None:
    """All patients of the folder are in both splits."""
    config = _config(folder, shared_patients="leave_out")
    _fails(lambda: load_hospital(config, 0, "test"), "all test patients, 27 with ", "data.patient_pattern")


def test_numbers_of_patients_are_said_where_a_pattern_makes_all_of_them_one(folder: Path) -> None:
    """A user who wrote a wrong pattern sees it: the warning of the survey comes too late for that."""
    one = r"(p|I)"
    config = _config(folder, patient_pattern=one)
    _fails(lambda: survey(config), "hospital-0 has no train patients; 39 files or records are divided, of 2 patients")
    alone = _config(folder, patient_pattern=one, shared_patients="leave_out").with_values(site={"data_of": "hospital"})
    _fails(lambda: survey(alone), "all test patients, 2 with 39 test files or records", "data.patient_pattern")


def test_patients_beyond_the_subset_do_not_train(folder: Path) -> None:
    _shared_folder(folder)
    config = _config(folder, subset={"train_patients": 1}, shared_patients="leave_out")
    trains = {name for rank in range(3) for name in _patients(load_hospital(config, rank, "train"))}
    assert len(trains) == 3 and set(shared_patients(config).names) == trains & set(SHARED)


def test_hospitals_without_patients(folder: Path) -> None:
    many = _config(folder, hospitals=40)
    _fails(lambda: patients_per_hospital(many), "has no train patients", "fewer hospitals")
    _fails(lambda: load_hospital(many, 0, "test"), "hospital-0 has no test patients")
    # two classes cannot reach three hospitals when each goes to one
    uneven = _config(folder, partition={"method": "dirichlet", "alpha": 1e-9})
    _fails(lambda: patients_per_hospital(uneven), "has no train patients", "data.partition.alpha")
    empty = 0
    for rank in range(3):
        try:
            load_hospital(uneven, rank, "train")
        except DataError as error:
            assert f"hospital-{rank} has no train patients" in str(error)
            empty += 1
    assert empty in (1, 2)


def test_wrong_size(folder: Path) -> None:
    for split in SPLITS:
        for path in (folder / split / "ill").iterdir():
            _image(path, 50, size=11)
    _fails(lambda: patients_per_hospital(_config(folder)), "is 11x11, expected 8x8", "wrong_size", kind=WrongSizeError)
    _fails(lambda: load_hospital(_config(folder), 0, "train"), "is 11x11, expected 8x8", kind=WrongSizeError)
    part = load_hospital(_config(folder, wrong_size="resize", channels=3), 0, "train")
    assert part.inputs.shape[1:] == (3, SIZE, SIZE) and part.skipped == 0


def _npz(path: Path, labels: list[int], split: str = "test") -> Path:
    images = np.repeat(np.arange(len(labels), dtype=np.uint8), 64).reshape(-1, 8, 8)
    arrays = {f"{name}_images": images for name in ("train", split)}
    np.savez(path, **arrays, **{f"{name}_labels": np.array(labels) for name in ("train", split)})
    return path


def test_npz_and_csv_are_divided(tmp_path: Path) -> None:
    config = _config(_npz(tmp_path / "a.npz", [0, 1] * 9), source="npz", unit="image")
    parts = [load_hospital(config, rank, "train") for rank in range(3)]
    assert patients_per_hospital(config) == [6, 6, 6] == [len(part) for part in parts]
    assert sorted(int(i.max() * 255 + 0.5) for part in parts for i in part.inputs) == list(range(18))
    table = tmp_path / "t.csv"
    rows = "".join(f"{row // 2},{row},{'ill' if row // 2 % 2 else 'well'}\n" for row in range(80))
    table.write_text("who,age,label\n" + rows)
    config = _config(table, source="csv", table={"features": 1, "patient_column": "who"})
    parts = [load_hospital(config, rank, "train") for rank in range(3)]
    for part in parts:
        _check(part, config)
        assert len(part) == 2 * part.patient_count
    counts = [part.patient_count for part in parts]
    assert patients_per_hospital(config) == counts and max(counts) - min(counts) <= 1
    assert len({name for part in parts for name in part.names}) == 2 * sum(counts)


def test_a_class_without_records_is_a_mistake(tmp_path: Path) -> None:
    _both(_config(_npz(tmp_path / "a.npz", [0] * 9), source="npz", unit="image"), "class 'well' has no records")


@pytest.mark.parametrize("source", ["phantoms", "breast_cancer"])
def test_embedded_sources_are_divided(source: str) -> None:
    classes = ["malignant", "benign"] if source == "breast_cancer" else ["a", "b", "c"]
    config = _config(None, source=source, classes=classes, phantoms={"train_patients": 70, "test_patients": 40})
    for split in SPLITS:
        parts = [load_hospital(config, rank, split) for rank in range(3)]
        for part in parts:
            _check(part, config)
        names = [name for part in parts for name in part.names]
        assert len(set(names)) == len(names)
        if split == "train":
            assert patients_per_hospital(config) == [part.patient_count for part in parts]
            assert sum(part.patient_count for part in parts) == (437 if source == "breast_cancer" else 70)


def test_phantoms_in_three_channels() -> None:
    config = _config(None, source="phantoms", channels=3, phantoms={"train_patients": 12})
    part = load_hospital(config, 0, "train")
    assert part.inputs.shape[1] == 3 and torch.equal(part.inputs[:, 0], part.inputs[:, 2])


def test_empty_dataset_has_no_patients() -> None:
    empty = Dataset(torch.zeros(0, 1), torch.zeros(0).long(), torch.zeros(0).long(), ())
    assert len(empty) == empty.patient_count == len(empty.records_of_patient) == 0


def test_load_images_from_a_file_a_flat_folder_and_class_folders(folder: Path, tmp_path: Path) -> None:
    config = _config(None)
    one = load_images(folder / "test" / "ill" / "person3_virus_0.png", config, None)
    assert one.names == ("person3_virus_0.png",) and one.labels.tolist() == [-1]
    torch.testing.assert_close(one.inputs, torch.full((1, 1, SIZE, SIZE), 30 / 255))
    flat = load_images(folder / "test" / "well", config, 4)
    assert flat.labels.tolist() == [-1] * 4 and flat.names[0] == "IM-0000-0001.png"
    _check(flat, config)
    classes = load_images(folder / "test", config, None)
    assert len(classes) == 39 and classes.labels.dtype == torch.int64 and classes.patient_count == 39
    assert Counter(classes.labels.tolist()) == {0: 24, 1: 15}
    assert all(
        (label == 0) == name.startswith("person") for label, name in zip(classes.labels, classes.names, strict=True)
    )
    _check(classes, config)


def test_load_images_takes_a_limit_evenly(folder: Path) -> None:
    config = _config(None)
    for limit, expected in ((1, {0: 1}), (6, {0: 3, 1: 3}), (7, {0: 4, 1: 3}), (35, {0: 20, 1: 15}), (99, None)):
        part = load_images(folder / "test", config, limit)
        assert Counter(part.labels.tolist()) == (expected or {0: 24, 1: 15})
    assert list(load_images(folder / "test", config, 4).names) == [
        "person0_virus_0.png",
        "person10_virus_0.png",
        "IM-0000-0001.png",
        "IM-0001-0001.png",
    ]


def test_load_images_with_only_some_classes(folder: Path) -> None:
    part = load_images(folder / "test", _config(None, classes=["odd", "well"]), None)
    assert part.labels.tolist() == [1] * 15


def test_load_images_skips_and_refuses(folder: Path, tmp_path: Path) -> None:
    (folder / "test" / "ill" / "person0_virus_0.png").write_bytes(b"")
    config = _config(None)
    part = load_images(folder / "test", config, 4)
    assert part.skipped == 1 and len(part) == 3 and part.patients.tolist() == [0, 1, 2]
    bad = folder / "test" / "ill" / "person0_virus_0.png"
    _fails(lambda: load_images(bad, config, None), "no image can be read; the first:", "person0_virus_0.png")
    _fails(lambda: load_images(tmp_path / "absent", config, None), "absent does not exist")
    (tmp_path / "empty").mkdir()
    _fails(lambda: load_images(tmp_path / "empty", config, None), "holds no file of the kinds DICOM, PNG")
    for source in ("images", "npz", "csv"):
        other = _config(folder, source=source, table={"features": 1})
        _fails(lambda other=other: load_images(None, other, None), "no images were given: pass --images")


def test_load_images_from_npz_with_one_class(tmp_path: Path) -> None:
    path = _npz(tmp_path / "a.npz", [1] * 5)
    part = load_images(path, _config(None, source="npz"), 3)
    assert part.labels.tolist() == [1] * 3 and part.inputs.shape == (3, 1, SIZE, SIZE)
    _fails(lambda: load_images(tmp_path / "b.npz", _config(None, source="npz"), 3), "b.npz does not exist")


def test_load_images_from_csv(tmp_path: Path) -> None:
    config = _config(None, source="csv", table={"columns": [{"name": "age"}]})
    path = tmp_path / "t.csv"
    path.write_text("age,label\n1,well\n2,ill\n3,well\n")
    part = load_images(path, config, 2)
    assert part.names == ("t.csv line 2", "t.csv line 3") and part.labels.tolist() == [1, 0]
    path.write_text("age\n1\n2\n")
    assert load_images(path, config, None).labels.tolist() == [-1, -1]
    in_order = _config(None, source="csv", table={"features": 1})  # of another file than the one that trained
    _fails(lambda: load_images(path, in_order, None), "data.table.columns is not set", kind=ConfigError)


def test_load_images_from_embedded_sources(folder: Path) -> None:
    phantoms = _config(None, source="phantoms", phantoms={"train_patients": 9, "test_patients": 9})
    assert len(load_images(None, phantoms, None)) == 1
    part = load_images(None, phantoms, 4)
    assert Counter(part.labels.tolist()) == {0: 2, 1: 2} and part.names[0].startswith("synthetic-phantom-test-")
    cancer = _config(None, source="breast_cancer", classes=["malignant", "benign"])
    assert load_images(None, cancer, None).inputs.shape == (1, 30)
    assert Counter(load_images(None, cancer, 10).labels.tolist()) == {0: 5, 1: 5}
    # a model for images can be asked about files; one for 30 features cannot
    assert load_images(folder / "test", phantoms, 2).inputs.shape == (2, 1, SIZE, SIZE)
    _fails(lambda: load_images(folder / "test", cancer, 2), "breast_cancer takes no images")


def _xrays_config(root: Path, **more: Any) -> Config:
    classes = ["normal", "bacterial", "viral"]
    return _config(root, classes=classes, **{"image_size": 32, "wrong_size": "resize", **more})


def test_real_xrays(xrays: Path) -> None:
    config = _xrays_config(xrays, subset={"train_patients": 12, "test_patients": 9})
    for split, limit in (("train", 12), ("test", 9)):
        parts = [load_hospital(config, rank, split) for rank in range(3)]
        for part in parts:
            _check(part, config)
            assert part.patient_count == limit and part.skipped == 0
            assert set(part.labels.tolist()) == {0, 1, 2}
            assert part.inputs.std((1, 2, 3)).min() > 0.05
        patients = [patient for part in parts for patient in _patients(part)]
        assert len(set(patients)) == len(patients) == 3 * limit
    assert patients_per_hospital(config) == [12, 12, 12]


@pytest.mark.parametrize("partition", [{"method": "equal"}, {"method": "dirichlet", "alpha": 0.5}])
def test_real_xrays_share_no_patient_between_hospitals(
    xrays: Path, partition: dict[str, Any], monkeypatch: Any
) -> None:
    # all patients of all hospitals, by name; pixels are not needed
    monkeypatch.setattr(
        data, "read_image", lambda path, form: Picture(torch.zeros(form.channels, form.size, form.size), ())
    )
    config = _xrays_config(xrays, partition=partition, image_size=8)
    for split in SPLITS:
        parts = [load_hospital(config, rank, split) for rank in range(3)]
        patients = Counter(patient for part in parts for patient in _patients(part))
        assert set(patients.values()) == {1}
        files = sorted(path.name for path in (xrays / split).rglob("*.jpeg"))
        assert sorted(name for part in parts for name in part.names) == files
        assert set(patients) == {patient_of(name) for name in files}
        if split == "train":
            assert patients_per_hospital(config) == [part.patient_count for part in parts]
    assert all(patient.startswith(("person", "IM-", "NORMAL2-IM-")) for patient in patients)


def test_real_xrays_have_the_native_size(xrays: Path) -> None:
    config = _xrays_config(xrays, image_size=224, wrong_size="error", channels=3)
    part = load_images(xrays / "test", config, 3)
    assert part.inputs.shape == (3, 3, 224, 224) and part.labels.tolist() == [0, 1, 2]
    assert (part.inputs[:, 0] - part.inputs[:, 1]).abs().max() < 0.02  # three equal channels


@pytest.mark.parametrize("method", ["equal", "none"])
def test_who_validates_is_fixed_by_name(folder: Path, method: str) -> None:
    config = _config(folder, partition={"method": method}, validation_fraction=0.3)
    ranks = range(3) if method == "equal" else [0]

    def names(part: Part) -> set[str]:
        return {patient_of(name) for rank in ranks for name in load_hospital(config, rank, part).names}

    train, validation = names("train"), names("validation")
    assert train and validation and not train & validation
    assert train | validation == {patient_of(path.name) for path in (folder / "train").rglob("*.png")}
    assert all((place_of(name, "validation") < 0.3) == (name in validation) for name in train | validation)
    _image(folder / "train" / "ill" / "person7777_virus_0.png", 50)  # one patient more, and nobody else moves
    assert names("train") - {"person7777"} == train and names("validation") - {"person7777"} == validation


def test_who_validates_trains_not_and_counts_not() -> None:
    config = _config(None, source="phantoms", validation_fraction=0.25, phantoms={"train_patients": 90})
    counts = patients_per_hospital(config)
    found = [load_hospital(config, rank, "train").patient_count for rank in range(3)]
    aside = [load_hospital(config, rank, "validation").patient_count for rank in range(3)]
    assert counts == found and sum(found) + sum(aside) == 90 and min(aside) > 0
    sizes = public_sizes(config)
    assert (sizes.smallest, sizes.largest) == (min(found), max(found))
    _fails(
        lambda: patients_per_hospital(config.with_values(data={"validation_fraction": 1e-6})),
        "has no validation patients",
        "data.validation_fraction",
    )


def test_a_hospital_by_itself_takes_its_whole_folder(folder: Path) -> None:
    config = _config(folder).with_values(site={"data_of": "hospital"})
    for rank in range(3):
        assert patients_per_hospital(config) == [27] and load_hospital(config, rank, "train").patient_count == 27
    assert config.digest() == _config(folder).digest()  # sites may differ in it
    table = Config().with_values(data={"phantoms": {"train_patients": 30, "test_patients": 30}})
    alone = table.with_values(site={"data_of": "hospital"})  # phantoms are the same everywhere
    assert load_hospital(alone, 1, "train").names == load_hospital(table, 1, "train").names
    assert patients_per_hospital(alone) == [10, 10, 10]


def test_a_hospital_by_itself_may_lack_a_class_and_test_patients(folder: Path) -> None:
    config = _config(folder).with_values(site={"data_of": "hospital"})
    shutil.rmtree(folder / "train" / "well")
    shutil.rmtree(folder / "test")
    _fails(lambda: patients_per_hospital(_config(folder)), "train/well does not exist")
    part = load_hospital(config, 2, "train")
    assert part.patient_count == 12 and set(part.labels.tolist()) == {0}
    for none in ("test", "validation"):
        held_out = load_hospital(config, 2, none)
        assert (len(held_out), held_out.patient_count) == (0, 0)
        assert held_out.inputs.shape == (0, *config.data.input_shape)
    found = survey(config)
    assert found.training_patients == [12]
    assert any("no train patient of well" in words for words in found.warnings)
    assert any(words.startswith("no test patients here") for words in found.warnings)
    # What can only be a mistake is still told.
    (folder / "train" / "wel").mkdir()
    _fails(lambda: load_hospital(config, 2, "train"), "has a folder 'wel'")
    (folder / "train" / "wel").rename(folder / "train" / "well")
    (folder / "train" / "well" / "notes.txt").write_text("no image")
    _fails(lambda: load_hospital(config, 2, "train"), "has no images (1 no image (.txt))")
    shutil.rmtree(folder / "train")
    _fails(lambda: load_hospital(config, 2, "train"), "no patient to train on here")


def test_a_table_of_one_hospital_may_have_nobody_to_test(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("age,label,who\n" + "".join(f"{30 + row},ill,p{row}\n" for row in range(5)))
    table = {"features": 1, "patient_column": "who", "test_fraction": 1e-6}
    config = Config().with_values(
        data={"source": "csv", "classes": ["ill", "well"], "table": table},
        model={"architecture": "mlp"},
        federation={"hospitals": 2},
        site={"data": str(path), "data_of": "hospital"},
    )
    assert patients_per_hospital(config) == [5]
    part, none = load_hospital(config, 1, "train"), load_hospital(config, 1, "test")
    assert part.patient_count == 5 and none.inputs.shape == (0, 1) and none.patient_count == 0
    _fails(lambda: load_hospital(config.with_values(site={"data_of": None}), 1, "train"), "")
