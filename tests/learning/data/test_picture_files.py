"""Kinds of files besides DICOM, PNG and JPEG, films that are not square or not upright, and what else lies in a folder."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mpc_fl.learning.data import picture_files
from mpc_fl.learning.data.dicom_files import MIDDLE_FRAME, TURNED
from mpc_fl.learning.data.file_kinds import UnreadableImageError, kind_of
from mpc_fl.learning.data.image_files import CROPPED, PADDED, RESIZED, STRETCHED, ImageForm, read_image
from mpc_fl.learning.data.image_folders import ImageFolder
from mpc_fl.learning.data.windows import USED_BITS
from tests.learning.data.dicom_writing import write_dicom

SIZE = 16
RAMP = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)


def _read(path: Path, form: ImageForm | None = None) -> np.ndarray:
    return np.asarray(read_image(path, form or ImageForm(1, SIZE)).pixels[0])


@pytest.mark.parametrize("suffix", [".tiff", ".TIF", ".bmp", ".webp", ".jp2", ".j2k", ".png"])
def test_pictures_without_loss(tmp_path: Path, suffix: str) -> None:
    options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(RAMP).save(tmp_path / f"a{suffix}", **options)
    np.testing.assert_allclose(_read(tmp_path / f"a{suffix}"), RAMP / 255, atol=1e-6)
    # Content decides: under another image's name, and under none, it is the same picture.
    (tmp_path / "b.dcm").write_bytes((tmp_path / f"a{suffix}").read_bytes())
    (tmp_path / "IM0001").write_bytes((tmp_path / f"a{suffix}").read_bytes())
    np.testing.assert_allclose(_read(tmp_path / "b.dcm"), RAMP / 255, atol=1e-6)
    assert len(ImageFolder.of(tmp_path).files) == 3


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_tiff_of_16_bits(tmp_path: Path, compression: str | None) -> None:
    pixels = RAMP.astype(np.uint16) * 16
    Image.fromarray(pixels).save(tmp_path / "a.tif", compression=compression)
    picture = read_image(tmp_path / "a.tif", ImageForm(1, SIZE))
    assert picture.treatments == (USED_BITS,)
    np.testing.assert_allclose(picture.pixels[0], pixels / 4095, atol=1e-6)


def test_tiff_of_floats_and_of_what_is_no_number(tmp_path: Path) -> None:
    values = (RAMP.astype(np.float32) - 100) * 7
    Image.fromarray(values).save(tmp_path / "a.tif")
    shown = _read(tmp_path / "a.tif")
    assert shown.min() == 0 and shown.max() == 1 and (np.diff(shown.ravel()) >= 0).all()
    values[3, 3] = np.nan
    Image.fromarray(values).save(tmp_path / "b.tif")
    with pytest.raises(UnreadableImageError, match="no numbers"):
        _read(tmp_path / "b.tif")


def test_pages_of_a_tiff_are_frames(tmp_path: Path) -> None:
    pages = [Image.fromarray(np.full((SIZE, SIZE), 40 * number, np.uint8)) for number in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(UnreadableImageError, match="it has 3 frames: set data.frame"):
        _read(tmp_path / "a.tif")
    picture = read_image(tmp_path / "a.tif", ImageForm(1, SIZE, frame="middle"))
    assert MIDDLE_FRAME in picture.treatments and (picture.pixels == 40 / 255).all()


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_slices_of_nifti(tmp_path: Path, suffix: str) -> None:
    nibabel = pytest.importorskip("nibabel")
    volume = np.zeros((SIZE, SIZE, 3), np.int16)
    volume[2, 5, 1] = 3000  # near the patient's left end (the first axis runs to the right), and to the back
    volume[:, :, 1] += np.arange(SIZE, dtype=np.int16)[:, None]
    path = tmp_path / f"scan{suffix}"
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)
    assert kind_of(path) == "NIfTI" and ImageFolder.of(tmp_path).files == (path,)
    with pytest.raises(UnreadableImageError, match="it has 3 frames"):
        _read(path)
    shown = _read(path, ImageForm(1, SIZE, frame="middle"))
    # The patient's left is at the right of the picture, the back below.
    assert shown[SIZE - 1 - 5, SIZE - 1 - 2] == 1 and (np.diff(shown[0]) < 0).all()


def test_nifti_without_its_reader_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.nii").write_bytes(b"\0" * 344 + b"n+1\0" + b"\0" * 100)
    monkeypatch.setattr(picture_files.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnreadableImageError, match=r"needs nibabel.*pip install 'mpc-fl\[nifti\]'"):
        _read(tmp_path / "a.nii")


@pytest.mark.parametrize("content", [b"", b"x" * 500, b"\0" * 344 + b"n+1\0" + b"\xff" * 100])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".tif", ".bmp", ".webp", ".jp2"])
def test_damaged_files_are_unreadable(tmp_path: Path, suffix: str, content: bytes, capfd: Any) -> None:
    (tmp_path / f"a{suffix}").write_bytes(content)
    with pytest.raises(UnreadableImageError):
        _read(tmp_path / f"a{suffix}")
    whole = io.BytesIO()
    Image.fromarray(RAMP).save(whole, "TIFF", compression="tiff_lzw")
    (tmp_path / "cut.tif").write_bytes(whole.getvalue()[:-120])
    with pytest.raises(UnreadableImageError):
        _read(tmp_path / "cut.tif")
    assert capfd.readouterr().err == ""


def test_nothing_in_a_folder_is_overlooked(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    Image.fromarray(RAMP).save(tmp_path / "b.gif")
    for name in ("notes.txt", "list.csv", "README", ".hidden", "Thumbs.db", "DICOMDIR"):
        (tmp_path / name).write_text("words " * 30)
    (tmp_path / "study").mkdir()
    found = ImageFolder.of(tmp_path)
    assert [path.name for path in found.files] == ["a.png"]
    assert found.left_aside == {
        "GIF": 1, "no image (.txt)": 1, "no image (.csv)": 1, "no image": 1, "hidden": 1,
        "index or cache of a program": 2, "folder": 1,
    }  # fmt: skip


@pytest.mark.parametrize("wide", [False, True])
def test_films_that_are_not_square(tmp_path: Path, wide: bool) -> None:
    film = np.zeros((64, 32), np.uint8)
    film[:, :16] = 255
    film[:16] = 128
    Image.fromarray(film.T if wide else film).save(tmp_path / "a.png")

    def shown(not_square: Any) -> tuple[torch.Tensor, tuple[str, ...]]:
        picture = read_image(tmp_path / "a.png", ImageForm(1, SIZE, "resize", not_square))
        return picture.pixels[0].T if wide else picture.pixels[0], picture.treatments

    padded, said = shown("pad")
    assert said[-1] == PADDED
    assert (padded[:, :4] == 0).all() and (padded[:, 12:] == 0).all()
    assert padded[10, 5] == 1 and padded[10, 10] == 0 and abs(padded[1, 6] - 128 / 255) < 1e-6
    cropped, said = shown("crop")
    assert said[-1] == CROPPED and cropped[0, 2] == cropped[15, 2] == 1 and cropped[0, 12] == 0
    stretched, said = shown("stretch")
    assert said[-1] == STRETCHED and stretched[10, 4] == 1 and stretched[10, 12] == 0
    Image.fromarray(film[:32]).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png", ImageForm(1, SIZE, "resize")).treatments[-1] == RESIZED


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (["L", "F"], lambda a: a),
        (["R", "F"], np.fliplr),
        (["L", "H"], np.flipud),
        (["R", "H"], lambda a: np.rot90(a, 2)),
        (["F", "L"], lambda a: a.T),
        (["H", "R"], lambda a: np.rot90(a, 2).T),
        (["A", "H"], np.flipud),
        (["P", "F"], lambda a: a),
        (["LA", "FP"], lambda a: a),
        (["L", "P"], lambda a: a),
        ([], lambda a: a),
    ],
)
def test_a_film_is_turned_as_its_header_says(
    tmp_path: Path, orientation: list[str], turned: Callable[[np.ndarray], np.ndarray]
) -> None:
    tags = {"PatientOrientation": orientation or None}
    picture = read_image(write_dicom(tmp_path / "a.dcm", RAMP, **tags), ImageForm(1, SIZE))
    np.testing.assert_allclose(picture.pixels[0], turned(RAMP) / 255, atol=1e-6)
    assert (TURNED in picture.treatments) == (not np.array_equal(turned(RAMP), RAMP))
