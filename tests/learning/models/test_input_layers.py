"""Readers as layers: pictures of any size and cells of every kind give what the readers of files give."""

from __future__ import annotations

import datetime
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mpc_fl.config.columns import ColumnSection
from mpc_fl.config.config import parse_config
from mpc_fl.config.data import DataSection, TableSection
from mpc_fl.learning.data.image_files import ImageForm, made_square, read_image
from mpc_fl.learning.data.table_columns import encode_rows
from mpc_fl.learning.data.table_files import TableFile
from mpc_fl.learning.data.tables import scale_features
from mpc_fl.learning.models.input_layers import PictureLayer, TableLayer, cell_value


def resizing(**values: Any) -> DataSection:
    return DataSection(image_size=24, wrong_size="resize", **values)


@pytest.mark.parametrize("not_square", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("channels", [1, 3])
@given(height=st.integers(8, 90), width=st.integers(8, 90))
def test_pictures_of_any_size_become_what_the_reader_makes_of_them(
    not_square: str, channels: int, height: int, width: int
) -> None:
    """Not of such that padding leaves one column of pixels: there torch 2.13 repeats the first pixel."""
    data = resizing(not_square=not_square, channels=channels)
    picture = torch.rand(channels, height, width, generator=torch.Generator().manual_seed(height * 100 + width))
    records, known = PictureLayer(data)(picture[None])
    expected, _ = made_square(picture, ImageForm.of(data))
    torch.testing.assert_close(records[0], expected.clamp(0, 1), rtol=0, atol=1e-5)
    assert known.tolist() == [True]


def test_large_films_agree_to_1e_5_with_files_that_are_read(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (1317, 1858), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "film.png")
    for not_square in ("pad", "crop", "stretch"):
        data = DataSection(image_size=224, wrong_size="resize", not_square=not_square)
        read = read_image(tmp_path / "film.png", ImageForm.of(data)).pixels
        made, _ = PictureLayer(data)(torch.from_numpy(values)[None, None].float() / 255)
        torch.testing.assert_close(made[0], read, rtol=0, atol=1e-5)


def test_pictures_of_one_size_stay_as_they_are() -> None:
    pictures = torch.rand(3, 1, 32, 32)
    records, known = PictureLayer(DataSection())(pictures)
    assert torch.equal(records, pictures) and bool(known.all())


@pytest.mark.parametrize("bad", [255.0, -0.1, torch.nan, torch.inf])
def test_a_picture_with_values_outside_of_0_to_1_is_marked(bad: float) -> None:
    pictures = torch.rand(3, 1, 24, 24)
    pictures[1, 0, 5, 5] = bad
    for data in (resizing(), DataSection(image_size=24)):
        assert PictureLayer(data)(pictures)[1].tolist() == [True, False, True]


def column(**values: Any) -> ColumnSection:
    return ColumnSection(name="c", **values)


# Columns of every kind, with cells as files have them.
COLUMNS: list[tuple[ColumnSection, list[str]]] = [
    (column(range=(135, 145), unit="mmol/l"), ["135", "140.25", "150", "1"]),
    (column(), ["-12.5", "0", "1000", "1e-3"]),
    (column(missing="fill", fill="3.5"), ["", "7", "NA", "2"]),
    (column(range=(0, 10), missing="indicator"), ["", "7", "0", "?"]),
    (column(kind="category", categories=("A", "b", "Ö")), ["a", "B", "ö", "A"]),
    (column(kind="category", categories=("A", "b"), missing="fill", fill="B"), ["", "B", "a", "A"]),
    (column(kind="category", categories=("A", "b"), missing="indicator"), ["", "B", "a", "A"]),
    (column(kind="boolean"), ["yes", "0", "TRUE", "nein"]),
    (column(kind="boolean", missing="fill", fill="no"), ["", "0", "TRUE", "nein"]),
    (column(kind="boolean", missing="indicator"), ["", "0", "TRUE", "nein"]),
    (column(kind="date", since="2020-01-01", range=(-90, 10)), ["1950-02-28", "2020-01-01", "2025-12-31", "1900-01-01"]),
    (column(kind="date", since="2020-01-01", missing="fill", fill="2019-06-01"), ["", "2020-01-01", "2025-12-31", "1999-01-01"]),
]  # fmt: skip


@pytest.mark.parametrize(
    "which", [*([place] for place in range(len(COLUMNS))), list(range(len(COLUMNS)))], ids=lambda which: f"{len(which)}"
)
def test_cells_become_the_features_that_the_reader_makes_of_them(which: list[int]) -> None:
    columns = tuple(COLUMNS[place][0].model_copy(update={"name": f"c{place}"}) for place in which)
    cells = list(map(list, zip(*(COLUMNS[place][1] for place in which), strict=True)))
    file = TableFile(Path("t"), [each.name for each in columns], list(enumerate(cells)), "utf-8", ",")
    expected = encode_rows(file, columns, range(len(columns)), may_leave_out=False).features
    rows = [
        [torch.nan if cell in ("", "NA", "?") else cell_value(each, cell) for each, cell in zip(columns, row, strict=True)]
        for row in cells
    ]  # fmt: skip
    features, known = TableLayer(TableSection(columns=columns))(torch.tensor(rows, dtype=torch.float32))
    assert features.dtype == torch.float32 and features.shape == (4, sum(each.size for each in columns))
    torch.testing.assert_close(features, torch.from_numpy(expected.astype(np.float32)), rtol=0, atol=1e-5)
    assert bool(known.all())


@pytest.mark.parametrize(
    ("of", "bad"),
    [
        (column(), [torch.nan, torch.inf]),
        (column(missing="leave_out"), [torch.nan, -torch.inf]),
        (column(missing="indicator"), [torch.inf]),
        (column(kind="category", categories=("a", "b")), [-1.0, 2.0, 0.5, torch.nan]),
        (column(kind="boolean"), [-1.0, 2.0, 0.5, torch.nan]),
        (column(kind="date", since="2020-01-01"), [torch.nan]),
    ],
)
def test_what_is_no_cell_is_marked_and_spoils_no_other_row(of: ColumnSection, bad: list[float]) -> None:
    rows = torch.tensor([[1.0], *([value] for value in bad), [0.0]])
    features, known = TableLayer(TableSection(columns=(of,)))(rows)
    assert known.tolist() == [True, *[False] * len(bad), True]
    assert bool(torch.isfinite(features).all())


def test_a_limit_is_the_number_that_the_reader_takes_for_it() -> None:
    half, limit = column(censored="half"), column(censored="limit")
    assert (cell_value(half, "<0.5"), cell_value(half, ">90"), cell_value(limit, "<0.5")) == (0.25, 90.0, 0.5)
    assert cell_value(column(kind="date", since="2020-01-01"), "2021-01-01") == pytest.approx(366 / 365.25)
    assert datetime.date(2021, 1, 1) - datetime.date(2020, 1, 1) == datetime.timedelta(days=366)


@pytest.mark.parametrize("ranges", [None, [[0.0, 10.0], [-5.0, 100.0]]])
def test_columns_in_order_are_scaled_like_the_reader_does(ranges: list[list[float]] | None) -> None:
    table = {"features": 2, "reference_ranges": ranges}
    config = parse_config({"data": {"source": "csv", "table": table}, "model": {"architecture": "mlp"}}, "test")
    rows = np.array(list(itertools.product([-7.5, 0, 0.25, 9, 1000], repeat=2)), dtype=np.float32)
    features, known = TableLayer(config.data.table)(torch.from_numpy(rows))
    expected = torch.from_numpy(scale_features(rows.astype(np.float64), config))
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    assert bool(known.all())
    assert TableLayer(config.data.table)(torch.tensor([[1.0, torch.nan], [1.0, 2.0]]))[1].tolist() == [False, True]
