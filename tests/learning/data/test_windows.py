"""Brightness: the same picture, however it is written, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from PIL import Image

from mpc_fl.config.config import parse_config
from mpc_fl.learning.data.dicom_files import INVERTED, TURNED
from mpc_fl.learning.data.image_files import ImageForm, Picture, read_image
from mpc_fl.learning.data.phantoms import make_phantoms
from mpc_fl.learning.data.windows import PERCENTILES, STORED_BITS, TABLE, USED_BITS, WINDOW
from mpc_fl.learning.models.architectures import build_model
from tests.learning.data.dicom_writing import lookup_table, write_dicom

SIZE = 32


def _read(path: Path) -> Picture:
    return read_image(path, ImageForm(1, SIZE))


def _five_ways(folder: Path, twelve: np.ndarray) -> dict[str, Picture]:
    """A picture of 12 bits as an archive may hold it: window, none, MONOCHROME1, negative slope, PNG of 16 bits."""
    turned, none = (4095 - twelve).astype(np.uint16), twelve.astype(np.uint16)
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    files = {
        "window": write_dicom(folder / "window.dcm", none, bits=12, **window),
        "none": write_dicom(folder / "none.dcm", none, bits=12),
        "monochrome1": write_dicom(folder / "m1.dcm", turned, bits=12, PhotometricInterpretation="MONOCHROME1"),
        "slope": write_dicom(folder / "slope.dcm", turned, bits=12, RescaleSlope=-1, RescaleIntercept=4095),
        "png": folder / "a.png",
        "stored in 16": write_dicom(folder / "sixteen.dcm", none, bits=16),
    }
    Image.fromarray(none).save(files["png"])
    Image.fromarray(none).save(folder / "a.tiff")
    return {name: _read(path) for name, path in {**files, "tiff": folder / "a.tiff"}.items()}


def test_a_picture_written_five_ways_gives_one_diagnosis(tmp_path: Path) -> None:
    network = build_model(parse_config({"model": {"architecture": "small_cnn"}}, "test")).eval()
    for number, image in enumerate(make_phantoms(6, 3, SIZE, 0, "test").images[:6]):
        folder = tmp_path / str(number)
        folder.mkdir()
        ways = _five_ways(folder, np.rint(image * 4095))
        pixels = torch.stack([way.pixels for way in ways.values()])
        assert float((pixels - torch.from_numpy(image)).abs().max()) < 1e-3
        with torch.no_grad():
            logits = network(pixels)
        assert float((logits - logits[0]).abs().max()) < 0.02
        said = {name: way.treatments[0] for name, way in ways.items()}
        assert (said["window"], said["none"], said["png"]) == (WINDOW, STORED_BITS, USED_BITS)
        assert said["tiff"] == said["stored in 16"] == USED_BITS and INVERTED in ways["monochrome1"].treatments


def test_a_picture_that_takes_little_of_its_range_is_spread_and_said(tmp_path: Path) -> None:
    pixels = np.linspace(1000, 1200, SIZE * SIZE).reshape(SIZE, SIZE).round()
    for name, kind, bits in (("a", np.uint16, 12), ("b", np.int16, 16), ("c", np.uint16, 16)):
        picture = _read(write_dicom(tmp_path / f"{name}.dcm", pixels.astype(kind), bits=bits))
        assert picture.treatments == (PERCENTILES,)
        assert picture.pixels.min() == 0 and picture.pixels.max() == 1
        assert abs(float(picture.pixels.mean()) - 0.5) < 0.01
    Image.fromarray(pixels.astype(np.uint16)).save(tmp_path / "d.png")
    assert _read(tmp_path / "d.png").treatments == (PERCENTILES,)
    # eight bits were made to be shown, dark or not
    assert _read(write_dicom(tmp_path / "e.dcm", (pixels / 100).astype(np.uint8), bits=8)).treatments == (STORED_BITS,)


def test_a_picture_of_one_value_is_no_error(tmp_path: Path) -> None:
    for number, (kind, bits) in enumerate(((np.uint16, 16), (np.int16, 16), (np.uint16, 12))):
        flat = np.full((SIZE, SIZE), 700, kind)
        assert _read(write_dicom(tmp_path / f"{number}.dcm", flat, bits=bits)).pixels.unique().numel() == 1


def test_padding_is_no_part_of_the_picture(tmp_path: Path) -> None:
    pixels = np.linspace(0, 500, SIZE * SIZE).reshape(SIZE, SIZE).round().astype(np.int16)
    padded = pixels.copy()
    padded[:8] = -2000
    picture = _read(write_dicom(tmp_path / "a.dcm", padded, bits=16, PixelPaddingValue=-2000)).pixels[0]
    plain = _read(write_dicom(tmp_path / "b.dcm", pixels, bits=16)).pixels[0]
    assert (picture[:8] == 0).all() and picture[8:].min() < 0.05
    # Without the tag the padding counts, and the picture is paler.
    untold = _read(write_dicom(tmp_path / "c.dcm", padded, bits=16)).pixels[0]
    assert untold[8:].min() > 0.8 > plain[8:].min()


def test_an_outlier_does_not_darken_a_picture(tmp_path: Path) -> None:
    pixels = np.linspace(0, 500, SIZE * SIZE).reshape(SIZE, SIZE).round().astype(np.int16)
    pixels[0, 0] = 30000  # a marker
    assert _read(write_dicom(tmp_path / "a.dcm", pixels, bits=16)).pixels[0, -1, -1] > 0.99


@given(data=st.data())
def test_headers_at_random_are_read_back(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Brightness is what PS3.3 says of the header's numbers, whatever they are."""
    draw = data.draw
    bits, signed = draw(st.sampled_from([8, 10, 12, 16])), draw(st.booleans())
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    kind: Any = np.int16 if signed else np.uint16
    seed, part = draw(st.integers(0, 2**32 - 1)), draw(st.floats(0.0, 1.0))
    stored = np.random.default_rng(seed).integers(low, low + int(part * (high - low)) + 1, (8, 8)).astype(kind)
    slope = draw(st.sampled_from([1.0, -1.0, 0.5, 2.0]) | st.integers(-9, 9).filter(bool).map(float))
    intercept = float(draw(st.integers(-5000, 5000)))
    tags: dict[str, Any] = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    inverted, windowed = draw(st.booleans()), draw(st.booleans())
    if inverted:
        tags["PhotometricInterpretation"] = "MONOCHROME1"
    values = stored * slope + intercept
    if windowed:
        centre, width = float(draw(st.integers(-9000, 9000))), float(draw(st.integers(2, 9000)))
        tags |= {"WindowCenter": centre, "WindowWidth": width, "VOILUTFunction": "LINEAR_EXACT"}
        wanted = np.clip((values - centre) / width + 0.5, 0, 1)
    path = tmp_path_factory.mktemp("dicom") / "a.dcm"
    picture = read_image(write_dicom(path, stored, bits=bits, **tags), ImageForm(1, 8))
    shown = 1 - picture.pixels[0].numpy() if inverted else picture.pixels[0].numpy()
    assert (INVERTED in picture.treatments) == inverted and TURNED not in picture.treatments
    if windowed:
        assert picture.treatments[0] == WINDOW
        np.testing.assert_allclose(shown, wanted, atol=1e-4)
        return
    # Without a window: an increasing straight line through the values, cut off at both ends; all of it is said.
    assert picture.treatments[0] in (STORED_BITS, USED_BITS, PERCENTILES)
    inside = (shown > 1e-6) & (shown < 1 - 1e-6)
    if len(np.unique(values[inside])) > 2:
        fit = np.polyfit(values[inside], shown[inside].astype(np.float64), 1)
        assert fit[0] > 0
        np.testing.assert_allclose(np.polyval(fit, values[inside]), shown[inside], atol=1e-3)
    if picture.treatments[0] == PERCENTILES and len(np.unique(values)) > 1:
        assert shown.min() < 0.01 and shown.max() > 0.99


def test_a_table_counts_before_a_window(tmp_path: Path) -> None:
    pixels = np.arange(SIZE * SIZE).reshape(SIZE, SIZE).astype(np.uint16)
    tags = {"VOILUTSequence": lookup_table([0, 4095], 0, 12), "WindowCenter": 5, "WindowWidth": 9}
    picture = _read(write_dicom(tmp_path / "a.dcm", pixels, bits=12, **tags))
    assert (
        picture.treatments == (TABLE,) and picture.pixels[0, 0, 0] == 0 and (picture.pixels[0].ravel()[1:] == 1).all()
    )
