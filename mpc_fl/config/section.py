"""What every section of the configuration is made of: frozen, no unknown keys, and the kinds of numbers that come again."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bound = Annotated[float, Field(allow_inf_nan=False)]
LARGEST = 2**53  # up to here a float holds every whole number, so arithmetic with both is exact
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Steps = Annotated[int, Field(ge=1, le=10**6)]  # of what is accounted for, one by one
Whole = Annotated[int, Field(ge=0, le=LARGEST)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # SHA-256
Momentum = Annotated[float, Field(ge=0, lt=1)]
# What becomes of the hospitals' updates (`training.TrainingSection` says what each does).
Strategy = Literal["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedsgd"]


class Section(BaseModel):
    """A frozen part of the configuration; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
