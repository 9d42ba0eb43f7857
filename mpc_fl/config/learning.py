"""Sections about what is learned: the data, the network, local training and the privacy of each hospital's patients.

Each class checks what can be checked within it; what must fit between two sections is checked by `config.Config`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mpc_fl.config.section import Bound, Count, Momentum, Positive, Section, Steps, Strategy, Whole


class PartitionSection(Section):
    """How one data set is divided over simulated hospitals. `none`: the whole folder belongs to this hospital."""

    method: Literal["equal", "dirichlet", "none"] = "equal"
    alpha: Positive = 0.5


class PhantomSection(Section):
    """Sizes of the embedded synthetic chest X-ray phantoms, in patients over all hospitals."""

    train_patients: Count = 1200
    test_patients: Count = 300


class TableSection(Section):
    """Columns of a CSV file. Without `patient_column` every row is one patient."""

    label_column: str = "label"
    patient_column: str | None = None
    features: Count | None = Field(default=None, description="number of feature columns; needed for csv")
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    reference_ranges: tuple[tuple[Bound, Bound], ...] | None = Field(
        default=None, description="public (low, high) of each feature column, never taken from patients of this run"
    )

    @model_validator(mode="after")
    def _check(self) -> TableSection:
        for low, high in self.reference_ranges or ():
            if not low < high:
                raise ValueError("reference_ranges must be pairs of (low, high) with low < high")
        return self


Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

# Features that an extractor gives of an image, by its name.
FEATURE_COUNTS = {
    "scattering": 3472,
    "efficientnet_lite0": 1280,
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "densenet121": 1024,
    "mobilenet_v3_small": 1024,
    "mobilenet_v3_large": 1280,
}
FEATURE_CONSTANT = 0.1  # stands beside the features of every record, for a network to learn an offset with


class FeatureSection(Section):
    """Records are features of images, computed in the clear by whoever has the image, with something public.

    `extractor` is `scattering`, which comes from no data, or a network whose `weights` (SHA-256 of the file, as `mpc-fl
    model fetch` and `mpc-fl model import` print it) everybody has: what stands before its last linear layer. The features of
    an image have L2 norm 1; with `mirror` they are the mean of those of the image and of its mirror, again at norm 1.
    """

    extractor: str = "efficientnet_lite0"
    weights: Digest | None = None
    mirror: bool = True
    count: Count | None = Field(default=None, description="number of features; null: known of the extractor")

    @model_validator(mode="after")
    def _check(self) -> FeatureSection:
        if (self.weights is None) != (self.extractor == "scattering"):
            raise ValueError("scattering has no weights, and every other extractor needs them (`mpc-fl model --help`)")
        known = FEATURE_COUNTS.get(self.extractor)
        if known is None and self.count is None:
            raise ValueError(f"set data.features.count: how many features '{self.extractor}' gives is not known here")
        if known is not None and self.count not in (None, known):
            raise ValueError(f"{self.extractor} gives {known} features; leave data.features.count null")
        return self

    @property
    def size(self) -> int:
        """Features of one image."""
        return self.count or FEATURE_COUNTS[self.extractor]


class SubsetSection(Section):
    """Upper limits on patients per hospital, for short runs; null takes all."""

    train_patients: Count | None = None
    test_patients: Count | None = None


class DataSection(Section):
    """What the data are. `images`: DIR/{train,test}/<class>/ with PNG, JPEG or DICOM files.

    `normalise`: `secure` brings inputs to mean 0 and standard deviation 1 over the training patients of all hospitals, which
    a secure sum before the first round opens. With differential privacy that sum carries noise of its own,
    `normalise_noise_multiplier` times its sensitivity, and every hospital charges it to its ledger.

    `features`: records are features of the images instead of the images, `features.size` numbers and a constant. There
    `normalise: secure` takes the mean over patients off them (`mean` in `federation.feature_statistics`), and brings them to
    norm 1 again.

    `normalise: weights` scales inputs as the weights expect it that the network begins with (`model.initial_weights`).

    `shared_patients` says what becomes of a test patient who is by name also a training patient, at any hospital whose
    names are known before the run: the patient is left out of the test set, kept, or the run is refused. All are named.
    """

    source: Literal["phantoms", "images", "npz", "csv", "breast_cancer"] = "phantoms"
    classes: tuple[str, ...] = ("normal", "bacterial", "viral")
    image_size: Annotated[int, Field(ge=8, le=1024)] = 32
    channels: Literal[1, 3] = 1
    wrong_size: Literal["error", "resize"] = "error"
    partition: PartitionSection = PartitionSection()
    phantoms: PhantomSection = PhantomSection()
    table: TableSection = TableSection()
    features: FeatureSection | None = None
    subset: SubsetSection = SubsetSection()
    shared_patients: Literal["leave_out", "keep", "refuse"] = "leave_out"
    normalise: Literal["none", "secure", "weights"] = "none"
    normalise_noise_multiplier: Annotated[float, Field(ge=1e-3, le=1e3)] = 8.0

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        if self.normalise == "secure" and self.is_table and self.table.reference_ranges is None:
            raise ValueError("normalise: secure needs public bounds of every feature; set table.reference_ranges")
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must name at least two different classes")
        if self.features is not None and self.is_table:
            raise ValueError("features are those of images; leave data.features null for tables")
        if self.source == "csv" and self.table.features is None:
            raise ValueError("table.features (the number of feature columns) must be set for csv")
        return self

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one record: (channels, height, width) for images, (features,) for tables, (features + 1,) for features
        of images."""
        if self.features is not None:
            return (self.features.size + 1,)
        if self.source == "csv":
            return (self.table.features or 0,)
        if self.source == "breast_cancer":
            return (30,)
        return (self.channels, self.image_size, self.image_size)

    @property
    def is_table(self) -> bool:
        """Whether records are rows of features."""
        return self.source in ("csv", "breast_cancer")


class ModelSection(Section):
    """Architecture: `small_cnn`, `mlp`, `linear` (weights alone, zero at first), `efficientnet_lite0`, `scattering`, or any
    torchvision classifier by name (`resnet18`).

    `initial_weights` (as `mpc-fl model import` prints them) are those of a network trained elsewhere, its last layer aside where
    that has other classes. `normalisation` says what replaces trained BatchNorm: `frozen` keeps its statistics fixed (those of
    `initial_weights`, else calibrated on public synthetic images; free under encryption), `group` uses GroupNorm (costs
    inverse square roots under encryption).
    """

    architecture: str = "small_cnn"
    initial_weights: Digest | None = Field(
        default=None, description="SHA-256 of the file of weights to begin with; null: drawn from the seed"
    )
    normalisation: Literal["frozen", "group"] = "frozen"
    hidden: tuple[Count, ...] = (32, 32)


class TrainingSection(Section):
    """Local training between two aggregations. `batch_size` is the expected number of patients per step (Poisson).

    `strategy` says what becomes of the opened mean: `fedavg` adds the mean update, `fedavgm`, `fedadam` and `fedyogi` step
    along it with momentum or adaptively, `fedsgd` opens every single gradient and steps with `learning_rate` and
    `momentum`. `fedprox` is `fedavg` with a `proximal` term in the local steps, which other strategies may have as well.
    `local_normalisation` (FedBN) leaves parameters and statistics of normalisation layers at each hospital.
    """

    strategy: Strategy | None = Field(
        default=None, description="null: fedavg, or fedsgd with privacy.mechanism distributed"
    )
    rounds: Steps = 5
    local_steps: Steps = 10
    batch_size: Count = 64
    learning_rate: Positive = 0.1
    momentum: Momentum = 0.9
    server_learning_rate: Positive | None = Field(default=None, description="null: 1, or 0.03 for fedadam and fedyogi")
    server_momentum: Momentum | None = Field(default=None, description="null: 0.9 where the strategy has one")
    server_adaptivity: Positive | None = Field(default=None, description="tau of fedadam and fedyogi; null: 1e-3")
    proximal: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    trainable: Annotated[str, Field(pattern="^(all|head|bias|last:[1-9][0-9]{0,3})$")] = Field(
        default="all", description="which parameters are trained: all, head, bias (and the head), or last:N layers"
    )
    average_last: Count | None = Field(
        default=None, description="the final model is the mean of so many last global models; null: the last one"
    )
    local_normalisation: bool = False
    per_sample_gradients: Literal["auto", "vmap", "loop", "hooks"] = "auto"
    sampling_seed: Whole | None = Field(
        default=None,
        description="null draws the secret sampling order from the system; a number is for simulation only",
    )

    @model_validator(mode="after")
    def _check(self) -> TrainingSection:
        name = self.strategy or "fedavg"
        if (name == "fedprox") and not self.proximal:
            raise ValueError("fedprox needs a proximal coefficient above 0")
        if self.proximal and self.strategy in (None, "fedavg"):
            raise ValueError("fedavg with a proximal term is fedprox; set strategy: fedprox")
        if self.proximal and self.local_steps == 1:
            raise ValueError("the first local step has no proximal term; use more local_steps, or proximal: 0")
        if self.proximal * self.learning_rate > 1:
            raise ValueError("proximal * learning_rate must not exceed 1, or every step would overshoot")
        if self.server_momentum is not None and name not in ("fedavgm", "fedadam", "fedyogi"):
            raise ValueError(f"{name} has no server_momentum; use fedavgm, fedadam or fedyogi")
        if self.server_adaptivity is not None and name not in ("fedadam", "fedyogi"):
            raise ValueError(f"{name} has no server_adaptivity; use fedadam or fedyogi")
        return self


class PrivacySection(Section):
    """Differential privacy of each hospital's patients.

    `local`: each hospital adds the full noise itself, once per local step. `distributed`: every step is a secure sum, and
    each hospital adds its part of the noise of that sum, so that it holds against `colluders` hospitals that take out
    theirs.

    Neighbouring data sets differ in one patient, so no hospital's number of patients may set what is released. All of it
    follows from public figures: every hospital has from `smallest_hospital` to `largest_hospital` training patients. Each
    of them is drawn with probability training.batch_size / smallest_hospital (at most 1), wherever the patient is.
    """

    mechanism: Literal["local", "distributed", "none"] = "local"
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
    epsilon: Positive = 8.0
    delta: Annotated[float, Field(ge=1e-30, lt=1)] = 1e-4
    clipping_norm: Positive = 1.0
    noise_multiplier: Annotated[float, Field(ge=1e-12, le=1e6)] | None = Field(
        default=None, description="null calibrates it to epsilon"
    )
    accountant: Literal["pld", "rdp", "prv"] = Field(
        default="pld", description="pld is tight; rdp asks for 6 to 7 % more noise; prv is Opacus's, for comparison"
    )

    @model_validator(mode="after")
    def _check(self) -> PrivacySection:
        smallest, largest = self.smallest_hospital, self.largest_hospital
        if largest is not None and (smallest is None or smallest > largest):
            raise ValueError("largest_hospital needs a smallest_hospital that does not exceed it")
        return self


class EvaluationSection(Section):
    """Evaluation on the test patients of all hospitals together: only sums over hospitals are opened.

    Without `noise_multiplier` their counts are exact, and known to the aggregator: the confusion matrix, histograms of
    predicted probabilities, and what calibration needs. With it the confusion matrix alone is opened, in patients, with
    noise of so many times what one test patient can move; every hospital charges that to its privacy ledger.
    """

    every: Count | None = Field(
        default=None, description="rounds between two evaluations; null: before the first round and after the last one"
    )
    noise_multiplier: Annotated[float, Field(ge=1e-3, le=1e3)] | None = None
