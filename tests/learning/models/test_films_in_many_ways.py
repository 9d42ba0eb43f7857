"""One film, however an archive wrote it, gets the same logits from a network that was trained on a folder of films."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from mpc_fl.config.config import Config, parse_config
from mpc_fl.learning.data.image_files import ImageForm, read_image
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.learning.models.whole_network import TrainedModel
from tests.learning.data.dicom_writing import lookup_table, write_dicom

CLASSES = ("right", "below", "outside")
SIZE, HEIGHT, WIDTH = 32, 48, 40
PATIENTS = {"train": 48, "test": 24, "asked": 3}
MOST_STEPS, BATCH, LEARNED = 300, 24, 0.25  # the mean loss of 5 steps that is low enough
AGREEMENT = 0.02  # of a logit


def _films(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Films that are not square, float64 (N, HEIGHT, WIDTH) in [0, 1], and their labels: bright to the right, below, or outside."""
    draw = np.random.default_rng(list(PATIENTS).index(split))
    down, right = (axis / HEIGHT for axis in np.mgrid[0:HEIGHT, 0:WIDTH])
    shapes = [right, down, np.hypot(down - 0.5, right - WIDTH / HEIGHT / 2)]
    labels = np.arange(PATIENTS[split]) % len(CLASSES)
    contrasts = draw.uniform(0.4, 0.7, len(labels))
    films = [
        0.15 + contrast * shapes[label] / shapes[label].max() for label, contrast in zip(labels, contrasts, strict=True)
    ]
    return (np.stack(films) + draw.normal(0, 0.03, (len(labels), HEIGHT, WIDTH))).clip(0, 1), labels


def _configuration(root: Path, not_square: str) -> Config:
    data = {
        "source": "images", "classes": list(CLASSES), "image_size": SIZE, "wrong_size": "resize", "not_square": not_square,
        "patient_pattern": r"(p\d+)",
    }  # fmt: skip
    values: dict[str, Any] = {"data": data, "site": {"data": str(root)}, "federation": {"hospitals": 2}}
    return parse_config({**values, "privacy": {"mechanism": "none"}}, "test")


def _folder(root: Path) -> None:
    """A folder of films of 8 bits, each of a patient of its own."""
    for split, first in (("train", 1), ("test", 1001)):
        for number, (film, label) in enumerate(zip(*_films(split), strict=True), first):
            path = root / split / CLASSES[label] / f"p{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rint(film * 255).astype(np.uint8)).save(path)


def _trained(config: Config, path: Path) -> TrainedModel:
    """A small network as its file has it, after steps over the films of both hospitals, until it has learned them."""
    hospitals = [load_hospital(config, rank, "train") for rank in range(2)]
    inputs = torch.cat([hospital.inputs for hospital in hospitals])
    labels = torch.cat([hospital.labels for hospital in hospitals])
    model = build_model(config, seed=1)
    optimizer, draw = torch.optim.Adam(model.parameters(), 0.003), torch.Generator().manual_seed(0)
    losses = list[float]()
    while len(losses) < MOST_STEPS and (len(losses) < 5 or sum(losses[-5:]) > 5 * LEARNED):
        rows = torch.randperm(len(labels), generator=draw)[:BATCH]
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    save_model(path, model, config)
    return TrainedModel.read(path, config)


def _written_in_many_ways(folder: Path, film: np.ndarray) -> dict[str, Path]:
    """Files of a film of 12 bits, uint16 (height, width), as scanners, archives and viewers write it."""
    inverse = (4095 - film).astype(np.uint16)
    whole = (film.astype(np.uint32) * 65535 // 4095).astype(np.uint16)
    window: dict[str, Any] = {"WindowCenter": 2048, "WindowWidth": 4096}
    hounsfield: dict[str, Any] = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    files = {
        "window": write_dicom(folder / "window.dcm", film, bits=12, **window),
        "no window": write_dicom(folder / "none.dcm", film, bits=12),
        "MONOCHROME1": write_dicom(folder / "m1.dcm", inverse, bits=12, PhotometricInterpretation="MONOCHROME1"),
        "MONOCHROME1 and a window": write_dicom(
            folder / "m1w.dcm", inverse, bits=12, PhotometricInterpretation="MONOCHROME1", **window
        ),
        "negative slope": write_dicom(folder / "slope.dcm", inverse, bits=12, RescaleSlope=-1, RescaleIntercept=4095),
        "negative slope and a window": write_dicom(
            folder / "slw.dcm", inverse, bits=12, RescaleSlope=-1, RescaleIntercept=4095, **window
        ),
        "rescaled with a window": write_dicom(
            folder / "hu.dcm", film, bits=12, **hounsfield, WindowCenter=1024, WindowWidth=4096
        ),
        "signed": write_dicom(folder / "signed.dcm", (film.astype(np.int16) - 2048).astype(np.int16), bits=12),
        "12 bits said to be 16": write_dicom(folder / "sixteen.dcm", film, bits=16),
        "16 bits": write_dicom(folder / "whole.dcm", whole, bits=16),
        "a table": write_dicom(
            folder / "table.dcm", film, bits=12, VOILUTSequence=lookup_table(list(range(0, 65536, 16)), 0, 16)
        ),
        "turned": write_dicom(folder / "turned.dcm", film[::-1, ::-1].copy(), bits=12, PatientOrientation=["R", "H"]),
        "lying": write_dicom(folder / "lying.dcm", film.T.copy(), bits=12, PatientOrientation=["F", "L"]),
        "implicit types": write_dicom(folder / "implicit.dcm", film, bits=12, syntax=ImplicitVRLittleEndian),
        "big end first": write_dicom(folder / "big.dcm", film, bits=12, syntax=ExplicitVRBigEndian),
    }
    pictures = {"PNG of 12 bits in 16": film, "PNG of 16 bits": whole, "PNG of 8 bits": np.rint(film / 4095 * 255)}
    for name, pixels in pictures.items():
        files[name] = folder / f"{name}.png"
        Image.fromarray(pixels.astype(np.uint8 if "8 bits" in name else np.uint16)).save(files[name])
    files["TIFF"], files["colours"], files["EXIF"] = folder / "a.tiff", folder / "rgb.png", folder / "exif.png"
    Image.fromarray(film).save(files["TIFF"])
    eight = np.rint(film / 4095 * 255).astype(np.uint8)
    Image.fromarray(np.stack([eight] * 3, axis=-1)).save(files["colours"])
    orientation = Image.Exif()
    orientation[0x0112] = 3  # half a turn
    Image.fromarray(eight[::-1, ::-1].copy()).save(files["EXIF"], exif=orientation)
    return files


@pytest.mark.parametrize("not_square", ["pad", "crop", "stretch"])
def test_a_film_written_in_many_ways_gets_the_same_logits(not_square: str, tmp_path: Path) -> None:
    _folder(tmp_path / "data")
    config = _configuration(tmp_path / "data", not_square)
    model = _trained(config, tmp_path / "model.safetensors")
    test = [load_hospital(config, rank, "test") for rank in range(2)]
    tested = sum(len(one.labels) for one in test)
    right = sum(int((model.answers(one.inputs)[0].argmax(1) == one.labels).sum()) for one in test)
    assert right > 0.8 * tested, f"{right} of {tested}"  # it has learned what a film shows

    for number, film in enumerate(_films("asked")[0]):
        folder = tmp_path / str(number)
        folder.mkdir()
        files = _written_in_many_ways(folder, np.rint(film * 4095).astype(np.uint16))
        pixels = torch.stack([read_image(path, ImageForm.of(config.data)).pixels for path in files.values()])
        logits = model.answers(pixels)[0]
        assert 1 < float(logits.abs().max()) < 10
        differ = {
            name: float(difference)
            for name, difference in zip(files, (logits - logits[0]).abs().amax(dim=1), strict=True)
        }
        assert max(differ.values()) < AGREEMENT, differ
