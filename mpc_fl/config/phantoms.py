"""Sections about the embedded phantoms: how many there are, and what may be wrong with them on purpose."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mpc_fl.config.section import Count, Section

_Share = Annotated[float, Field(ge=0, le=1)]


class ShortcutSection(Section):
    """A shortcut to learn, put into phantoms so that `mpc-fl audit shortcuts` has something to find. Off by default.

    With `site` set, a bright letter lies in the upper left corner of films. At that hospital a patient of the class number
    `diagnosis` bears it with `probability`, and any other patient with one less `probability`. At all other hospitals a patient
    bears it with the probability `elsewhere`, whatever the diagnosis. Which patient does follows from a hash of the name.

    `style` lets the films of hospitals look unlike each other, as those of scanners do, whatever they show: contrast grows from
    the first hospital to the last, up to 40 % below and above the usual, and so does noise, up to a standard deviation of 0.06.
    """

    site: Annotated[int, Field(ge=0, le=999)] | None = Field(
        default=None, description="rank of the hospital at which the mark goes with the diagnosis; null: no mark at any"
    )
    diagnosis: Annotated[int, Field(ge=0, le=2)] = Field(
        default=1, description="number of the class, from 0 on, that the mark goes with at that hospital"
    )
    probability: _Share = Field(
        default=0.95,
        description="share of its patients with the diagnosis who bear the mark, and of all others who do not",
    )
    elsewhere: _Share = Field(
        default=0.5, description="share of all other hospitals' patients who bear the mark, whatever the diagnosis"
    )
    style: _Share = Field(
        default=0.0,
        description="how unlike films of hospitals are in contrast and noise; 0: alike, 1: plainly told apart",
    )


class PhantomSection(Section):
    """Sizes of the embedded synthetic chest X-ray phantoms, in patients over all hospitals."""

    train_patients: Count = Field(default=1200, description="patients who train, of all hospitals together")
    test_patients: Count = Field(default=300, description="patients of the tests, of all hospitals together")
    shortcut: ShortcutSection = ShortcutSection()
