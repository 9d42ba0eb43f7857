"""A folder as a hospital has it, with every oddity: what `check` says beforehand is what the run does and its report says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from mpc_fl.apps.cli import main as cli
from mpc_fl.learning.models.weights_store import described
from tests.learning.data.dicom_writing import write_dicom

SITE = """
name: films
data: {source: images, classes: [ill, well], image_size: 16, wrong_size: resize, frame: middle, most_unreadable: 0.2}
training: {rounds: 1, local_steps: 2, batch_size: 4}
privacy: {mechanism: local, delta: 0.01, smallest_hospital: 3, largest_hospital: 40}
federation: {hospitals: 2}
"""


def _said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """Exit status, and all that a command says."""
    monkeypatch.setattr(sys, "argv", ["mpc-fl", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said, complained = capsys.readouterr()
    return int(ended.value.code or 0), " ".join((said + complained).split())


def _folder(root: Path) -> None:
    """Two classes of 12 files of 6 patients in each split, of seven kinds; two more of each class are odd in training."""
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(("ill", "well")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(12):
                film = draw.normal(0.3 + 0.4 * label, 0.1, (20 + number % 2 * 4, 20)).clip(0, 1)
                eight, twelve = np.rint(film * 255).astype(np.uint8), np.rint(film * 4095).astype(np.uint16)
                patient = {"PatientID": f"{split}-{name}-{number // 2}"}
                turned = {"PhotometricInterpretation": "MONOCHROME1", **patient}
                match number % 3:
                    case 0:
                        write_dicom(folder / f"IM{number}", 4095 - twelve, bits=12, **turned)
                    case 1:
                        write_dicom(folder / f"s{number}.ima", (twelve - 2048.0).astype(np.int16), bits=16, **patient)
                    case _:
                        frames = {"NumberOfFrames": 3, "PixelData": eight.tobytes() * 3, **patient}
                        write_dicom(folder / f"{number}.dcm", eight, **frames)
    folder = root / "train" / "ill"
    (folder / "cut.dcm").write_bytes((folder / "2.dcm").read_bytes()[:-50])
    (folder / "notes.txt").write_text("words")
    (folder / "study").mkdir()


def _site(directory: Path) -> tuple[Path, Path]:
    """A site's data and configuration."""
    _folder(directory / "data")
    (directory / "site.yaml").write_text(SITE)
    return directory / "data", directory / "site.yaml"


def test_check_says_what_a_run_will_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    root, config = _site(tmp_path)
    status, said = _said(capsys, monkeypatch, "check", config, "--data", root)
    assert status == 0, said
    assert "Data: 49 files, 24 patients, 1 unreadable." in said and "48 by headers" in said
    for words in (
        "16 inverted (MONOCHROME1)",
        "16 middle one of several frames",
        "16 no window: brightness by the picture",
    ):
        assert words in said
    assert "left aside: 1 folder, 1 no image (.txt)" in said and "cut.dcm: its pixels are damaged" in said
    assert said.count("6 training patients") == 2

    # A picture of which nothing says whose it is stops the run, and is counted by itself where that is accepted.
    Image.new("L", (16, 16)).save(root / "train" / "well" / "scan.png")
    for command in (["check"], ["train", "--out", tmp_path / "run"]):
        status, said = _said(capsys, monkeypatch, *command, config, "--data", root)
        assert status == 3 and "no patient is known of 1 of 26 images" in said and "data.unit=image" in said
    status, said = _said(capsys, monkeypatch, "check", config, "--data", root, "--set", "data.unit=image")
    assert status == 0 and "Privacy is counted per image, not per patient" in said


@pytest.mark.processes
@pytest.mark.slow
def test_a_run_per_image_says_so_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    root, config = _site(tmp_path)
    Image.new("L", (16, 16)).save(root / "train" / "well" / "scan.png")
    out = tmp_path / "run"
    status, said = _said(capsys, monkeypatch, "train", config, "--out", out, "--data", root, "--set", "data.unit=image")
    assert status == 0 and "per image at delta 0.01" in said, said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["unit"] == "image" and summary["skipped_files"] == 1
    assert summary["treatments"]["inverted (MONOCHROME1)"] == 16
    report = re.sub("<[^>]+>", " ", (out / "report.html").read_text())
    for words in (
        "Privacy is counted per image, not per patient",
        "per image, at delta",
        "16 ",
        "middle one of several frames",
    ):
        assert words in report
    assert {"image"} == set(re.findall(r'"unit": ?"([a-z ]+)"', (out / "reveal_ledger.jsonl").read_text()))
    everything = [path for path in [*out.rglob("*")] if path.is_file()]
    assert not [path for path in everything if b"train-ill-" in path.read_bytes()]  # no PatientID is anywhere


@pytest.mark.processes
@pytest.mark.slow
def test_films_become_inputs_at_a_diagnosis_as_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    root, config = _site(tmp_path)
    run, alone, out = tmp_path / "run", tmp_path / "alone", tmp_path / "diagnosis"
    assert _said(capsys, monkeypatch, "train", config, "--out", run, "--data", root)[0] == 0

    def infer(model: Path, *more: str) -> tuple[int, str]:
        of = [
            "--images",
            root / "test" / "ill",
            "--out",
            out,
            "--set",
            "inference.limit=1",
            "--set",
            "inference.engine=fast",
        ]
        return _said(capsys, monkeypatch, "infer", config, "--model", model, *of, *more)

    for name, value, had in (("not_square", "crop", "pad"), ("frame", "first", "middle")):
        status, said = infer(run / "model.safetensors", "--set", f"data.{name}={value}")
        assert status != 0 and f"was trained with data.{name}={had}, the configuration has {value}" in said, said
    assert not out.exists()
    # A file as earlier versions wrote it, away from its run: the diagnosis goes on, and says what is taken.
    tensors, description = described((run / "model.safetensors").read_bytes(), run / "model.safetensors")
    del description["films"]
    alone.mkdir()
    save_file(tensors, alone / "model.safetensors", metadata={"mpc-fl": json.dumps(description)})
    status, said = infer(alone / "model.safetensors")
    assert status == 0 and "taken is what is configured, data.not_square=pad, data.frame=middle" in said, said
    assert "says how films became its inputs" in (out / "logs" / "model-owner.log").read_text()
