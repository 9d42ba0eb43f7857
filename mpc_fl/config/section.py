"""section"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


Fraction = Annotated[float, Field(ge=0, le=1)]


Count = Annotated[int, Field(ge=1)]


Momentum = Annotated[float, Field(ge=0, lt=1)]


Strategy = Literal["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedsgd"]


class Section(BaseModel):
    """A frozen part of the configuration; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
