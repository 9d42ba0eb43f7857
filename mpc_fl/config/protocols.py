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

    fraction_bits: Annotated[int, Field(ge=4, le=40)] = Field(
        default=24, description="binary places of an encoded update"
    )
    update_bound: Positive = Field(
        default=64.0,
        description="largest size of a coordinate of an update; a hospital with a larger one refuses to send it",
    )
    count_bound: Count = Field(default=1 << 20, description="largest count of patients or records of a hospital")
    weighted: bool | None = Field(
        default=None,
        description="weight updates by patients, whose number over all hospitals is opened; null: with privacy.mechanism none",
    )
    norm_check: bool = Field(
        default=False, description="each hospital proves that the L2 norm of its hidden update is within a bound"
    )
    norm_bound: Positive | None = Field(
        default=None,
        description="largest L2 norm of an update (of a sum of gradients, if noise is distributed); null: derived",
    )
    mask_neighbours: Literal["auto", "all"] = Field(
        default="auto",
        description="with whom masks are shared; all: also beyond 16 hospitals, against all but two of a sum",
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

    engine: Literal["reference", "fast"] = Field(
        default="reference", description="fast: convolutional networks, some 50 times faster; reference: all networks"
    )
    reveal: Reveal | None = Field(
        default=None,
        description="what is opened to the hospital; null: the label by a model owner that stays up (serve), else logits",
    )
    fraction_bits: Annotated[int, Field(ge=8, le=20)] = Field(
        default=16, description="binary places of values on shares, engine reference"
    )
    batch_size: Count = Field(default=1, description="images of one evaluation")
    at_once: Annotated[int, Field(ge=1, le=16)] = Field(
        default=1,
        description="batches that are evaluated at the same time, engine fast: more images a second, more memory",
    )
    limit: Count | None = Field(default=None, description="images to diagnose; null: all")
    plaintext_reference: bool = Field(
        default=False, description="compare with the same model in the clear, where both are at hand: for trials only"
    )
    logit_bound: Positive = Field(default=4096.0, description="larger logits are refused before they could wrap")
    public_features: bool | None = Field(
        default=None,
        description="say that features are computed in the clear at the hospital; null: whether data.features is set",
    )
    fill: Annotated[int, Field(ge=0, le=1 << 20)] = Field(
        default=0, description="batches to store in the parties' pools instead of diagnosing; 0: diagnose"
    )
    dealer: bool = Field(
        default=True, description="false: diagnoses come from pools alone, and the dealer need not run"
    )

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

    images_per_day: Count = Field(default=200, description="images of one hospital within any 24 hours")
    images_per_minute: Count = Field(default=20, description="images of one hospital within any 60 seconds")
    images_per_day_of_all: Count | None = Field(
        default=None, description="images of all hospitals together within any 24 hours; null: twice images_per_day"
    )
    images_per_minute_of_all: Count | None = Field(
        default=None,
        description="images of all hospitals together within any 60 seconds; null: twice images_per_minute",
    )
    sessions: Count = Field(default=16, description="hospitals that may be connected at once; as many may fill pools")
    sessions_per_minute: Count = Field(
        default=30, description="sessions that one hospital may begin within any 60 seconds"
    )
    pool_batches: Count = Field(default=100, description="batches that one hospital may have stored at the model owner")
    turns: Count = Field(default=2, description="batches of all hospitals that are evaluated at the same time")
    patience: Positive = Field(
        default=15.0, description="seconds of a turn after which it keeps others waiting no more"
    )
    deadline: Positive = Field(
        default=60.0, description="seconds without anything from a hospital after which it has lost its session"
    )

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
