"""What readers of data do, as layers of a network that leaves this program: pictures made square, cells made features.

They are products of matrices and comparisons, which every format of files has. Each gives records as `learning.data` does and,
bool (N,), whether the input can be one at all: a reader refuses with a line what a layer can only mark.
"""

from __future__ import annotations

import torch
from torch import nn

from mpc_fl.config.columns import TRUTH_WORDS, ColumnSection, plain_name
from mpc_fl.config.data import DataSection, TableSection
from mpc_fl.learning.data.table_columns import number_of, years_of

_ROUNDING = 1e-3  # how far a picture's values may lie outside of [0, 1], as those do that were resampled elsewhere


class PictureLayer(nn.Module):
    """Pictures float32 (N, channels, H, W) in [0, 1] to records (N, channels, size, size), like `data.image_files.read_image`.

    With `data.wrong_size: resize` of any height and width: bilinear, over more pixels where it shrinks a picture, and square as
    `data.not_square` says. Along each axis that is a matrix, which follows from height and width alone.
    """

    def __init__(self, data: DataSection) -> None:
        super().__init__()
        self.size, self.not_square, self.resizes = data.image_size, data.not_square, data.wrong_size == "resize"

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Records, and whether all values of a picture lie in [0, 1]."""
        known = ((pictures >= -_ROUNDING) & (pictures <= 1 + _ROUNDING)).flatten(1).all(dim=1)
        if self.resizes:
            rows, columns = (torch.arange(side, dtype=torch.float64) for side in pictures.shape[2:])
            pictures = self._resampling(rows, columns) @ pictures @ self._resampling(columns, rows).T
        return pictures.clamp(0, 1), known

    def _resampling(self, places: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
        """The matrix float32 (size, n) that resamples one axis, whose pixels stand at `places` 0 to n - 1."""
        length, other = (axis.max() + 1 for axis in (places, across))
        size = torch.full_like(length, self.size)
        covered, begin, inside = length, torch.zeros_like(length), size  # pixels taken, from where, and made of them
        if self.not_square == "crop":
            covered = torch.minimum(length, other)
            begin = torch.floor((length - covered) / 2)
        elif self.not_square == "pad":
            inside = torch.round(size * length / torch.maximum(length, other)).clamp(min=1)
        made = torch.arange(self.size, dtype=torch.float64)[:, None] - torch.floor((size - inside) / 2)
        taken = (places - begin)[None]
        scale = covered / inside
        distance = (taken + 0.5 - (made + 0.5) * scale).abs() / scale.clamp(min=1)
        there = (made >= 0) & (made < inside) & (taken >= 0) & (taken < covered)
        weights = torch.where(there, (1 - distance).clamp(min=0), 0.0)
        return (weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)).float()


class TableLayer(nn.Module):
    """Rows float32 (N, columns), one number a column, to features (N, F), like `data.tables`.

    A number stands in its unit, a category as its place among `categories`, from 0, a boolean as 1 or 0, a date as years of
    365.25 days after `since`. NaN is a missing value: filled or marked as the column says, else the row has no answer.
    Without `data.table.columns` all columns are numbers, in their order.
    """

    def __init__(self, table: TableSection) -> None:
        super().__init__()
        self.columns = table.columns
        if table.reference_ranges is not None:
            low, high = torch.tensor(table.reference_ranges, dtype=torch.float64).T
            self.register_buffer("low", low)
            self.register_buffer("high", high)
        self.ranged = table.reference_ranges is not None

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features, and whether every cell of a row is one that a reader takes."""
        values = rows.double()
        if self.columns is None:
            known = values.abs() < torch.inf
            scaled = _in_range(values, self.get_buffer("low"), self.get_buffer("high")) if self.ranged else _log(values)
            return torch.where(known, scaled, 0.0).float(), known.all(dim=1)
        parts = [_features(values[:, place : place + 1], column) for place, column in enumerate(self.columns)]
        known = torch.cat([known for _, known in parts], dim=1).all(dim=1)
        return torch.cat([features for features, _ in parts], dim=1).float(), known


def _features(values: torch.Tensor, column: ColumnSection) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, `column.size`) of the cells (N, 1) of a column, and which of these are cells at all, (N, 1)."""
    missing = values.isnan()
    if column.missing == "fill":
        values = torch.where(missing, cell_value(column, column.fill or ""), values)
    if column.kind == "category":
        features = (values == torch.arange(len(column.categories), dtype=torch.float64)).double()
        known = features.sum(dim=1, keepdim=True) > 0
    elif column.kind == "boolean":
        features, known = 2 * values - 1, (values == 0) | (values == 1)
    else:
        features = _log(values) if column.range is None else _in_range(values, *column.range)
        known = values.abs() < torch.inf
    features = torch.where(known, features, 0.0)
    if column.missing == "indicator":
        features, known = torch.cat([features, missing.double()], dim=1), known | missing
    return features, known


def cell_value(column: ColumnSection, text: str) -> float:
    """The number that stands in a row of `TableLayer` for a cell that a reader takes, of a file with decimal points."""
    if column.kind == "category":
        return float([plain_name(category) for category in column.categories].index(plain_name(text)))
    if column.kind == "boolean":
        return float(TRUTH_WORDS[plain_name(text)])
    return years_of(text, column) if column.kind == "date" else number_of(text, ".", column.censored)


def _log(values: torch.Tensor) -> torch.Tensor:
    """`data.table_columns.on_log_scale`."""
    return values.sign() * values.abs().log1p()


def _in_range(values: torch.Tensor, low: torch.Tensor | float, high: torch.Tensor | float) -> torch.Tensor:
    """`data.table_columns.in_range`."""
    return 4.0 * ((values - low) / (high - low)).clamp(0.0, 1.0).sqrt() - 2.0
