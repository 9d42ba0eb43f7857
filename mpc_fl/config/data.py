"""Sections about the data: what records are, whose they are, and what becomes of them before training.

Each class checks what can be checked within it; what must fit between two sections is checked by `config.Config`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mpc_fl.config.columns import ColumnSection, plain_name
from mpc_fl.config.phantoms import PhantomSection, ShortcutSection
from mpc_fl.config.section import Bound, Count, Digest, Positive, Section
from mpc_fl.errors import ConfigError


class PartitionSection(Section):
    """How one data set is divided over simulated hospitals; a party by itself takes its whole folder (`site.data_of`).

    With `none` each simulated hospital has the whole folder.
    """

    method: Literal["equal", "dirichlet", "none"] = Field(
        default="equal",
        description="equal: as evenly as it goes; dirichlet: other shares of the classes at each; none: all of it at each",
    )
    alpha: Positive = Field(
        default=0.5, description="of method dirichlet: the smaller, the less the hospitals are alike"
    )


class TableSection(Section):
    """Columns of a CSV file. Without `patient_column` every row is one patient.

    `columns` are those that become features, in this order, each by its name: where they stand in a hospital's file does not
    matter, and one that is missing or that nobody agreed on is named. Without them the columns of one file, which is divided
    over simulated hospitals, are `features` numbers in their order there; hospitals with files of their own need `columns`.

    `identifiers` are columns that are left out wherever they stand: numbers of patients and cases, names, remarks.
    """

    label_column: str = Field(default="label", description="column that holds the class of a row")
    patient_column: str | None = Field(
        default=None, description="names a row's patient; null: every row counts by itself, as data.unit image"
    )
    columns: tuple[ColumnSection, ...] | None = Field(
        default=None, description="what all hospitals agreed on: name, kind, unit, range, categories, missing values"
    )
    identifiers: tuple[str, ...] = Field(default=(), description="columns that are never read, at whoever has them")
    features: Count | None = Field(
        default=None, description="number of feature columns of csv without `columns`; of a loader's rows"
    )
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.25, description="share of patients who are kept for tests, where there is no split of their own"
    )
    reference_ranges: tuple[tuple[Bound, Bound], ...] | None = Field(
        default=None, description="public (low, high) of each feature column, never taken from patients of this run"
    )

    @model_validator(mode="after")
    def _check(self) -> TableSection:
        for low, high in self.reference_ranges or ():
            if not low < high:
                raise ValueError("reference_ranges must be pairs of (low, high) with low < high")
        if self.columns == ():
            raise ValueError("columns must name at least one column, or be null")
        if self.columns is not None and (self.features is not None or self.reference_ranges is not None):
            raise ValueError(
                "columns say how many features there are and their ranges; leave features and reference_ranges null"
            )
        own = [self.label_column] if self.patient_column is None else [self.label_column, self.patient_column]
        if self.columns is not None or self.identifiers:
            names = [*own, *self.identifiers, *(column.name for column in self.columns or ())]
            plain = [plain_name(name) for name in names]
            twice = [name for place, name in enumerate(names) if plain[place] in plain[:place]]
            if twice:
                raise ValueError(f"table names the column '{twice[0][:60]}' twice")
        return self

    @property
    def size(self) -> int | None:
        """Features of a row, where the configuration says it."""
        return self.features if self.columns is None else sum(column.size for column in self.columns)

    @property
    def bounded(self) -> bool:
        """Whether public bounds of every feature are known."""
        if self.columns is None:
            return self.reference_ranges is not None
        return all(column.bounded for column in self.columns)


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
# Channels of the blocks of an extractor that `stages` may name; of others `count` says it.
_LITE0_BLOCKS = (16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320)
_RESNET, _BOTTLENECK_RESNET = ({f"layer{n}": c << n for n in range(1, 5)} for c in (32, 128))
STAGE_COUNTS: dict[str, dict[str, int]] = {
    "efficientnet_lite0": {f"features.blocks.{n}": count for n, count in enumerate(_LITE0_BLOCKS)}
    | {"features.last": 1280},
    "resnet18": _RESNET,
    "resnet34": _RESNET,
    "resnet50": _BOTTLENECK_RESNET,
}
# Stored weights that `mpc-fl model fetch` makes of what is published: the same at every site.
FETCHED_WEIGHTS = {"efficientnet_lite0": "8601c9ea396013b30ad83d20fd807105937e97c949ec69c298b121392715d197"}
FEATURE_CONSTANT = 0.1  # stands beside the features of every record, for a network to learn an offset with


# The path of a block within a network: layer3, features.blocks.10
Stage = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.\w+)*$", max_length=100)]


class FeatureSection(Section):
    """Records are features of images, computed in the clear by whoever has the image, with something public.

    `extractor` is `scattering`, which comes from no data, or a network whose `weights` (SHA-256 of the file, as `mpc-fl
    model fetch` and `mpc-fl model import` print it) everybody has: what stands before its last linear layer. The features of
    an image have L2 norm 1; with `mirror` they are the mean of those of the image and of its mirror, again at norm 1.

    `stages` takes blocks of the network by their paths in it (`features.blocks.10` of `efficientnet_lite0`, `layer3` of
    `resnet18`): the average of each one's output over all pixels, at norm 1, one beside the other, at norm 1 again.
    """

    extractor: str = Field(
        default="efficientnet_lite0",
        description="what computes the features: scattering, or a network whose weights everybody has",
    )
    weights: Digest | None = Field(
        default=None,
        description="SHA-256 of the extractor's weights, as mpc-fl model fetch prints it; null: of scattering, which has none",
    )
    mirror: bool = Field(
        default=True, description="take the mean of the features of an image and of its mirror image; twice the work"
    )
    stages: Annotated[tuple[Stage, ...], Field(max_length=32)] = Field(
        default=(), description="blocks whose averages are joined; empty: what stands before the last linear layer"
    )
    count: Count | None = Field(default=None, description="number of features; null: known of the extractor")

    @model_validator(mode="after")
    def _check(self) -> FeatureSection:
        if (self.weights is None) != (self.extractor == "scattering"):
            raise ValueError("scattering has no weights, and every other extractor needs them (`mpc-fl model --help`)")
        if self.stages and self.extractor == "scattering":
            raise ValueError("scattering has no stages; leave data.features.stages empty")
        if len(set(self.stages)) != len(self.stages):
            raise ValueError("data.features.stages names a block twice")
        known = self._known
        if known is None and self.count is None:
            of = (
                f"blocks {', '.join(self.stages)} of '{self.extractor}' give"
                if self.stages
                else f"'{self.extractor}' gives"
            )
            raise ValueError(f"set data.features.count: how many features {of} is not known here")
        if known is not None and self.count not in (None, known):
            what = "these stages give" if self.stages else f"{self.extractor} gives"
            raise ValueError(f"{what} {known} features; leave data.features.count null")
        return self

    @property
    def _known(self) -> int | None:
        """Features of one image, where that is known of the extractor."""
        if not self.stages:
            return FEATURE_COUNTS.get(self.extractor)
        counts = STAGE_COUNTS.get(self.extractor, {})
        return sum(counts[stage] for stage in self.stages) if set(self.stages) <= set(counts) else None

    @property
    def size(self) -> int:
        """Features of one image."""
        size = self.count or self._known
        assert size is not None  # `_check` saw to it
        return size

    def described(self) -> dict[str, Any]:
        """As a model file says it, ready for JSON; without `stages` where there are none, as files had it before them."""
        values = self.model_dump(mode="json")
        return values if self.stages else {name: value for name, value in values.items() if name != "stages"}


class SubsetSection(Section):
    """Upper limits on patients per hospital, for short runs; null takes all. Who validates is one of the training patients.

    With a privacy mechanism they are for phantoms alone: a set of fixed size has another patient in the place of who is removed.
    """

    train_patients: Count | None = Field(default=None, description="patients who train, of each hospital at most")
    test_patients: Count | None = Field(default=None, description="patients of the tests, of each hospital at most")


_LONGEST_CLASS = 100
_AGREE = "each hospital has a file of its own, whose columns may stand in another order; all must agree on data.table.columns"
SOURCES = ("phantoms", "images", "npz", "csv", "breast_cancer")  # of this program
# Names of the public chest X-rays of Kermany et al. (Cell 2018): person12_bacteria_3.jpeg, NORMAL2-IM-0123-0001.jpeg. The same
# person in two classes counts as one patient, the safe reading.
KERMANY_NAMES = r"(person\d+|(?:NORMAL2-)?IM-\d+)[-_.]"


class DataSection(Section):
    """What the data are. `images`: `DIR/{train,test}/<class>/` with DICOM, PNG, JPEG, TIFF and other image files.

    `unit` is what privacy is counted by, and what keeps records together. Whose an image is says DIR/patients.csv, else the
    header of a DICOM file, else `patient_pattern`, a regular expression for the beginning of a file's name, whose first group is
    the patient. Records of which nothing says it are refused, unless `unit` is `image`: then each counts by itself, and so does
    every claim of privacy.

    `wrong_size: resize` brings images to `image_size`; `not_square` says how one becomes a square: with black beside it (`pad`),
    its middle alone (`crop`), or distorted (`stretch`). `frame` says which of several frames of a file is taken. A class of which
    more than the share `most_unreadable` of a hospital's files cannot be read stops that hospital.

    `source` is one of `SOURCES`, or the name of a loader that an installed package announces (`learning/data/loaders.py`).

    `normalise`: `secure` brings inputs to mean 0 and standard deviation 1 over the training patients of all hospitals, which
    a secure sum before the first round opens. With differential privacy that sum carries noise of its own,
    `normalise_noise_multiplier` times its sensitivity, and every hospital charges it to its ledger.

    `features`: records are features of the images instead of the images, `features.size` numbers and a constant. There
    `normalise: secure` takes the mean over patients off them, and brings them to norm 1 again.

    `normalise: weights` scales inputs as the weights expect it that the network begins with (`model.initial_weights`).

    `validation_fraction` of the training patients are kept aside from training, to choose a model by. A hash of the patient's
    name says who: the same ones at every hospital and in every run, whoever else there is.

    `shared_patients` says what becomes of a test patient who is by name also a training patient, at any hospital whose
    names are known before the run: the patient is left out of the test set, kept, or the run is refused. All are named.
    """

    source: Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$", max_length=60)] = Field(
        default="phantoms",
        description="where records come from: images, npz, csv, phantoms, breast_cancer, or the name of an installed loader",
    )
    classes: tuple[str, ...] = Field(
        default=("normal", "bacterial", "viral"),
        description="names of the classes, in the order of the outputs; folders of images are called so",
    )
    image_size: Annotated[int, Field(ge=8, le=1024)] = Field(default=32, description="pixels of each side of an image")
    channels: Literal[1, 3] = Field(default=1, description="channels of an image, 1: grey, 3: colour")
    wrong_size: Literal["error", "resize"] = Field(
        default="error", description="what becomes of an image of another size"
    )
    not_square: Literal["pad", "crop", "stretch"] = Field(
        default="pad", description="how a film becomes a square: black beside it, its middle alone, or distorted"
    )
    frame: Literal["error", "first", "middle"] = Field(
        default="error", description="which of several frames or slices of a file is taken"
    )
    most_unreadable: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="share of the files of a class that may be unreadable"
    )
    unit: Literal["patient", "image"] = Field(
        default="patient", description="what privacy is counted by; image: records of unknown patients count one by one"
    )
    patient_pattern: str | None = Field(
        default=KERMANY_NAMES,
        description="beginning of a file's name, whose first group is the patient; the default knows the public X-rays",
    )
    partition: PartitionSection = PartitionSection()
    phantoms: PhantomSection = PhantomSection()
    table: TableSection = TableSection()
    features: FeatureSection | None = None
    subset: SubsetSection = SubsetSection()
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="share of the training patients who are kept aside, to choose and calibrate the model by",
    )
    shared_patients: Literal["leave_out", "keep", "refuse"] = Field(
        default="leave_out",
        description="what becomes of a test patient who also trains: left out of the tests, kept there, or the run is refused",
    )
    normalise: Literal["none", "secure", "weights"] = Field(
        default="none",
        description="how records are scaled: not at all, by a secure sum over all hospitals, or as initial_weights expect",
    )
    normalise_noise_multiplier: Annotated[float, Field(ge=1e-3, le=1e3)] = Field(
        default=8.0,
        description="noise of that secure sum, over what one patient can move; charged to the privacy ledger",
    )

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        if self.normalise == "secure" and self.is_table and not self.table.bounded:
            raise ValueError(
                "normalise: secure needs public bounds of every feature; set the range of each of table.columns, or "
                "table.reference_ranges"
            )
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must name at least two different classes")
        for name in self.classes:
            if not name.strip() or not name.isprintable() or len(name) > _LONGEST_CLASS:
                raise ValueError("a class has a short name of letters that can be seen")
            # It is that of a folder below DIR: who writes the configuration does not choose another place at a hospital.
            if self.source == "images" and (name.startswith(".") or "/" in name or "\\" in name):
                raise ValueError(f"class '{name}' is no name of a folder within DIR/train: no dot first, no slash")
        if self.patient_pattern is not None:
            try:
                groups = re.compile(self.patient_pattern).groups
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"patient_pattern is no regular expression: {error}") from None
            if groups < 1:
                raise ValueError("patient_pattern needs a group (in brackets) that is the patient")
        if self.features is not None and self.is_table:
            raise ValueError("features are those of images; leave data.features null for tables")
        if self.phantoms.shortcut != ShortcutSection():
            if self.source != "phantoms":
                raise ValueError("phantoms.shortcut is put into phantoms alone; leave it as it is")
            if self.phantoms.shortcut.diagnosis >= len(self.classes):
                raise ValueError("phantoms.shortcut.diagnosis is the number of one of data.classes, from 0 on")
        self._check_table()
        return self

    def _check_table(self) -> None:
        table = self.table
        if self.source != "csv" and (table.columns is not None or table.identifiers):
            raise ValueError("table.columns and table.identifiers are those of csv")
        if self.source == "csv" and table.size is None:
            raise ValueError(
                "csv needs table.columns; or table.features, the number of columns of the one file that is divided"
            )
        if self.source == "csv" and table.columns is None and self.partition.method == "none":
            raise ValueError(f"partition.method none: {_AGREE}")

    def require_agreed_columns(self) -> None:
        """Raise `ConfigError` where columns of a hospital's own file would be read in their order there."""
        if self.source == "csv" and self.table.columns is None:
            raise ConfigError(
                f"data.table.columns is not set: {_AGREE}", "name them, as `mpc-fl init` does (docs/data.md)"
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one record: (channels, height, width) for images, (features,) for tables, (features + 1,) for features
        of images."""
        if self.features is not None:
            return (self.features.size + 1,)
        if self.is_table and self.source != "breast_cancer":
            return (self.table.size or 0,)
        if self.source == "breast_cancer":
            return (30,)
        return (self.channels, self.image_size, self.image_size)

    @property
    def counted_unit(self) -> str:
        """What privacy is counted by, in a word: patient, or where nothing says whose they are image or record."""
        return "record" if self.unit == "image" and self.is_table else self.unit

    @property
    def is_table(self) -> bool:
        """Whether records are rows of features."""
        loaded = self.source not in SOURCES and self.table.features is not None
        return self.source in ("csv", "breast_cancer") or loaded
