"""The section about groups of test patients: which there are is public, who is in which stays at the hospital."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from mpc_fl.config.columns import plain_name
from mpc_fl.config.section import Section

UNKNOWN = "unknown"  # the group of records of which nothing, or nothing that is listed, is known
SITE = "site"
_LONGEST = 40  # letters of a category
_MOST = 32  # groups of one attribute

Category = Annotated[str, Field(min_length=1, max_length=_LONGEST)]
Years = Annotated[int, Field(ge=1, le=130)]


class GroupsSection(Section):
    """Groups of test patients, in which the final model is evaluated beside all of them together.

    Each attribute that is given makes groups of its own, with one more, `unknown`, for records without a value or with one that
    is not listed. Values stand in the columns sex, age (in years) and scanner of patients.csv, or of the table itself; phantoms
    have made-up ones. The groups of `site` are the hospitals, so they need `evaluation.noise_multiplier`.

    How many patients a group has is opened with noise. One that is not shown to have `evaluation.fewest_in_group` is withheld:
    its counts are in no sum.
    """

    sex: tuple[Category, ...] = Field(default=(), description="values of the column sex, in any case; empty: no groups")
    age_bands: tuple[Years, ...] = Field(
        default=(), description="ages in years at which one band ends and the next begins; empty: no groups"
    )
    scanner: tuple[Category, ...] = Field(
        default=(), description="values of the column scanner, in any case; empty: no groups"
    )
    site: bool = Field(default=False, description="true: each hospital is a group; its noised counts are opened")

    @model_validator(mode="after")
    def _check(self) -> GroupsSection:
        for attribute, values in (("sex", self.sex), ("scanner", self.scanner)):
            plain = [plain_name(value) for value in values]
            if len(set(plain)) != len(plain) or "" in plain:
                raise ValueError(f"{attribute} names a category twice, or one without letters")
            if UNKNOWN in plain:
                raise ValueError(f"{attribute} has the group '{UNKNOWN}' anyway; leave it out of the list")
            if not all(value.isprintable() for value in values):
                raise ValueError(f"{attribute} names a category that cannot be printed")
        if list(self.age_bands) != sorted(set(self.age_bands)):
            raise ValueError("age_bands must rise, as in [18, 65]")
        if max(len(self.sex), len(self.age_bands), len(self.scanner)) >= _MOST:
            raise ValueError(f"an attribute has {_MOST} groups at most")
        return self

    @property
    def recorded(self) -> tuple[str, ...]:
        """The attributes that hospitals must know of records, as columns are named."""
        asked = {"sex": self.sex, "age": self.age_bands, "scanner": self.scanner}
        return tuple(name for name, values in asked.items() if values)

    @property
    def attributes(self) -> tuple[str, ...]:
        """All attributes that make groups, in order; empty where there are no groups."""
        return (*self.recorded, *((SITE,) if self.site else ()))


def age_band_names(edges: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the bands between edges in years, one more than there are edges."""
    if not edges:
        return ()
    middle = (f"{low} to {high - 1}" for low, high in zip(edges, edges[1:], strict=False))
    return (f"below {edges[0]}", *middle, f"{edges[-1]} and over")
