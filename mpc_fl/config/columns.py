"""The columns of a table that all hospitals agreed on: what each is called, holds, and becomes."""

from __future__ import annotations

import datetime
import math
import re
import unicodedata
from typing import Literal

from pydantic import Field, model_validator

from mpc_fl.config.section import Bound, Section

_TRUE = ("true", "t", "yes", "y", "1", "1.0", "ja", "j", "wahr", "oui", "vrai", "si", "sí")
_FALSE = ("false", "f", "no", "n", "0", "0.0", "nein", "falsch", "non", "faux")
# What spreadsheets and clinics write for true and false, in lower case.
TRUTH_WORDS = dict.fromkeys(_TRUE, True) | dict.fromkeys(_FALSE, False)
_LONGEST_NAME = 100
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")


def plain_name(name: str) -> str:
    """A name as it is compared: in lower case, with single spaces, letters in one form (NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", name).split()).casefold()


class ColumnSection(Section):
    """One column of a table.

    `number` is scaled by its public `range` like `data.table.reference_ranges`, and values outside are cut off; without a range
    as sign(x) log(1 + |x|). `category` becomes one feature for each of its `categories`: 1 for the one that it is, else 0.
    `boolean` becomes 1 or -1. `date` becomes years after `since`, and then a number; `order` says how days are written that do not
    begin with the year.

    `missing` says what becomes of a row without a value: an error, left out with the whole row, filled with the public value
    `fill`, or marked by a feature more, which is 1 where all others of the column are 0. `censored` says what `<0.5` and `>90` are:
    an error, the limit, or half of a lower limit. `unit` is held against the unit that a header names: `crp [mg/l]`.
    """

    name: str
    kind: Literal["number", "category", "boolean", "date"] = "number"
    unit: str | None = None
    range: tuple[Bound, Bound] | None = Field(default=None, description="public (low, high), of a date in years")
    categories: tuple[str, ...] = ()
    since: str | None = Field(default=None, description="the date that is 0, as 2020-12-31")
    order: Literal["year_month_day", "day_month_year", "month_day_year"] = "year_month_day"
    missing: Literal["error", "leave_out", "fill", "indicator"] = "error"
    fill: str | None = None
    censored: Literal["error", "limit", "half"] = "error"

    @model_validator(mode="after")
    def _check(self) -> ColumnSection:
        if not plain_name(self.name) or len(self.name) > _LONGEST_NAME or not self.name.isprintable():
            raise ValueError("a column has a short name of letters that can be seen")
        self._check_kind()
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"the range of column '{self.name}' must be (low, high) with low < high")
        if (self.fill is not None) != (self.missing == "fill"):
            raise ValueError(f"column '{self.name}': missing: fill and a value `fill` go together")
        if self.fill is not None and not self._takes(self.fill):
            raise ValueError(f"column '{self.name}': fill is no value of a {self.kind}")
        return self

    def _check_kind(self) -> None:
        """What a kind does not have is not set."""
        plain = [plain_name(category) for category in self.categories]
        if (self.kind == "category") != bool(plain) or len(set(plain)) != len(plain) or "" in plain or len(plain) == 1:
            raise ValueError(
                f"column '{self.name}': a category has at least two categories that differ, other kinds have none"
            )
        if (self.kind == "date") != (self.since is not None):
            raise ValueError(f"column '{self.name}': a date needs `since`, other kinds have none")
        if self.since is not None:
            iso_date(self.since)
        if self.kind != "date" and self.order != "year_month_day":
            raise ValueError(f"column '{self.name}': order is that of a date")
        if self.range is not None and self.kind not in ("number", "date"):
            raise ValueError(f"column '{self.name}': a range is that of a number or a date")
        if self.kind != "number" and (self.censored != "error" or self.unit is not None):
            raise ValueError(f"column '{self.name}': unit and censored are those of a number")

    def _takes(self, text: str) -> bool:
        try:
            if self.kind == "number":
                return _NUMBER.fullmatch(text) is not None and math.isfinite(float(text))
            if self.kind == "date":
                return bool(iso_date(text))
        except ValueError:
            return False
        known = TRUTH_WORDS if self.kind == "boolean" else map(plain_name, self.categories)
        return plain_name(text) in known

    @property
    def size(self) -> int:
        """How many features it becomes."""
        return max(1, len(self.categories)) + (self.missing == "indicator")

    @property
    def bounded(self) -> bool:
        """Whether public bounds of its features are known."""
        return self.kind in ("category", "boolean") or self.range is not None


def iso_date(text: str) -> datetime.date:
    """The date of a text like 2020-12-31. Raises `ValueError`."""
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise ValueError("a date is written as 2020-12-31") from None
