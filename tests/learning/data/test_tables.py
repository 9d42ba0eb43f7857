"""Tables and archives: right values, and every mistake is one line that names it."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError, DataError
from mpc_fl.learning.data.tables import read_breast_cancer, read_csv, read_medmnist, scale_features


def _config(source: str, **data: Any) -> Config:
    return Config().with_values(data={"source": source, "classes": ["benign", "malignant"], **data})


def _csv_config(**table: Any) -> Config:
    return _config("csv", table={"features": 2, **table})


GOOD = "age,label,size\n" + "".join(f"{row},{'malignant' if row % 3 else 'benign'},{row / 2}\n" for row in range(40))


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _one_line(caught: pytest.ExceptionInfo[DataError], path: Path) -> None:
    assert "\n" not in str(caught.value) and caught.value.fix and path.name in caught.value.what


def test_scaling_without_ranges_is_fixed_odd_and_monotone() -> None:
    values = np.array([[-1e300], [-3.0], [0.0], [3.0], [1e300]])
    scaled = scale_features(values, _csv_config())
    assert scaled.dtype == np.float32 and np.isfinite(scaled).all()
    np.testing.assert_allclose(scaled, -scaled[::-1])
    np.testing.assert_allclose(scaled[3], np.log(4), rtol=1e-6)
    assert (np.diff(scaled[:, 0]) > 0).all()
    np.testing.assert_array_equal(scale_features(values[1:3], _csv_config()), scaled[1:3])  # no other row matters


def test_scaling_by_reference_ranges_is_public_and_bounded() -> None:
    config = _csv_config(reference_ranges=[[0.0, 4.0], [-1.0, 1.0]])
    scaled = scale_features(np.array([[0.0, -1.0], [1.0, 1.0], [4.0, 0.0], [-9.0, 9.0]]), config)
    expected = [[-2.0, -2.0], [0.0, 2.0], [2.0, 4 * 0.5**0.5 - 2], [-2.0, 2.0]]
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)
    with pytest.raises(DataError, match="2 reference ranges are configured for 3 features"):
        scale_features(np.zeros((1, 3)), config)
    with pytest.raises(ConfigError, match="low < high"):
        _csv_config(reference_ranges=[[1.0, 1.0]])


def test_csv_values_labels_names(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.csv", GOOD)
    records = read_csv(path, _csv_config(), None)
    np.testing.assert_allclose(
        records.inputs, scale_features(np.array([[row, row / 2] for row in range(40)]), _csv_config())
    )
    assert records.inputs.dtype == np.float32 and records.labels.dtype == np.int64
    assert records.labels.tolist() == [int(row % 3 > 0) for row in range(40)]
    assert records.names[0] == "t.csv line 2" and len(set(records.patients)) == 40


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.9])
def test_csv_splits_are_disjoint_and_complete_by_patient(tmp_path: Path, fraction: float) -> None:
    rows = "".join(f"p{row % 39} ,{row},{row % 2},1\n" if row % 2 else f"p{row % 39},{row},0,1\n" for row in range(160))
    path = _write(tmp_path / "t.csv", "who,age,label,size\n" + rows)
    config = _csv_config(patient_column="who", test_fraction=fraction)
    train, test = read_csv(path, config, "train"), read_csv(path, config, "test")
    # a space after the name does not make another patient of it
    assert set(train.patients) | set(test.patients) == {f"p{k}" for k in range(39)}
    assert not set(train.patients) & set(test.patients)
    assert train.patients and test.patients
    assert sorted(train.names + test.names) == sorted(f"t.csv line {line}" for line in range(2, 162))
    assert abs(len(set(test.patients)) - 39 * fraction) < 10
    assert read_csv(path, config, "test").names == test.names
    splits = {tuple(read_csv(path, config.with_values(seed=seed), "test").names) for seed in range(6)}
    assert len(splits) > 1  # the seed decides who is held out


def test_a_patient_more_moves_no_other_into_or_out_of_the_test_set(tmp_path: Path) -> None:
    config = _csv_config(patient_column="who")
    rows = [f"p{row},{row},{row % 2},1\n" for row in range(60)]
    before, after = (
        read_csv(_write(tmp_path / name, "who,age,label,size\n" + "".join(lines)), config, "test").patients
        for name, lines in (("a.csv", rows), ("b.csv", ["another,7,1,1\n", *rows]))
    )
    assert set(before) == set(after) - {"another"} and before


def test_a_table_without_test_patients_is_a_mistake(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.csv", "age,label,size\n1,0,2\n2,1,3\n")
    with pytest.raises(DataError, match="no test patient: of 2 patients none falls below"):
        read_csv(path, _csv_config(test_fraction=0.001), "test")


def test_csv_labels_by_number_and_class_names_first(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.csv", "age,label,size\n1, 1 ,2\n1,benign,2\n1,0,2\n")
    assert read_csv(path, _csv_config(), None).labels.tolist() == [1, 0, 0]
    named = _csv_config().with_values(data={"classes": ["1", "0"]})
    path = _write(tmp_path / "t.csv", "age,label,size\n1,1,2\n1,0,2\n")
    assert read_csv(path, named, None).labels.tolist() == [0, 1]


def test_csv_of_spreadsheets(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.csv", b"\xef\xbb\xbflabel, age ,size\r\nbenign,1,2\r\n\r\nmalignant,3,4\r\n")
    records = read_csv(path, _csv_config(), None)
    assert records.labels.tolist() == [0, 1]
    assert records.names == ["t.csv line 2", "t.csv line 4"]  # the empty line counts


def test_csv_without_labels_can_be_diagnosed_not_trained(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.csv", "age,size\n1,2\n3,4\n")
    assert read_csv(path, _csv_config(), None).labels.tolist() == [-1, -1]
    with pytest.raises(DataError, match="has no column 'label'"):
        read_csv(path, _csv_config(), "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("age,label,size\n", "has no rows"),
        ("age,klass,size\n1,0,2\n", "has no column 'label'"),
        ("age,label\n1,0\n", "has 1 feature columns, not 2"),
        ("age,label,size,mass\n1,0,2,3\n", "has 3 feature columns, not 2"),
        ("age,label,size\n1,0,2\nnan,0,2\n", "line 3: column 'age' holds no number"),
        ("age,label,size\n1,0,inf\n", "line 2: column 'size' holds no number"),
        ("age,label,size\n1,0,\n", "line 2: column 'size' holds no number"),
        ("age,label,size\n1,0,GEHEIM\n", "line 2: column 'size' holds no number"),
        ("age,label,size\n1,0,1_0\n", "line 2: column 'size' holds no number"),
        ('age,label,size\n1,0,2\n\n"1\n",0,x\n', "line 5: column 'size' holds no number"),
        ("age,label,size\n1,GEHEIM,2\n", "line 2 has a label that is neither a class of data.classes nor a number"),
        ("age,label,size\n1,2,2\n", "wrong number of classes"),
        ("age,label,size\n1,-1,2\n", "wrong number of classes"),
        ("age,label,size\n1,²,2\n", "neither a class of data.classes nor a number"),
        ("age,label,size\n1," + "9" * 5000 + ",2\n", "wrong number of classes"),
        ("age,label,size\n1,,2\n", "line 2 has no label"),
        ("age,label,size\n1,0,2,3\n", "line 2 has 4 cells, the header 3"),
        ("age,label,size\n1,0\n", "line 2 has 2 cells, the header 3"),
        ("age,label,age\n1,0,2\n", "two columns of the same name"),
        (bytes(range(256)), "cannot read"),
        ("age,label,size\n" + "1" * 200000 + ",0,2\n", "cannot read"),
    ],
)
def test_csv_mistakes(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = _write(tmp_path / "t.csv", content)
    with pytest.raises(DataError) as caught:
        read_csv(path, _csv_config(), "train")
    assert message in str(caught.value) and "GEHEIM" not in str(caught.value)
    _one_line(caught, path)


def test_csv_mistakes_about_patients_and_files(tmp_path: Path) -> None:
    config = _csv_config(patient_column="who")
    path = _write(tmp_path / "t.csv", GOOD)
    with pytest.raises(DataError, match="has no column 'who'") as caught:
        read_csv(path, config, "train")
    _one_line(caught, path)
    # rows without a patient are not one patient
    path = _write(tmp_path / "t.csv", "who,age,label,size\np1,1,0,2\n ,1,0,2\n")
    with pytest.raises(DataError, match="line 3: the patient column is empty") as caught:
        read_csv(path, config, "train")
    _one_line(caught, path)
    for missing in (tmp_path / "absent.csv", tmp_path):
        with pytest.raises(DataError, match="cannot read") as caught:
            read_csv(missing, config, "train")
        _one_line(caught, missing)


def test_breast_cancer() -> None:
    config = _config("breast_cancer", classes=["malignant", "benign"])
    train, test = read_breast_cancer(config, "train"), read_breast_cancer(config, "test")
    assert len(train.labels) + len(test.labels) == 569 == len(set(train.names) | set(test.names))
    assert train.inputs.shape[1] == 30 and train.inputs.dtype == np.float32 and len(test.labels) == 132
    counts = Counter(train.labels.tolist()) + Counter(test.labels.tolist())
    assert counts == {0: 212, 1: 357}  # 212 malignant, 357 benign


def test_breast_cancer_labels_follow_the_configured_names() -> None:
    turned = read_breast_cancer(_config("breast_cancer", classes=["benign", "malignant"]), "train")
    usual = read_breast_cancer(_config("breast_cancer", classes=["malignant", "benign"]), "train")
    np.testing.assert_array_equal(turned.labels, 1 - usual.labels)


@pytest.mark.parametrize(
    ("classes", "message"), [(["a", "b", "c"], "has 2, 3 are configured"), (["ill", "well"], "others are configured")]
)
def test_breast_cancer_with_other_classes(classes: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_breast_cancer(_config("breast_cancer", classes=classes), "train")


def _npz(path: Path, images: Any, labels: Any, split: str = "train", **more: Any) -> Path:
    np.savez(path, **{f"{split}_images": images, f"{split}_labels": labels, **more})
    return path


GREY = np.arange(6 * 64).reshape(6, 8, 8).astype(np.uint8)
LABELS = np.array([0, 1, 0, 1, 0, 1], dtype=np.uint8)


def _npz_config(**data: Any) -> Config:
    return _config("npz", **{"image_size": 8, **data})


@pytest.mark.parametrize("column", [False, True])
def test_npz_grey(tmp_path: Path, column: bool) -> None:
    path = _npz(tmp_path / "mnist.npz", GREY, LABELS[:, None] if column else LABELS)
    records = read_medmnist(path, _npz_config(), "train")
    np.testing.assert_allclose(records.inputs, GREY[:, None] / 255, rtol=1e-6)
    assert records.inputs.dtype == np.float32 and records.labels.dtype == np.int64
    assert records.labels.tolist() == LABELS.tolist()
    assert records.names == records.patients == [f"mnist-train-{row}" for row in range(6)]
    np.testing.assert_allclose(
        read_medmnist(path, _npz_config(channels=3), "train").inputs, np.stack([GREY / 255] * 3, 1), rtol=1e-6
    )


@pytest.mark.parametrize("kind", [bool, np.float32, np.int8, np.uint64])
def test_npz_labels_of_any_kind_that_holds_whole_numbers(tmp_path: Path, kind: Any) -> None:
    path = _npz(tmp_path / "a.npz", GREY, LABELS.astype(kind))
    labels = read_medmnist(path, _npz_config(), "train").labels
    assert labels.dtype == np.int64 and labels.tolist() == LABELS.tolist()


def test_npz_colour(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    path = _npz(tmp_path / "a.npz", colour, LABELS, "test")
    np.testing.assert_allclose(
        read_medmnist(path, _npz_config(channels=3), "test").inputs, colour.transpose(0, 3, 1, 2) / 255, rtol=1e-6
    )
    np.testing.assert_allclose(
        read_medmnist(path, _npz_config(), "test").inputs, colour.mean(3)[:, None] / 255, atol=1e-6
    )


class _Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_npz_pickles_are_refused_and_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    bombs = np.array([_Bomb(trace)] * 6, dtype=object)
    for index, (images, labels) in enumerate([(bombs, LABELS), (GREY, bombs)]):
        path = _npz(tmp_path / f"{index}.npz", images, labels)
        with pytest.raises(DataError, match="is no MedMNIST archive") as caught:
            read_medmnist(path, _npz_config(), "train")
        _one_line(caught, path)
    assert not trace.exists()
    np.load(path, allow_pickle=True)["train_labels"]
    assert trace.exists()  # the bomb works


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (GREY[:, :7], LABELS, "are 7x8, expected 8x8: make height and width equal"),
        (GREY.astype(np.float32), LABELS, "are float32, expected uint8"),
        (np.zeros((6, 9, 9), np.uint8), LABELS, "are 9x9, expected 8x8: set data.image_size=9"),
        (np.zeros((6, 3, 8, 8), np.uint8), LABELS, "are 3x8x8: colours come first"),
        (np.zeros(6, np.uint8), LABELS, "are no axes: expected height x width"),
        (np.zeros((6, 8, 8, 8), np.uint8), LABELS, "are 8x8x8: expected height x width"),
        (np.zeros((6, 8, 8, 4), np.uint8), LABELS, "are 8x8x4: expected height x width"),
        (np.uint8(3), LABELS, "is no MedMNIST archive"),
        (GREY, np.uint8(3), "not one class per image"),
        (GREY, LABELS[:5], r"has shape \(5,\) for 6 images, not one class per image"),
        (GREY, np.zeros((6, 2), np.uint8), "has 2 labels an image, not one class per image"),
        (GREY, LABELS * 0.5, "is float64, not whole numbers"),
        (GREY, LABELS * 1e300, "is float64, not whole numbers"),
        (GREY, LABELS.astype("U1"), "is <U1, not whole numbers"),
        (GREY, LABELS + 1, "labels from 1 to 2, 2 are configured"),
        (GREY, LABELS.astype(int) - 1, "labels from -1 to 0, 2 are configured"),
        (GREY[:0], LABELS[:0], "holds no train images"),
    ],
)
def test_npz_mistakes(tmp_path: Path, images: Any, labels: Any, message: str) -> None:
    path = _npz(tmp_path / "a.npz", images, labels)
    with pytest.raises(DataError, match=message) as caught:
        read_medmnist(path, _npz_config(), "train")
    _one_line(caught, path)


def test_npz_files_that_are_no_archive(tmp_path: Path) -> None:
    whole = _npz(tmp_path / "whole.npz", GREY, LABELS).read_bytes()
    compressed = io.BytesIO()
    np.savez_compressed(compressed, train_images=GREY, train_labels=LABELS)
    broken = bytearray(compressed.getvalue())
    broken[60:160] = bytes(100)
    plain = io.BytesIO()
    np.save(plain, GREY)
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("train_images", "text")
        archive.writestr("train_labels", "text")
    path = tmp_path / "bad.npz"
    for content in (b"", b"text", whole[:-50], whole[:300], bytes(broken), plain.getvalue(), other.getvalue()):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is no MedMNIST archive: it must hold train_images") as caught:
            read_medmnist(path, _npz_config(), "train")
        _one_line(caught, path)
    path.write_bytes(whole)
    with pytest.raises(DataError, match="it must hold test_images and test_labels"):
        read_medmnist(path, _npz_config(), "test")
    with pytest.raises(DataError, match="absent.npz does not exist"):
        read_medmnist(tmp_path / "absent.npz", _npz_config(), "train")
    with pytest.raises(DataError, match="is no MedMNIST archive"):
        read_medmnist(tmp_path, _npz_config(), "train")


def test_npz_damaged_anywhere_is_read_or_refused(tmp_path: Path) -> None:
    """Found zlib.error, NotImplementedError and RuntimeError, which are no BadZipFile."""
    draw = np.random.default_rng(0)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, train_images=GREY, train_labels=LABELS)
    path, refused = tmp_path / "a.npz", 0
    for _ in range(400):
        content = bytearray(buffer.getvalue())
        for place in draw.integers(0, len(content), 3):
            content[place] = draw.integers(256)
        path.write_bytes(content)
        try:
            assert read_medmnist(path, _npz_config(), "train").inputs.shape == (6, 1, 8, 8)
        except DataError:
            refused += 1
    assert 0 < refused < 400
