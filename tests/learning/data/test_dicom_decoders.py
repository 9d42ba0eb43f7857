"""Compressed DICOM: every file of pydicom's own is read or refused with advice, and equals its uncompressed twin."""

from __future__ import annotations

import base64
import importlib.util
import random
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pydicom
import pytest
from hypothesis import given
from pydicom.data import get_testdata_file
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    HTJ2K,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from mpc_fl.learning.data import dicom_decoders
from mpc_fl.learning.data.dicom_decoders import decoded
from mpc_fl.learning.data.dicom_files import FIRST_FRAME, MIDDLE_FRAME
from mpc_fl.learning.data.file_kinds import UnreadableImageError
from mpc_fl.learning.data.image_files import ImageForm, read_image, what_is_left_aside
from tests.learning.data.dicom_writing import write_dicom

FILES = Path(pydicom.__file__).parent / "data" / "test_files"  # those in the wheel; nothing is downloaded
PIXELS = sorted(path for path in FILES.glob("*.dcm"))
# Hold one frame of pixels, and these are damaged: cut off, a number of frames that is no number, a codestream that is none.
DAMAGED = {
    "MR_truncated.dcm": "its pixels are damaged or cut off",
    "badVR.dcm": "its header is damaged",
    "JPEG2000-embedded-sequence-delimiter.dcm": "another size than its header says",
}


def _file(name: str) -> Path:
    path = get_testdata_file(name, download=False)
    assert path is not None
    return Path(str(path))


def _decoded(path: Path) -> np.ndarray:
    return decoded(pydicom.dcmread(path), path, 0, 1)


@pytest.mark.parametrize("path", PIXELS, ids=lambda path: path.name)
def test_every_file_of_pydicom_is_read_or_refused_with_advice(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        image = read_image(path, ImageForm(3, 32, "resize")).pixels
        assert image.shape == (3, 32, 32) and image.isfinite().all() and path.name not in DAMAGED
    except UnreadableImageError as error:
        assert error.fix and "Error)" not in str(error) and "\n" not in str(error)
        try:
            header = pydicom.dcmread(path, force=True)
            frames = header.get("NumberOfFrames") or 1
        except Exception:
            frames = 0
        if "PixelData" in header and "Rows" in header and path.name not in DAMAGED:
            assert int(frames) > 1 and "set data.frame" in error.fix
        assert DAMAGED.get(path.name, "") in str(error)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "name",
    ["RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded"],
)
def test_a_compressed_file_equals_its_uncompressed_twin(name: str) -> None:
    twin, path = _file("MR_small.dcm"), _file(f"MR_small_{name}.dcm")
    np.testing.assert_array_equal(_decoded(path), _decoded(twin))
    form = ImageForm(1, 64)
    assert read_image(path, form).pixels.equal(read_image(twin, form).pixels)


@pytest.mark.parametrize("name", ["SC_rgb_jpeg_gdcm.dcm", "SC_rgb_gdcm_KY.dcm"])
def test_lossless_jpeg_in_colour_equals_its_twin(name: str) -> None:
    np.testing.assert_allclose(_decoded(_file(name)), _decoded(_file("SC_rgb_rle.dcm")), atol=1)


@pytest.mark.parametrize("name", ["JPEG-lossy.dcm", "JPGExtended.dcm"])
def test_jpeg_of_12_bits(name: str) -> None:
    # The values that pydicom's own tests have for other decoders.
    pixels = _decoded(_file(name))
    assert pixels.shape == (1024, 256) and (pixels[420, 140], pixels[230, 120]) == (244, 95)


def test_near_lossless_jpeg_ls_is_near() -> None:
    pixels = _decoded(_file("JPEGLSNearLossless_08.dcm"))
    assert pixels.shape == (45, 10) and (pixels[0] == 255).all()  # as in pydicom's own tests
    assert _decoded(_file("JPEGLSNearLossless_16.dcm"))[:5].max() == 65535


def _uncompressed(path: Path, pixels: np.ndarray, bits: int) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, b"\0" * 128, meta)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * pixels.dtype.itemsize, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


@given(data=st.data())
def test_what_is_compressed_without_loss_comes_back(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bits = data.draw(st.sampled_from([8, 10, 12, 16]))
    signed = data.draw(st.booleans())
    kind: Any = {(8, False): np.uint8, (8, True): np.int8, (16, False): np.uint16, (16, True): np.int16}[
        (8 if bits == 8 else 16, signed)
    ]
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    size = data.draw(st.tuples(st.integers(64, 80), st.integers(64, 80)))
    seed = data.draw(st.integers(0, 2**32 - 1))
    pixels = np.random.default_rng(seed).integers(low, high, size, endpoint=True).astype(kind)
    syntax = data.draw(st.sampled_from([RLELossless, JPEG2000Lossless, JPEGLSLossless]))
    path = tmp_path_factory.mktemp("dicom") / "a.dcm"
    dataset = _uncompressed(path, pixels, bits)
    dataset.compress(syntax)
    dataset.save_as(path, enforce_file_format=True)
    np.testing.assert_array_equal(_decoded(path), pixels)


# (37 row + 11 column**2) of 12 rows and 10 columns, by imagecodecs 2026.3.6 (OpenJPH 0.26.3): no decoder that is used here made it.
HIGH_THROUGHPUT = base64.b64decode(
    "/0//UQApQAAAAAAKAAAADAAAAAAAAAAAAAAACgAAAAwAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wAEyCIkJCQkJCQkJCQkJCQiIiI/2QAFwAB"
    "T3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAI0AAf+TwAAm4/wFB3QAAMAAE0AAEwDI/QKHdAB4/gIHdADAABNAABKAjx8Bi3QAc/4yMwDAABVwAAVI1+vhcHX4A5iC"
    "tQCkpKTAIQH+tgDAAC6KAAFYVWtVVdHRVa1VUVFRQUdXtVZFRUUFHd0D/gt/4LjB+jG7AEgEQZD0BEYQgey4AP/Z"
)


@pytest.mark.parametrize("syntax", [HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K])
def test_high_throughput_jpeg_2000_equals_its_twin(syntax: Any, tmp_path: Path) -> None:
    rows, columns = np.indices((12, 10))
    pixels = (37 * rows + 11 * columns**2).astype(np.uint16)
    data = encapsulate([HIGH_THROUGHPUT])
    path = write_dicom(tmp_path / "a.dcm", pixels, syntax=syntax, bits=16, PixelData=data)
    np.testing.assert_array_equal(_decoded(path), pixels)
    twin, form = write_dicom(tmp_path / "twin.dcm", pixels, bits=16), ImageForm(1, 16, "resize")
    assert read_image(path, form).pixels.equal(read_image(twin, form).pixels)
    cut = encapsulate([HIGH_THROUGHPUT[:40]])
    with pytest.raises(UnreadableImageError, match="High-Throughput JPEG 2000.*damaged|another size"):
        read_image(write_dicom(tmp_path / "cut.dcm", pixels, syntax=syntax, bits=16, PixelData=cut), form)


def test_a_decoder_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(dicom_decoders.importlib.util, "find_spec", lambda name: None if name == "gdcm" else find(name))
    with pytest.raises(UnreadableImageError) as caught:
        read_image(_file("SC_rgb_jpeg_gdcm.dcm"), ImageForm(3, 32, "resize"))
    assert "JPEG Lossless" in str(caught.value) and "1.2.840.10008.1.2.4.70" in str(caught.value)
    assert caught.value.fix == "pip install python-gdcm"


def test_a_transfer_syntax_without_a_decoder_is_named(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(_file("SC_rgb_jpeg_gdcm.dcm"))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.MPEG4HP41
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(UnreadableImageError, match="MPEG-4 AVC/H.264 High.*1.2.840.10008.1.2.4.102.*convert it"):
        read_image(tmp_path / "a.dcm", ImageForm(3, 32, "resize"))


def test_a_codestream_larger_than_its_header_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(_file("MR_small_jp2klossless.dcm"))
    place = dataset.PixelData.find(b"\xff\x4f\xff\x51") + 8
    dataset.PixelData = dataset.PixelData[:place] + b"\x7f\xff\xff\xff" + dataset.PixelData[place + 4 :]
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(UnreadableImageError, match="another size than its header says"):
        read_image(tmp_path / "a.dcm", ImageForm(1, 64))


def test_a_file_that_aborts_its_decoder_is_unreadable_and_the_next_one_is_read(tmp_path: Path) -> None:
    """Another number in the Adobe segment ends GDCM with an exception in C++."""
    path, form = _file("SC_rgb_jpeg_gdcm.dcm"), ImageForm(3, 32, "resize")
    content = bytearray(path.read_bytes())
    content[content.find(b"Adobe") + 11] = 237
    (tmp_path / "a.dcm").write_bytes(content)
    before = read_image(path, form).pixels
    with pytest.raises(UnreadableImageError, match="JPEG Lossless.* are damaged or cut off: export it again"):
        read_image(tmp_path / "a.dcm", form)
    assert read_image(path, form).pixels.equal(before)


COMPRESSED = ["MR_small_jp2klossless", "MR_small_jpeg_ls_lossless", "MR_small_RLE", "JPGExtended", "SC_rgb_jpeg_dcmtk"]


@pytest.mark.parametrize("name", COMPRESSED)
def test_damaged_compressed_files_are_read_or_unreadable(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    draw, whole = random.Random(name), _file(f"{name}.dcm").read_bytes()
    outcomes = set()
    for _ in range(40):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 2, 8))):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (tmp_path / "a.dcm").write_bytes(content)
        try:
            image = read_image(tmp_path / "a.dcm", ImageForm(1, 32, "resize", frame="first")).pixels
            assert image.isfinite().all() and image.min() >= 0 and image.max() <= 1
            outcomes.add("read")
        except UnreadableImageError:
            outcomes.add("unreadable")
    assert outcomes == {"read", "unreadable"} and capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["SC_rgb_rle_2frame.dcm", "examples_ybr_color.dcm", "rtdose.dcm"])
def test_one_of_several_frames(name: str) -> None:
    path, form = _file(name), ImageForm(3, 32, "resize")
    count = int(pydicom.dcmread(path, stop_before_pixels=True).NumberOfFrames)
    with pytest.raises(UnreadableImageError, match=f"it has {count} frames: set data.frame"):
        read_image(path, form)
    first = read_image(path, ImageForm(3, 32, "resize", frame="first"))
    middle = read_image(path, ImageForm(3, 32, "resize", frame="middle"))
    assert FIRST_FRAME in first.treatments and MIDDLE_FRAME in middle.treatments
    assert not first.pixels.equal(middle.pixels)


@pytest.mark.parametrize("suffix", ["", ".dcm", ".ima", ".123"])
def test_a_file_without_the_mark_is_read_whatever_its_name(tmp_path: Path, suffix: str) -> None:
    whole = _file("MR_small_implicit.dcm").read_bytes()
    dataset = pydicom.dcmread(_file("MR_small_implicit.dcm"))
    size = 132 + 12 + dataset.file_meta.FileMetaInformationGroupLength  # preamble, mark, and the group 0002
    path = tmp_path / f"IM0001{suffix}"
    path.write_bytes(whole[size:])
    assert what_is_left_aside(path) is None
    assert read_image(path, ImageForm(1, 64)).pixels.equal(read_image(_file("MR_small.dcm"), ImageForm(1, 64)).pixels)
