"""The section about what is promised to patients.

It checks what can be checked within it; what must fit between two sections is checked by `config.Config`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mpc_fl.config.section import Count, Positive, Section, Whole


class PrivacySection(Section):
    """Differential privacy of each hospital's patients.

    `local`: each hospital adds the full noise itself, once per local step. `distributed`: every step is a secure sum, and
    each hospital adds its part of the noise of that sum, so that it holds against `colluders` hospitals that take out
    theirs.

    Neighbouring data sets differ in one patient, so no hospital's number of patients may set what is released. All of it
    follows from public figures: every hospital has from `smallest_hospital` to `largest_hospital` training patients. Each
    of them is drawn with probability training.batch_size / smallest_hospital (at most 1), wherever the patient is.
    """

    mechanism: Literal["local", "distributed", "none"] = Field(default="local", description="who adds the noise")
    colluders: Whole | None = Field(
        default=None,
        description="hospitals that may pool with the aggregator, at most federation.quorum - 2; null: 1, or 0 below that",
    )
    smallest_hospital: Count | None = Field(
        default=None,
        description="public lower bound on the training patients of every hospital; needed with a mechanism, of phantoms known",
    )
    largest_hospital: Count | None = Field(
        default=None, description="public upper bound on them; null: four times smallest_hospital, of phantoms known"
    )
    spare_rounds: Annotated[int, Field(ge=0, le=10**6)] = Field(
        default=1, description="rounds that may be lost and made anew within the budget: what was sent stays charged"
    )
    epsilon: Positive = Field(default=8.0, description="promised to every patient over all runs of the privacy ledger")
    delta: Annotated[float, Field(ge=1e-30, lt=1)] = Field(
        default=1e-4,
        description="probability with which the promise of epsilon may fail; below one over the number of patients",
    )
    clipping_norm: Positive = Field(default=1.0, description="L2 norm that a patient's gradient is cut to")
    noise_multiplier: Annotated[float, Field(ge=1e-12, le=1e6)] | None = Field(
        default=None,
        description="standard deviation of the noise over what one patient can move; null: calibrated to epsilon",
    )
    accountant: Literal["pld", "rdp", "prv"] = Field(
        default="pld",
        description="how losses add up: pld is tight; rdp asks for 6 to 7 % more noise; prv is Opacus's, for comparison",
    )

    @model_validator(mode="after")
    def _check(self) -> PrivacySection:
        smallest, largest = self.smallest_hospital, self.largest_hospital
        if largest is not None and (smallest is None or smallest > largest):
            raise ValueError("largest_hospital needs a smallest_hospital that does not exceed it")
        return self
