"""The section about who looks at how good the model is: on validation patients to choose by, on test patients to know.

What must fit between this section and others is checked by `config.Config`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mpc_fl.config.groups import GroupsSection
from mpc_fl.config.section import Count, Section

# Whose records an evaluation is about, of all hospitals together.
Evaluated = Literal["test", "validation"]


class EvaluationSection(Section):
    """Evaluation on the patients of all hospitals together: only sums over hospitals are opened.

    Without `noise_multiplier` their counts are exact, and known to the aggregator: the confusion matrix, histograms of
    predicted probabilities, and what calibration needs. With it the confusion matrix alone is opened, in patients, with
    noise of so many times what one patient can move; every hospital charges that to its privacy ledger.

    Validation patients (`data.validation_fraction`) are for choosing, test patients for the final figure. With `choose: best`
    the model of the run is that of the validated round with the best `criterion`, of equal ones the last; `calibrate` fits a
    temperature of the probabilities, and class offsets of the decision, on validation patients. Either takes a round of its
    own after the last one of training, in which test patients judge what was chosen.

    With a privacy mechanism validation carries noise, because these patients are promised it like those who train. With
    `public_validation` they are not: it says that the validation patients' records are no secret of anybody.
    """

    every: Count | None = Field(
        default=None, description="rounds between two evaluations; null: before the first round and after the last one"
    )
    noise_multiplier: Annotated[float, Field(ge=1e-3, le=1e3)] | None = Field(
        default=None,
        description="noise of counts of test and validation patients, over what one can move; null: exact counts",
    )
    test: bool = Field(default=True, description="false: test patients are left alone, as in trials of `mpc-fl tune`")
    validate_every: Count | None = Field(
        default=None, description="rounds between two validations; null: every one with choose: best, else the last one"
    )
    choose: Literal["last", "best"] = Field(
        default="last", description="whose model is that of the run: the last round's, or the best validated one's"
    )
    criterion: Literal["accuracy", "balanced_accuracy"] = Field(
        default="accuracy", description="what rounds, offsets and trials are compared by, on validation patients"
    )
    calibrate: Literal["none", "temperature", "offsets", "both"] = Field(
        default="none", description="what is fitted to the final model on validation patients"
    )
    public_validation: bool = Field(
        default=False, description="true: validation patients' records are no secret, so sums of them are exact"
    )

    groups: GroupsSection = GroupsSection()
    fewest_in_group: Annotated[int, Field(ge=2, le=10**6)] = Field(
        default=20, description="test patients that a group must be shown to have, or nothing of it is opened"
    )
    group_size_noise: Annotated[float, Field(ge=1, le=1e3)] = Field(
        default=4.0,
        description="noise of groups' numbers of patients, over what one can move, where counts are exact; else as all noise",
    )

    @model_validator(mode="after")
    def _check(self) -> EvaluationSection:
        if self.groups.attributes and not self.test:
            raise ValueError("groups are of test patients; leave groups out with test: false")
        if self.groups.site and self.noise_multiplier is None:
            raise ValueError(
                "groups.site would open exact counts of each hospital; set noise_multiplier, or groups.site to false"
            )
        if not self.test and self.every is not None:
            raise ValueError("every says when test patients are looked at; leave it null with test: false")
        return self

    @property
    def asks_for_validation(self) -> bool:
        """Whether something is set that validation patients are needed for."""
        default = EvaluationSection()
        about = ("choose", "calibrate", "criterion", "validate_every", "public_validation", "test")
        return any(getattr(self, name) != getattr(default, name) for name in about)

    @property
    def chooses(self) -> bool:
        """Whether a round after training chooses or calibrates the model."""
        return self.choose == "best" or self.calibrate != "none"

    def validates(self, number: int, rounds: int) -> bool:
        """Whether validation is due after round `number` of `rounds`, where patients are kept aside for it."""
        every = self.validate_every or (1 if self.choose == "best" else rounds)
        return number >= 1 and (number == rounds or (number < rounds and number % every == 0))
