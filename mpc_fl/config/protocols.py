"""Sections about what is computed on shares: the sum of updates, encrypted diagnosis, and what a server of it grants.

All but `ServingSection` enter the digest that parties compare before they start.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mpc_fl.config.section import Count, Positive, Section

Reveal = Literal["logits", "label"]
MASKS_BETWEEN_ALL_UP_TO = 16  # hospitals


class AggregationSection(Section):
    """Secure sum of updates. An update's coordinates must lie within `update_bound`, counts within `count_bound`.

    `weighted` opens the exact number of patients of all hospitals and weights their updates by their own: with
    mechanism `none` alone, where it is the default. With a mechanism that number is nobody's to know, and hospitals weigh the same.

    With `norm_check` each hospital proves that the L2 norm of its hidden update is within a bound before anything is opened;
    what exceeds it is left out. `norm_bound` overrides the bound that follows from clipping and noise; with distributed noise
    it cannot be lower.

    Up to 16 hospitals share masks with all others. Beyond, `mask_neighbours` auto lets each share them with as many as are needed
    against a fifth of all hospitals (or privacy.colluders, if these are more) that pool with the aggregator; sums whose norms are
    checked need masks between all.
    """

    fraction_bits: Annotated[int, Field(ge=4, le=40)] = Field(default=24, description="of an encoded update")
    update_bound: Positive = 64.0
    count_bound: Count = 1 << 20
    weighted: bool | None = None
    norm_check: bool = False
    norm_bound: Positive | None = Field(
        default=None, description="L2 norm of an update (of a sum of gradients, if noise is distributed); null: derived"
    )
    mask_neighbours: Literal["auto", "all"] = Field(
        default="auto", description="all: also beyond 16 hospitals, against all but two of a sum"
    )


class InferenceSection(Section):
    """Encrypted inference between one hospital and a model owner.

    `engine` fast runs convolutional networks some 50 times faster than reference, which runs all. `reveal` says what is opened
    to the hospital: the class alone (label, engine fast) or logits, from which a hospital that deviates takes the last layer's
    weights. `fill` stores as many batches in the parties' pools (site.pool)
    instead of diagnosing; without `dealer` diagnoses come from pools alone and the dealer need not run. `at_once` batches are
    evaluated at the same time (engine fast): more images a second, more memory.

    `public_features` says in so many words what follows from `data.features`: the hospital computes these features in the clear,
    and only the network on top, the model owner's secret, is evaluated. What contradicts `data.features` is refused.
    """

    engine: Literal["reference", "fast"] = "reference"
    reveal: Reveal | None = Field(
        default=None,
        description="null: of a model owner that stays up (serve) the label, else logits; at a hospital what that reveals",
    )
    fraction_bits: Annotated[int, Field(ge=8, le=20)] = Field(
        default=16, description="of values on shares, engine reference"
    )
    batch_size: Count = Field(default=1, description="images of one evaluation")
    at_once: Annotated[int, Field(ge=1, le=16)] = 1
    limit: Count | None = Field(default=None, description="images to diagnose; null: all")
    plaintext_reference: bool = Field(
        default=False, description="compare with the same model in the clear, where both are at hand: for trials only"
    )
    logit_bound: Positive = Field(default=4096.0, description="larger logits are refused before they could wrap")
    public_features: bool | None = Field(default=None, description="null: whether data.features is set")
    fill: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    dealer: bool = True

    @model_validator(mode="after")
    def _check(self) -> InferenceSection:
        if self.engine != "fast" and self.at_once > 1:
            raise ValueError("inference.at_once needs inference.engine=fast")
        if self.engine != "fast" and (self.fill or not self.dealer):
            raise ValueError("inference.fill and inference.dealer=false need inference.engine=fast, which has pools")
        if self.fill and not self.dealer:
            raise ValueError("a pool is filled by the dealer; set inference.dealer to true")
        return self


class ServingSection(Section):
    """What a model owner that stays up (`mpc-fl serve`) grants each hospital and all together; no other party needs to know.

    Hospitals may pool answers, so what all of them ask is bounded too (`..._of_all`), by default to what two may ask.

    Its dealer has `sessions` and `sessions_per_minute` of its own. `pool_batches` are kept for each hospital (site.pool).

    Batches take turns, round-robin over hospitals, `turns` at once. A turn longer than `patience` seconds keeps others
    waiting no more, and a hospital from which nothing comes for `deadline` seconds has lost its session.
    """

    images_per_day: Count = Field(default=200, description="of one hospital within any 24 hours")
    images_per_minute: Count = Field(default=20, description="of one hospital within any 60 seconds")
    images_per_day_of_all: Count | None = Field(
        default=None, description="of all hospitals together within any 24 hours; null: twice images_per_day"
    )
    images_per_minute_of_all: Count | None = Field(
        default=None, description="of all hospitals together within any 60 seconds; null: twice images_per_minute"
    )
    sessions: Count = Field(default=16, description="hospitals that may be connected at once; as many may fill pools")
    sessions_per_minute: Count = Field(default=30, description="that one hospital may begin within any 60 seconds")
    pool_batches: Count = Field(default=100, description="that one hospital may have stored at the model owner")
    turns: Count = 2
    patience: Positive = 15.0
    deadline: Positive = 60.0

    @property
    def day_of_all(self) -> int:
        """Images of all hospitals together within any 24 hours."""
        return self.images_per_day_of_all or 2 * self.images_per_day

    @property
    def minute_of_all(self) -> int:
        """Images of all hospitals together within any 60 seconds."""
        return self.images_per_minute_of_all or 2 * self.images_per_minute

    @property
    def largest_batch(self) -> int:
        """Images that a batch may have at most: more would never be within all limits."""
        return min(self.images_per_day, self.images_per_minute, self.day_of_all, self.minute_of_all)
