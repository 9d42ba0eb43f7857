"""Image files: every DICOM and picture variant is compared with numbers worked out by hand, or refused."""

from __future__ import annotations

import io
import logging
import os
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLSLossless,
)

from mpc_fl.errors import DataError
from mpc_fl.learning.data import dicom_files
from mpc_fl.learning.data.dicom_files import PALETTE, patient_identifier
from mpc_fl.learning.data.file_kinds import UnreadableImageError
from mpc_fl.learning.data.image_files import STRETCHED, ImageForm, WrongSizeError, read_image, what_is_left_aside
from tests.learning.data.dicom_writing import lookup_table, write_dicom

SIZE = 8
SECRETS = ("Mustermann", "GEHEIM-4711", "19610412", "Klinik am See")
RAMP = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)


def _read(path: Path, channels: int = 1) -> np.ndarray:
    image = read_image(path, ImageForm(channels, SIZE)).pixels
    assert image.shape == (channels, SIZE, SIZE) and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1
    return image[0].numpy() if channels == 1 else image.numpy()


def _refused(path: Path) -> str:
    with pytest.raises(UnreadableImageError) as caught:
        read_image(path, ImageForm(1, SIZE))
    message = str(caught.value)
    assert path.name in message and "\n" not in message
    assert not any(secret in message for secret in SECRETS)
    assert isinstance(caught.value, DataError)
    return message


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_dicom_without_window_spans_the_stored_range(tmp_path: Path, bits: int, syntax: Any) -> None:
    top = 2**bits - 1
    pixels = np.rint(np.linspace(0, top, 64)).reshape(8, 8).astype(np.uint8 if bits == 8 else np.uint16)
    np.testing.assert_allclose(
        _read(write_dicom(tmp_path / "a.dcm", pixels, bits=bits, syntax=syntax)), pixels / top, 1e-6
    )


def test_dicom_signed_pixels(tmp_path: Path) -> None:
    pixels = np.linspace(-2048, 2047, 64).round().astype(np.int16).reshape(8, 8)
    shown = _read(write_dicom(tmp_path / "a.dcm", pixels, bits=12))
    np.testing.assert_allclose(shown, (pixels + 2048.0) / 4095, atol=1e-6)


def test_dicom_unused_high_bits_are_ignored(tmp_path: Path) -> None:
    pixels = RAMP.astype(np.uint16) * 60
    overlay = pixels | 0xA000
    np.testing.assert_allclose(_read(write_dicom(tmp_path / "a.dcm", overlay, bits=12)), pixels / 4095, atol=1e-6)


def test_dicom_high_bit_elsewhere_is_refused(tmp_path: Path) -> None:
    assert "high bit" in _refused(write_dicom(tmp_path / "a.dcm", (RAMP * 16).astype(np.uint16), bits=12, HighBit=15))


def test_dicom_monochrome1_is_inverted_once(tmp_path: Path) -> None:
    pixels = RAMP.astype(np.uint8)
    path = write_dicom(
        tmp_path / "a.dcm", pixels, PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE"
    )
    np.testing.assert_allclose(_read(path), 1 - pixels / 255, atol=1e-6)


@pytest.mark.parametrize(("slope", "intercept"), [(2.0, -1024.0), (0.25, 3.5), (-1.0, 4095.0)])
def test_dicom_rescale_alone(tmp_path: Path, slope: float, intercept: float) -> None:
    pixels = (RAMP * 60).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", pixels, bits=12, RescaleSlope=slope, RescaleIntercept=intercept)
    expected = pixels / 4095 if slope > 0 else 1 - pixels / 4095
    np.testing.assert_allclose(_read(path), expected, atol=1e-6)


def test_dicom_rescale_slope_without_intercept(tmp_path: Path) -> None:
    pixels = RAMP.astype(np.uint8)
    np.testing.assert_allclose(_read(write_dicom(tmp_path / "a.dcm", pixels, RescaleSlope=3)), pixels / 255, atol=1e-6)


def _linear(x: np.ndarray, centre: float, width: float) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1, case by case."""
    inside = (x - (centre - 0.5)) / (width - 1) + 0.5
    lower, upper = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    return np.where(x <= lower, 0.0, np.where(x > upper, 1.0, inside))


@pytest.mark.parametrize("centre", [30, [30, 5]])
def test_dicom_linear_window(tmp_path: Path, centre: Any) -> None:
    width = 21 if isinstance(centre, int) else [21, 3]
    path = write_dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), WindowCenter=centre, WindowWidth=width)
    np.testing.assert_allclose(_read(path), _linear(RAMP, 30, 21), atol=1e-6)


@pytest.mark.parametrize("slope", [2.0, -2.0])
def test_dicom_window_applies_to_rescaled_values(tmp_path: Path, slope: float) -> None:
    path = write_dicom(
        tmp_path / "a.dcm",
        (RAMP * 10).astype(np.uint16),
        bits=12,
        RescaleSlope=slope,
        RescaleIntercept=-100,
        WindowCenter=slope * 300,
        WindowWidth=401,
    )
    # also for a negative slope great values are bright, which pydicom's apply_windowing turns round
    np.testing.assert_allclose(_read(path), _linear(RAMP * 10 * slope - 100, slope * 300, 401), atol=1e-6)


def test_dicom_window_of_monochrome1_and_signed_pixels(tmp_path: Path) -> None:
    pixels = (RAMP - 32).astype(np.int16)
    path = write_dicom(
        tmp_path / "a.dcm",
        pixels,
        bits=12,
        PhotometricInterpretation="MONOCHROME1",
        WindowCenter=-5,
        WindowWidth=31,
    )
    np.testing.assert_allclose(_read(path), 1 - _linear(pixels, -5, 31), atol=1e-6)


def test_dicom_window_functions(tmp_path: Path) -> None:
    pixels = RAMP.astype(np.uint8)

    def shown(function: str, width: float) -> np.ndarray:
        tags = {"WindowCenter": 30, "WindowWidth": width, "VOILUTFunction": function}
        return _read(write_dicom(tmp_path / "a.dcm", pixels, **tags))

    np.testing.assert_allclose(shown("SIGMOID", 20), 1 / (1 + np.exp(-4 * (RAMP - 30) / 20)), atol=1e-6)
    np.testing.assert_allclose(shown("LINEAR_EXACT", 20), np.clip((RAMP - 30) / 20 + 0.5, 0, 1), atol=1e-6)
    np.testing.assert_allclose(shown("LINEAR_EXACT", 0.5), np.clip((RAMP - 30) / 0.5 + 0.5, 0, 1), atol=1e-6)
    np.testing.assert_array_equal(shown("LINEAR", 1), RAMP > 29.5)
    np.testing.assert_array_equal(shown("SIGMOID", 1e-9)[RAMP != 30], (RAMP > 30)[RAMP != 30])


@pytest.mark.parametrize("tags", [{"WindowCenter": 30}, {"WindowCenter": 30, "WindowWidth": ""}, {"WindowWidth": 5}])
def test_dicom_half_a_window_is_none(tmp_path: Path, tags: dict[str, Any]) -> None:
    pixels = RAMP.astype(np.uint8)
    np.testing.assert_allclose(_read(write_dicom(tmp_path / "a.dcm", pixels, **tags)), pixels / 255, atol=1e-6)


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 30, "WindowWidth": 0},
        {"WindowCenter": 30, "WindowWidth": -5, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 30, "WindowWidth": 20, "VOILUTFunction": "CUBIC"},
        {"RescaleSlope": 0, "RescaleIntercept": 5},
        {"Rows": 0},
        {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PixelData": bytes(192)},
        {"PhotometricInterpretation": "HSV"},
        {"NumberOfFrames": 2, "PixelData": bytes(128)},
        {"PixelData": bytes(50)},
        {"PixelData": None},
        {"BitsStored": None},
        {"Rows": 60000, "Columns": 60000},
        {"ModalityLUTSequence": pydicom.Sequence([Dataset()])},
        {"ModalityLUTSequence": lookup_table([1, 2, 3], 0, 16, count=99)},
        {"VOILUTSequence": lookup_table(bytes(6), 0, 16, count=99)},
        {"VOILUTSequence": lookup_table([1, 2, 3], 0, 32)},
    ],
    ids=lambda tags: "-".join(tags),
)
def test_dicom_that_cannot_be_shown_is_unreadable(tmp_path: Path, tags: dict[str, Any]) -> None:
    _refused(write_dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), **tags))


@pytest.mark.parametrize("tag", ["RescaleSlope", "RescaleIntercept", "WindowCenter"])
def test_dicom_with_numbers_that_are_not_finite(tmp_path: Path, tag: str) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), WindowWidth=20, **{"WindowCenter": 30, tag: "7777"})
    content = path.read_bytes()
    assert content.count(b"7777") == 1
    path.write_bytes(content.replace(b"7777", b"nan "))
    _refused(path)


def test_dicom_modality_table(tmp_path: Path) -> None:
    table = [16 * k * k for k in range(64)]
    path = write_dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), ModalityLUTSequence=lookup_table(table, 0, 16))
    np.testing.assert_allclose(_read(path), 16 * RAMP**2 / 65535, atol=1e-6)
    table = [k * k for k in range(64)]
    windowed = {"WindowCenter": 2000, "WindowWidth": 2001}
    path = write_dicom(
        tmp_path / "a.dcm", RAMP.astype(np.uint8), ModalityLUTSequence=lookup_table(table, 0, 16), **windowed
    )
    np.testing.assert_allclose(_read(path), _linear(RAMP**2, 2000, 2001), atol=1e-6)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_dicom_value_of_interest_table(tmp_path: Path, syntax: Any) -> None:
    entries = np.arange(20) * 200
    order = ">u2" if syntax == ExplicitVRBigEndian else "<u2"
    sequence = lookup_table(entries.astype(order).tobytes(), 10, 12, count=20)
    # the table counts, not the window; values outside take the first or last entry; 12 bits make 4095 white
    path = write_dicom(
        tmp_path / "a.dcm", RAMP.astype(np.uint8), syntax=syntax, VOILUTSequence=sequence, WindowCenter=1, WindowWidth=2
    )
    np.testing.assert_allclose(_read(path), entries[np.clip(RAMP - 10, 0, 19)] / 4095, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_dicom_table_of_8_bits_with_many_entries(tmp_path: Path, packed: bool) -> None:
    # pydicom's apply_voi takes the position in such a table modulo 256
    entries = (np.arange(4096) // 16).astype(np.uint8)
    data = entries.tobytes() if packed else entries.astype("<u2").tobytes()
    pixels = (RAMP * 65).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", pixels, bits=12, VOILUTSequence=lookup_table(data, 0, 8, count=4096))
    np.testing.assert_allclose(_read(path), (pixels // 16) / 255, atol=1e-6)


def test_dicom_table_that_begins_below_zero(tmp_path: Path) -> None:
    # numpy refuses to subtract a negative first value from unsigned pixels, so pydicom's functions fail here
    sequence = lookup_table([k * 800 for k in range(80)], -8, 16)
    path = write_dicom(tmp_path / "a.dcm", RAMP.astype(np.uint16), bits=16, ModalityLUTSequence=sequence)
    np.testing.assert_allclose(_read(path), (RAMP + 8) * 800 / 65535, atol=1e-6)


def _colours(dtype: Any = np.uint8, top: int = 255) -> np.ndarray:
    return np.random.default_rng(0).integers(0, top + 1, (SIZE, SIZE, 3)).astype(dtype)


@pytest.mark.parametrize(("dtype", "bits"), [(np.uint8, 8), (np.uint16, 12)])
def test_dicom_rgb_in_both_planar_configurations(tmp_path: Path, dtype: Any, bits: int) -> None:
    pixels = _colours(dtype, 2**bits - 1)
    expected = pixels.transpose(2, 0, 1) / (2**bits - 1)
    np.testing.assert_allclose(_read(write_dicom(tmp_path / "a.dcm", pixels, bits=bits), 3), expected, atol=1e-6)
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)).tobytes()
    path = write_dicom(tmp_path / "b.dcm", pixels, bits=bits, PlanarConfiguration=1, PixelData=planes)
    np.testing.assert_allclose(_read(path, 3), expected, atol=1e-6)
    np.testing.assert_allclose(_read(path, 1), expected.mean(0), atol=1e-6)


def test_dicom_ybr_becomes_rgb(tmp_path: Path) -> None:
    rgb = _colours()
    matrix = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    ybr = np.clip(np.rint(rgb @ matrix.T + [0, 128, 128]), 0, 255).astype(np.uint8)
    path = write_dicom(tmp_path / "a.dcm", ybr, PhotometricInterpretation="YBR_FULL")
    np.testing.assert_allclose(_read(path, 3), rgb.transpose(2, 0, 1) / 255, atol=0.015)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize(("bits", "allocated"), [(8, 8), (8, 16), (16, 16)])
def test_dicom_palette(tmp_path: Path, bits: int, allocated: int, syntax: Any) -> None:
    """Entries of 8 bits lie two in a word, or, against PS3.3 and as its note there says, one in each."""
    scale, tags = (2**bits - 1) / 255, {"PhotometricInterpretation": "PALETTE COLOR"}
    tables = {name: np.rint(np.arange(64) * step * scale) for name, step in (("Red", 1), ("Green", 2), ("Blue", 4))}
    for name, entries in tables.items():
        entries += bits // 16 * 3  # two bytes that differ
        words = entries.astype("<u1").view("<u2") if allocated == 8 else entries.astype("<u2")
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [64, 0, bits]
        tags[f"{name}PaletteColorLookupTableData"] = words.astype("<u2" if syntax.is_little_endian else ">u2").tobytes()
    path = write_dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), syntax=syntax, **tags)
    np.testing.assert_allclose(_read(path, 3), np.stack([RAMP, RAMP * 2, RAMP * 4]) / 255, atol=1e-4)
    assert PALETTE in read_image(path, ImageForm(3, SIZE)).treatments


def test_dicom_palette_without_tables_is_refused(tmp_path: Path) -> None:
    _refused(write_dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), PhotometricInterpretation="PALETTE COLOR"))


def test_dicom_compressed(tmp_path: Path) -> None:
    smooth = (RAMP * 4).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, "JPEG", quality=95)
    data = encapsulate([buffer.getvalue()])
    path = write_dicom(tmp_path / "a.dcm", smooth, syntax=JPEGBaseline8Bit, PixelData=data)
    np.testing.assert_allclose(_read(path), smooth / 255, atol=0.03)
    cut = encapsulate([buffer.getvalue()[:200]])
    _refused(write_dicom(tmp_path / "cut.dcm", smooth, syntax=JPEGBaseline8Bit, PixelData=cut))
    _refused(write_dicom(tmp_path / "none.dcm", smooth, syntax=JPEGLSLossless, PixelData=data))


def test_dicom_deflated_is_read_like_its_twin(tmp_path: Path) -> None:
    pixels = RAMP.astype(np.uint8)
    twin = write_dicom(tmp_path / "twin.dcm", pixels)
    path = write_dicom(tmp_path / "a.dcm", pixels, syntax=DeflatedExplicitVRLittleEndian)
    np.testing.assert_array_equal(_read(path), _read(twin))
    assert patient_identifier(path) == patient_identifier(twin) is not None
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) - 9):
        path.write_bytes(whole[:length])
        assert "deflated and damaged or cut off" in _refused(path) and patient_identifier(path) is None


def test_dicom_deflated_is_never_inflated_beyond_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 MB in the stream, a thousandth of it on the disk."""
    path = write_dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), syntax=DeflatedExplicitVRLittleEndian)
    head = path.read_bytes()[: 132 + 12 + pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength]
    deflating, zeros = zlib.compressobj(wbits=-zlib.MAX_WBITS), bytes(4_000_000)
    stream = b"".join(deflating.compress(zeros) for _ in range(20)) + deflating.flush()
    path.write_bytes(head + stream)
    assert len(stream) < 100_000
    monkeypatch.setattr(dicom_files, "LARGEST_INFLATED", 8_000_000)
    tracemalloc.start()
    try:
        assert "deflated and holds more than 8 MB: inflate it" in _refused(path)
        assert tracemalloc.get_traced_memory()[1] < 24_000_000
    finally:
        tracemalloc.stop()


def test_dicom_cut_off_anywhere_is_unreadable(tmp_path: Path) -> None:
    content = write_dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8)).read_bytes()
    cut = tmp_path / "cut.dcm"
    for length in [*range(0, len(content) - 1, 7), len(content) - 1]:
        cut.write_bytes(content[:length])
        _refused(cut)


def test_text_with_a_dicom_suffix_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    path.write_text("Mustermann " * 50)
    _refused(path)


def test_no_tag_value_is_loaded_logged_or_warned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write_dicom(tmp_path / "good.dcm", RAMP.astype(np.uint8))
    bad = write_dicom(tmp_path / "bad.dcm", RAMP.astype(np.uint8), PixelData=bytes(50))
    # values that pydicom complains about and quotes; an unknown character set is looked at in any case
    for path in (good, bad):
        content = path.read_bytes().replace(b"19610412", b"Musterma")
        path.write_bytes(content)
    charset = write_dicom(tmp_path / "charset.dcm", RAMP.astype(np.uint8), SpecificCharacterSet="ISO_IR 100")
    charset.write_bytes(charset.read_bytes().replace(b"ISO_IR 100", b"Mustermann"))
    loaded: list[Dataset] = []
    original = pydicom.dcmread

    def spy(*arguments: Any, **options: Any) -> Dataset:
        loaded.append(original(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr(pydicom, "dcmread", spy)
    with caplog.at_level(logging.DEBUG):
        for name in ("pydicom", "PIL"):
            monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
        _read(good)
        _read(charset)
        _refused(bad)
    said = caplog.text + " ".join(str(item.message) for item in recwarn)
    assert not any(secret in said for secret in (*SECRETS, "Musterma")), said
    assert len(loaded) == 3
    assert not any(name in dataset for dataset in loaded for name in ("PatientName", "PatientID", "InstitutionName"))


def _png(path: Path, pixels: np.ndarray, mode: str | None = None, **options: Any) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def test_png_8_and_16_bits(tmp_path: Path) -> None:
    eight, sixteen = (RAMP * 4).astype(np.uint8), (RAMP * 1000).astype(np.uint16)
    np.testing.assert_allclose(_read(_png(tmp_path / "a.png", eight)), eight / 255, atol=1e-6)
    np.testing.assert_allclose(_read(_png(tmp_path / "b.PNG", sixteen)), sixteen / 65535, atol=1e-6)
    np.testing.assert_allclose(_read(_png(tmp_path / "a.png", eight), 3), np.stack([eight / 255] * 3), atol=1e-6)
    np.testing.assert_array_equal(_read(_png(tmp_path / "c.png", RAMP > 20)), RAMP > 20)


@pytest.mark.parametrize("mode", ["P", "LA", "RGB", "RGBA"])
def test_png_palette_and_alpha(tmp_path: Path, mode: str) -> None:
    pixels = (RAMP * 4).astype(np.uint8)
    np.testing.assert_allclose(_read(_png(tmp_path / "a.png", pixels, mode)), pixels / 255, atol=1e-6)


def test_png_colours_palette_and_transparency(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    colours = _colours() // 64 * 64
    image = Image.fromarray(colours)
    alpha = image.copy()
    alpha.putalpha(Image.fromarray((RAMP * 4).astype(np.uint8)))
    alpha.save(tmp_path / "alpha.png")
    palette = image.quantize(256)
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 128] * 32))
    expected = colours.transpose(2, 0, 1) / 255
    np.testing.assert_allclose(_read(tmp_path / "alpha.png", 3), expected, atol=1e-6)
    np.testing.assert_allclose(_read(tmp_path / "palette.png", 3), expected, atol=1e-6)
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg(tmp_path: Path, mode: str) -> None:
    pixels = (RAMP * 4).astype(np.uint8)
    path = _png(tmp_path / "a.jpeg", pixels, mode, quality=95)
    np.testing.assert_allclose(_read(path), pixels / 255, atol=0.03)


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [(2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_exif_orientation(tmp_path: Path, orientation: int, turned: Callable[..., np.ndarray], dtype: Any) -> None:
    pixels, exif = (RAMP * (4 if dtype == np.uint8 else 1024)).astype(dtype), Image.Exif()
    exif[0x0112] = orientation
    path = _png(tmp_path / "a.png", pixels, exif=exif)
    np.testing.assert_allclose(_read(path), turned(pixels) / np.iinfo(dtype).max, atol=1e-6)


@pytest.mark.parametrize(("width", "height"), [(9000, 8000), (20000, 20000), (60000, 60000)])
def test_decompression_bomb_is_refused(tmp_path: Path, width: int, height: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    assert "too many pixels" in _refused(path) or width > 9000


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    whole = _png(tmp_path / "a.png", (RAMP * 4).astype(np.uint8)).read_bytes()
    gif = io.BytesIO()
    Image.fromarray(RAMP.astype(np.uint8)).save(gif, "GIF")
    path = tmp_path / "bad.png"
    for content in (b"", b"no picture", whole[:-30], whole[:40], gif.getvalue()):
        path.write_bytes(content)
        _refused(path)
    _refused(tmp_path / "absent.png")
    (tmp_path / "folder.png").mkdir()
    _refused(tmp_path / "folder.png")


def test_damaged_files_are_read_or_unreadable_never_anything_else(tmp_path: Path) -> None:
    """Found pydicom's BytesLengthException, struct.error and OverflowError, none of which is a ValueError."""
    draw = random.Random(0)
    tags = {"WindowCenter": 9, "WindowWidth": 5, "ModalityLUTSequence": lookup_table([1, 2, 3], 0, 16)}
    seeds = [
        write_dicom(tmp_path / "grey.dcm", RAMP.astype(np.uint8), **tags),
        write_dicom(tmp_path / "colour.dcm", _colours(), syntax=ImplicitVRLittleEndian),
        _png(tmp_path / "a.png", RAMP.astype(np.uint8)),
        _png(tmp_path / "a.jpg", RAMP.astype(np.uint8), quality=90),
    ]
    outcomes = set()
    for turn in range(1200):
        source = seeds[turn % len(seeds)]
        content = bytearray(source.read_bytes())
        for _ in range(draw.choice((1, 2, 8))):
            content[draw.randrange(len(content))] = draw.randrange(256)
        damaged = tmp_path / f"damaged{source.suffix}"
        damaged.write_bytes(content)
        try:
            image = read_image(damaged, ImageForm(1, SIZE, "resize", frame="first")).pixels
            assert image.isfinite().all() and image.min() >= 0 and image.max() <= 1
            outcomes.add("read")
        except UnreadableImageError:
            outcomes.add("unreadable")
    assert outcomes == {"read", "unreadable"}


def test_group_length_that_is_damaged_is_unreadable(tmp_path: Path) -> None:
    """Length of the first element of the file meta information: pydicom raises an error that quotes the bytes."""
    path = write_dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8))
    content = bytearray(path.read_bytes())
    content[138:140] = struct.pack("<H", 299)
    path.write_bytes(content)
    _refused(path)


def test_size(tmp_path: Path) -> None:
    path = _png(tmp_path / "a.png", np.tile(np.repeat([0, 255], 8), (20, 1)).astype(np.uint8))
    with pytest.raises(WrongSizeError, match="a.png is 16x20, expected 8x8: set data.wrong_size"):
        read_image(path, ImageForm(1, SIZE))
    resized = read_image(path, ImageForm(1, SIZE, "resize", "stretch"))
    assert resized.treatments[-1] == STRETCHED
    assert resized.pixels.shape == (1, 8, 8) and resized.pixels[0, 3, 0] == 0 and resized.pixels[0, 3, 7] == 1
    assert not issubclass(WrongSizeError, UnreadableImageError)


def test_which_files_of_a_folder_are_images(tmp_path: Path) -> None:
    names = ["IM0001", "1.2.840.10008.77", "a.DCM", "b.JPG", "c.png", "DICOMDIR", ".d.png", "._e.dcm", "g.txt"]
    for name in names:
        write_dicom(tmp_path / name, RAMP.astype(np.uint8))
    for name in ("README", "notes.1", "short"):
        (tmp_path / name).write_text("x" * (5 if name == "short" else 500))
    (tmp_path / "folder.png").mkdir()
    found = {path.name: what_is_left_aside(path) for path in tmp_path.iterdir()}
    images = {name for name, what in found.items() if what is None}
    # What is inside counts, where a suffix does not announce an image: g.txt is DICOM.
    assert images == {"IM0001", "1.2.840.10008.77", "a.DCM", "b.JPG", "c.png", "g.txt"}
    aside = {name: what for name, what in found.items() if what is not None}
    assert aside == {
        "DICOMDIR": "index or cache of a program", ".d.png": "hidden", "._e.dcm": "hidden", "folder.png": "folder",
        "README": "no image", "notes.1": "no image", "short": "no image",
    }  # fmt: skip
    np.testing.assert_allclose(_read(tmp_path / "IM0001"), RAMP / 255, atol=1e-6)
    np.testing.assert_allclose(_read(tmp_path / "1.2.840.10008.77"), RAMP / 255, atol=1e-6)


def test_a_link_to_what_is_not_there_is_not_overlooked(tmp_path: Path) -> None:
    for name in ("a.png", "IM0001", ".hidden"):
        (tmp_path / name).symlink_to(tmp_path / "gone" / name)  # a share that is not there now
    assert [what_is_left_aside(tmp_path / name) for name in ("a.png", "IM0001", ".hidden")] == [None, None, "hidden"]
    assert "a link to what is not there: bring that back" in _refused(tmp_path / "a.png")


def test_a_file_that_was_removed_meanwhile_is_called_no_link(tmp_path: Path) -> None:
    assert "it is not there any more: run again" in _refused(tmp_path / "a.png")


def test_what_is_no_file_is_not_called_a_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert what_is_left_aside(tmp_path / "a.png") == "no file"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_film_cut_off_before_its_pixels_is_no_report(tmp_path: Path, share: float) -> None:
    whole = write_dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8)).read_bytes()
    pixels = whole.index(b"\xe0\x7f\x10\x00")  # the tag of PixelData
    (tmp_path / "a.dcm").write_bytes(whole[: 132 + int(share * (pixels - 132))])
    message = _refused(tmp_path / "a.dcm")
    assert "export it again" in message or "damaged" in message


def test_a_picture_without_pixels_is_to_be_exported_again(tmp_path: Path) -> None:
    message = _refused(write_dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), PixelData=None))
    assert "cut off before its pixels: export it again" in message


def test_a_file_without_access_is_not_overlooked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "IM0001"
    path.write_bytes(b"")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert what_is_left_aside(path) is None
    assert "Permission denied" in _refused(path)
