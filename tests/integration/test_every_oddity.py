"""A folder with every oddity of hospital archives is trained on, and `check` said before what the run does with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.pixels import compress
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless

from mpc_fl.apps.cli import main as cli
from tests.learning.data.dicom_writing import write_dicom

CLASSES = ("normal", "0", "yes")  # two of them are no text to YAML
WAYS = 14
PATIENTS = {"train": WAYS, "test": WAYS // 2}  # of each class; each has two films, written in two ways
SIZES = ((40, 40), (48, 36), (36, 50))
CONFIGURATION = """
name: odd
data: {source: images, classes: [normal, "0", "yes"], image_size: 32, wrong_size: resize, frame: middle, most_unreadable: 0.2}
training: {rounds: 3, local_steps: 12, batch_size: 20, learning_rate: 0.02, momentum: 0.9, gradient_clipping: 1}
privacy: {mechanism: none, smallest_hospital: 5}
federation: {hospitals: 2}
"""


def _written(folder: Path, number: int, way: int, film: np.ndarray, patient: str) -> Path:
    """The file of a film, float64 (height, width) in [0, 1], in one of `WAYS`. Pictures do not say whose they are."""
    eight, twelve = np.rint(film * 255).astype(np.uint8), np.rint(film * 4095).astype(np.uint16)
    tags: dict[str, Any] = {"PatientID": patient}
    path = folder / f"IM{number:06d}"
    match way:
        case 0:
            return write_dicom(path, twelve, bits=12, WindowCenter=2048, WindowWidth=4096, **tags)
        case 1:
            return write_dicom(path, 4095 - twelve, bits=12, PhotometricInterpretation="MONOCHROME1", **tags)
        case 2:
            return write_dicom(path, 4095 - twelve, bits=12, RescaleSlope=-1, RescaleIntercept=4095, **tags)
        case 3:
            return write_dicom(
                path.with_suffix(".ima"), (twelve.astype(np.int16) - 2048).astype(np.int16), bits=16, **tags
            )
        case 4:
            return write_dicom(path, eight, NumberOfFrames=3, PixelData=eight.tobytes() * 3, **tags)
        case 5 | 6:
            dataset = pydicom.dcmread(write_dicom(path, twelve, bits=12, **tags))
            compress(dataset, JPEGLSLossless if way == 5 else JPEG2000Lossless)
            dataset.save_as(path)
        case 7:
            write_dicom(path, twelve, bits=12, **tags)
            path.write_bytes(path.read_bytes()[132:])  # without the mark
        case 8:
            colours = ("Red", "Green", "Blue")
            table = np.arange(0, 65536, 257, dtype="<u2").tobytes()
            tags |= {f"{colour}PaletteColorLookupTableDescriptor": [256, 0, 16] for colour in colours}
            tags |= {f"{colour}PaletteColorLookupTableData": table for colour in colours}
            return write_dicom(path, eight, PhotometricInterpretation="PALETTE COLOR", **tags)
        case 9:
            return write_dicom(path, twelve[::-1, ::-1].copy(), bits=12, PatientOrientation=["R", "H"], **tags)
        case 10 | 11:
            path = path.with_suffix(".png" if way == 10 else ".tif")
            Image.fromarray(twelve).save(path)
        case 12:
            path = folder / f"{path.name}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(np.stack([twelve.T.astype(np.int16)] * 3, axis=-1), np.eye(4)), path)
        case _:
            path, orientation = path.with_suffix(".jpg"), Image.Exif()
            orientation[0x0112] = 6  # a quarter of a turn
            Image.fromarray(eight).rotate(90, expand=True).save(path, quality=95, exif=orientation)
    return path


def _folder(root: Path) -> None:
    """Films of all ways, three files that cannot be read, six things that are none, and a table of a spreadsheet."""
    draw, rows, number = np.random.default_rng(0), list[tuple[Path, str]](), 0
    for split, patients in PATIENTS.items():
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for patient in range(patients):
                for view in range(2):
                    height, width = SIZES[(patient + view) % len(SIZES)]
                    down, right = np.mgrid[0:height, 0:width] / max(height, width)
                    shape = (right, down, np.hypot(down - 0.5, right - 0.5))[label]
                    film = (0.15 + 0.7 * shape / shape.max() + draw.normal(0, 0.03, shape.shape)).clip(0, 1)
                    of = f"{split}{label}-{patient:03d}"
                    path = _written(folder, number, (2 * patient + view) % WAYS, film, of)
                    rows.append((path, of.upper() if view else f" {of}"))  # spellings of one patient
                    number += 1
    folder = root / "train" / "normal"
    (folder / "cut.dcm").write_bytes((folder / "IM000000").read_bytes()[:-90])
    (folder / "text.png").write_text("no picture")
    (folder / "link.dcm").symlink_to("/nowhere/film.dcm")
    rows += [(folder / name, f"train0-00{place}") for place, name in enumerate(("cut.dcm", "text.png", "link.dcm"))]
    for name in ("notes.txt", ".hidden", "Thumbs.db", "DICOMDIR"):
        (folder / name).write_text("words")
    (folder / "a.gif").write_bytes(b"GIF89a" + b"0" * 30)
    (folder / "study").mkdir()
    lines = [f"{path.relative_to(root).as_posix()};{patient};f;4,5;GE" for path, patient in rows]
    (root / "patients.csv").write_text("\n".join(["file;patient;sex;age;scanner", *lines]), encoding="utf-16")


def _answer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> dict[str, Any]:
    """What a command prints for machines."""
    monkeypatch.setattr(sys, "argv", ["mpc-fl", *map(str, arguments), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said, complained = capsys.readouterr()
    assert not ended.value.code, said + complained
    answer: dict[str, Any] = json.loads(said.splitlines()[-1])
    return answer


@pytest.mark.processes
@pytest.mark.slow
def test_a_folder_with_every_oddity_is_trained_on_as_check_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    root, config, out = tmp_path / "films", tmp_path / "odd.yaml", tmp_path / "run"
    _folder(root)
    config.write_text(CONFIGURATION)
    before = _answer(capsys, monkeypatch, "check", config, "--data", root)["data"]
    films = 2 * len(CLASSES) * sum(PATIENTS.values())
    assert before["records"] == films + 3 and before["patients"] == films // 2
    assert before["parts"]["train"]["class_counts"] == [2 * PATIENTS["train"]] * 3
    assert before["patients_from"] == {"patients.csv": films} and len(before["first_unreadable"]) == 3
    assert before["left_aside"] == {
        "hidden": 1, "index or cache of a program": 2, "GIF": 1, "no image (.txt)": 1, "folder": 1,
    }  # fmt: skip

    after = _answer(capsys, monkeypatch, "train", config, "--data", root, "--out", out)
    assert after["skipped_files"] == 3 and after["treatments"] == before["treatments"]
    assert after["final"]["class_counts"] == before["parts"]["test"]["class_counts"]
    assert after["final"]["accuracy"] > 0.8  # films of all ways show the same
    logs = "".join(path.read_text() for path in (out / "logs").iterdir())
    assert all(f"{name}: " in logs for name in ("cut.dcm", "text.png", "link.dcm"))
    last = [
        json.loads((out / "parties" / f"hospital-{rank}" / "metrics.jsonl").read_text().splitlines()[-1])
        for rank in range(2)
    ]
    assert [of["patients"]["train"] for of in last] == before["training_patients"]
