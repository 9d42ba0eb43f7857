"""The configuration of a run: one YAML file, validated, completed with defaults, saved with the run.

Sections follow the protocol: `data`, `model`, `training`, `privacy`, `aggregation`, `inference`, `runtime` are the same
at every party and enter the digest that parties compare at the hand-shake; `federation` says who takes part and where;
`serving` is the model owner's own matter; `site` holds what differs from machine to machine (paths) and never leaves it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mpc_fl.errors import ConfigError

AGGREGATOR, DEALER = "aggregator", "dealer"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Strategy = Literal["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedsgd"]


class Section(BaseModel):
    """A frozen part of the configuration; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


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
    reference_ranges: tuple[tuple[float, float], ...] | None = Field(
        default=None, description="public (low, high) of each feature column, never taken from patients of this run"
    )

    @model_validator(mode="after")
    def _check(self) -> TableSection:
        for low, high in self.reference_ranges or ():
            if not low < high:
                raise ValueError("reference_ranges must be pairs of (low, high) with low < high")
        return self


class SubsetSection(Section):
    """Upper limits on patients per hospital, for short runs; null takes all."""

    train_patients: Count | None = None
    test_patients: Count | None = None


class DataSection(Section):
    """What the data are. `images`: DIR/{train,test}/<class>/ with PNG, JPEG or DICOM files.

    `normalise`: `secure` brings inputs to mean 0 and standard deviation 1 over the training patients of all hospitals, which
    a secure sum before the first round opens. With differential privacy that sum carries noise of its own,
    `normalise_noise_multiplier` times its sensitivity, and every hospital charges it to its ledger.
    """

    source: Literal["phantoms", "images", "npz", "csv", "breast_cancer"] = "phantoms"
    classes: tuple[str, ...] = ("normal", "bacterial", "viral")
    image_size: Annotated[int, Field(ge=8, le=1024)] = 32
    channels: Literal[1, 3] = 1
    wrong_size: Literal["error", "resize"] = "error"
    partition: PartitionSection = PartitionSection()
    phantoms: PhantomSection = PhantomSection()
    table: TableSection = TableSection()
    subset: SubsetSection = SubsetSection()
    normalise: Literal["none", "secure"] = "none"
    normalise_noise_multiplier: Annotated[float, Field(ge=1e-3, le=1e3)] = 8.0

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        if self.normalise == "secure" and self.is_table and self.table.reference_ranges is None:
            raise ValueError("normalise: secure needs public bounds of every feature; set table.reference_ranges")
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must name at least two different classes")
        if self.source == "csv" and self.table.features is None:
            raise ValueError("table.features (the number of feature columns) must be set for csv")
        return self

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one record: (channels, height, width) for images, (features,) for tables."""
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
    """Architecture: `small_cnn`, `mlp`, `resnet18`, or any torchvision classifier by name.

    `normalisation` says what replaces trained BatchNorm: `frozen` keeps its statistics fixed (calibrated on public
    synthetic images; free under encryption), `group` uses GroupNorm (costs inverse square roots under encryption).
    """

    architecture: str = "small_cnn"
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
    rounds: Count = 5
    local_steps: Count = 10
    batch_size: Count = 64
    learning_rate: Positive = 0.1
    momentum: Momentum = 0.9
    server_learning_rate: Positive | None = Field(default=None, description="null: 1, or 0.03 for fedadam and fedyogi")
    server_momentum: Momentum | None = Field(default=None, description="null: 0.9 where the strategy has one")
    server_adaptivity: Positive | None = Field(default=None, description="tau of fedadam and fedyogi; null: 1e-3")
    proximal: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    local_normalisation: bool = False
    per_sample_gradients: Literal["auto", "vmap", "loop", "hooks"] = "auto"
    sampling_seed: int | None = Field(
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
    theirs. All then need one noise multiplier: set it, or `smallest_hospital`, a public lower bound on the training
    patients of every hospital, to have it calibrated.
    """

    mechanism: Literal["local", "distributed", "none"] = "local"
    colluders: Annotated[int, Field(ge=0)] = 1
    smallest_hospital: Count | None = None
    epsilon: Positive = 8.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    clipping_norm: Positive = 1.0
    noise_multiplier: Positive | None = Field(default=None, description="null calibrates it to epsilon")
    accountant: Literal["rdp", "prv"] = "rdp"

    @model_validator(mode="after")
    def _check(self) -> PrivacySection:
        if self.mechanism == "distributed" and self.noise_multiplier is None and self.smallest_hospital is None:
            raise ValueError("distributed noise needs noise_multiplier, or smallest_hospital to calibrate it")
        return self


class AggregationSection(Section):
    """Secure sum of updates. An update's coordinates must lie within `update_bound`, counts within `count_bound`.

    With `norm_check` the L2 norm of each hidden update is held against a bound before anything is opened, on shares and
    with the dealer; what exceeds it is left out. `norm_bound` overrides the bound that follows from clipping and noise.
    """

    fraction_bits: Annotated[int, Field(ge=4, le=40)] = 24
    update_bound: Positive = 64.0
    count_bound: Count = 1 << 20
    weighted: bool = True
    norm_check: bool = False
    norm_bound: Positive | None = Field(
        default=None, description="L2 norm of an update (of a sum of gradients, if noise is distributed); null: derived"
    )


class InferenceSection(Section):
    """Encrypted inference between one hospital and a model owner.

    `engine` fast runs convolutional networks some 50 times faster than reference, which runs all. `reveal` label opens the
    class alone to the hospital (engine fast). `fill` stores as many batches in the parties' pools (site.pool) instead of
    diagnosing; without `dealer` diagnoses come from pools alone and the dealer need not run. `at_once` batches are evaluated
    at the same time (engine fast): more images a second, more memory.
    """

    engine: Literal["reference", "fast"] = "reference"
    reveal: Literal["logits", "label"] = "logits"
    fraction_bits: Annotated[int, Field(ge=8, le=20)] = 16
    batch_size: Count = 1
    at_once: Annotated[int, Field(ge=1, le=16)] = 1
    limit: Count | None = None
    plaintext_reference: bool = False
    logit_bound: Positive = 4096.0
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
    """What a model owner that stays up (`mpc-fl serve`) grants each hospital; no other party needs to know.

    Its dealer has `sessions` and `sessions_per_minute` of its own. `pool_batches` are kept for each hospital (site.pool).

    Batches take turns, round-robin over hospitals, `turns` at once. A turn longer than `patience` seconds keeps others
    waiting no more, and a hospital from which nothing comes for `deadline` seconds has lost its session.
    """

    images_per_day: Count = Field(default=200, description="of one hospital within any 24 hours")
    images_per_minute: Count = Field(default=20, description="of one hospital within any 60 seconds")
    sessions: Count = Field(default=16, description="hospitals that may be connected at once; as many may fill pools")
    sessions_per_minute: Count = Field(default=30, description="that one hospital may begin within any 60 seconds")
    pool_batches: Count = Field(default=100, description="that one hospital may have stored at the model owner")
    turns: Count = 2
    patience: Positive = 15.0
    deadline: Positive = 60.0


class RuntimeSection(Section):
    """Deadlines in seconds, threads per party, bytes of corrections that a dealer may send ahead of need."""

    connect_timeout: Positive = 60.0
    receive_timeout: Positive = 600.0
    threads: Count = 1
    first_port: Annotated[int, Field(ge=1, le=65000)] | None = None
    restarts: Annotated[int, Field(ge=0)] = Field(
        default=0, description="times that a run on this machine starts a lost hospital again, below a full quorum"
    )
    dealer_ahead_bytes: Annotated[int, Field(ge=1 << 20)] = 256 << 20


class FederationSection(Section):
    """Who takes part. `addresses` maps party names to host:port; empty lets the launcher choose on this machine.

    Parties in `dial_out_only` (behind a firewall) have no address; two of them reach each other through `relay`, the
    aggregator unless named otherwise, which passes sealed chunks and can read none.
    """

    hospitals: Annotated[int, Field(ge=2, le=64)] = 3
    quorum: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="fewest hospitals a sum is opened over; null: all, and losing one ends the run"
    )
    round_timeout: Positive | None = Field(
        default=None, description="seconds a hospital may take for its update; null: runtime.receive_timeout"
    )
    evaluate_incomplete: bool = Field(
        default=False,
        description="also open evaluation counts while hospitals are absent: the difference to the others shows theirs",
    )
    session: str = ""
    addresses: dict[str, str] = Field(default_factory=dict)
    dial_out_only: tuple[str, ...] = ()
    relay: str | None = None

    @model_validator(mode="after")
    def _check(self) -> FederationSection:
        if self.quorum is not None and self.quorum > self.hospitals:
            raise ValueError(f"a quorum of {self.quorum} cannot be reached by {self.hospitals} hospitals")
        for name in self.dial_out_only:
            if name in self.addresses:
                raise ValueError(f"{name} is in dial_out_only and has an address; give it only one of them")
            if name == (self.relay or AGGREGATOR):
                raise ValueError(f"{name} is the relay, so others must be able to dial it")
        for name, address in self.addresses.items():
            host, separator, port = address.rpartition(":")
            if not (host and separator and port.isdigit() and 0 < int(port) < 65536):
                raise ValueError(f"the address of {name} must be host:port")
        return self

    @property
    def quorum_size(self) -> int:
        """Fewest hospitals a sum is opened over."""
        return self.hospitals if self.quorum is None else self.quorum


class SiteSection(Section):
    """What only this machine knows. Not part of the digest, never sent.

    `resume` goes on from the last checkpoint in `out`: after a restart of all parties, or of this hospital alone.

    `listen` is the host:port this party serves where that differs from its address in the federation (0.0.0.0:47100).
    `training_processes` share out each step of a hospital's local training, each with `runtime.threads` threads. `pool` is
    where correlations made ahead lie, a directory of its own for each party below.
    """

    listen: str | None = None
    resume: bool = False
    training_processes: Count = 1
    data: Path | None = None
    images: Path | None = None
    model: Path | None = None
    out: Path | None = None
    log: Path | None = None
    identity: Path | None = None
    privacy_ledger: Path | None = None
    pool: Path | None = None


class Config(Section):
    """A complete configuration. Build it with `load_config` or `parse_config`."""

    name: str = "phantoms"
    task: Literal["train", "infer", "serve"] = "train"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    training: TrainingSection = TrainingSection()
    privacy: PrivacySection = PrivacySection()
    aggregation: AggregationSection = AggregationSection()
    inference: InferenceSection = InferenceSection()
    serving: ServingSection = ServingSection()
    runtime: RuntimeSection = RuntimeSection()
    federation: FederationSection = FederationSection()
    site: SiteSection = SiteSection()

    @model_validator(mode="after")
    def _check(self) -> Config:
        training, distributed = self.training, self.privacy.mechanism == "distributed"
        if self.task == "serve" and self.inference.batch_size > min(
            self.serving.images_per_minute, self.serving.images_per_day
        ):
            raise ValueError("inference.batch_size exceeds serving.images_per_minute or images_per_day; lower it")
        if distributed and self.strategy not in ("fedsgd", "fedadam", "fedyogi"):
            raise ValueError(
                f"privacy.mechanism distributed opens every gradient, training.strategy {self.strategy} has none to open; use "
                "fedsgd, fedadam or fedyogi"
            )
        if self.strategy == "fedsgd" and not distributed and training.local_steps != 1:
            raise ValueError("training.strategy fedsgd opens every step; set training.local_steps to 1")
        if self.strategy == "fedsgd" and training.server_learning_rate is not None:
            raise ValueError("fedsgd steps with training.learning_rate; leave training.server_learning_rate null")
        if training.proximal and distributed:
            raise ValueError("privacy.mechanism distributed has no local steps, so training.proximal must be 0")
        if training.local_normalisation and distributed:
            # What stays at a hospital would be trained with a part of the noise only, and shape what is opened later.
            raise ValueError(
                "training.local_normalisation needs the whole noise at each hospital; set privacy.mechanism to local or none"
            )
        if training.local_normalisation and self.model.architecture == "mlp":
            raise ValueError("the mlp has no normalisation layers; set training.local_normalisation to false")
        return self

    @property
    def strategy(self) -> Strategy:
        """The strategy in force: the configured one, else FedSGD with distributed noise and FedAvg without."""
        return self.training.strategy or ("fedsgd" if self.privacy.mechanism == "distributed" else "fedavg")

    def digest(self) -> str:
        """SHA-256 over everything parties must agree on (all but `site`), as hex."""
        shared = self.model_dump(mode="json", exclude={"site", "serving"})
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()

    def run_digest(self) -> str:
        """SHA-256 over what a run computes, as hex: all but where its parties are and how long they wait."""
        places = {"addresses", "session", "dial_out_only", "relay", "round_timeout"}
        shared = self.model_dump(
            mode="json", exclude={"site": True, "serving": True, "runtime": True, "federation": places}
        )
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The complete configuration as YAML that `load_config` reads back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def with_values(self, **sections: dict[str, Any] | str | int) -> Config:
        """A copy with some values replaced: `with_values(site={"out": path}, task="infer")`."""
        values = self.model_dump(mode="json")
        for name, change in sections.items():
            if isinstance(change, dict):
                values[name] = {**values[name], **change}
            else:
                values[name] = change
        return parse_config(values, "the resolved configuration")


def _known_names(path: tuple[Any, ...]) -> list[str]:
    section: type[BaseModel] = Config
    for name in path:
        field = section.model_fields.get(str(name))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        section = field.annotation
    return list(section.model_fields)


def _explain(error: ValidationError, source: str) -> ConfigError:
    first = error.errors()[0]
    path = first["loc"]
    dotted = ".".join(str(part) for part in path)
    if first["type"] == "extra_forbidden":
        known = _known_names(path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.0)
        prefix = ".".join(str(part) for part in path[:-1])
        suggestion = f"{prefix}.{near[0]}" if near and prefix else (near[0] if near else "nothing here")
        return ConfigError(f"{source}: unknown key '{dotted}'", f"the nearest known name is '{suggestion}'")
    message = str(first["msg"]).removeprefix("Value error, ")
    if not path:  # sections that do not go together
        return ConfigError(source, message)
    return ConfigError(f"{source}: '{dotted}' is not valid", f"{message} (got {str(first.get('input'))[:60]!r})")


def parse_config(values: Any, source: str) -> Config:
    """Validate a nested dictionary. `source` names it in errors.

    Raises `ConfigError` with one line that names the key; for an unknown key also the nearest known one.
    """
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: not a mapping of sections", "start from one of the files in configs/")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _explain(error, source) from None


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Apply `a.b=c` settings, values read as YAML. Raises `ConfigError` for a malformed setting."""
    result = json.loads(json.dumps(values, default=str))
    for setting in overrides:
        key, separator, text = setting.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {setting!r} is not of the form a.b=c", "for example --set training.rounds=3")
        *parents, last = key.strip().split(".")
        node = result
        for parent in parents:
            child = node.get(parent)
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"--set {setting!r}: '{parent}' is a value, not a section", "shorten the key")
            node = child
        try:
            # A dot is needed before an exponent in YAML floats; 1e-5 would stay a string, which pydantic parses.
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {setting!r}: the value is not YAML", "quote it") from None
    return result


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read, override and validate a YAML file. Raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read configuration {path}: {reason}", "give the path of a YAML file") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{where}: not valid YAML", "check the indentation and quotes there") from None
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path}: not a mapping of sections", "start from one of the files in configs/")
    return parse_config(apply_overrides(values or {}, overrides or []), str(path))


def party_names(config: Config) -> list[str]:
    """Names of all parties of the configured task, computing parties first in rank order."""
    if config.task == "train":
        hospitals = [f"hospital-{rank}" for rank in range(config.federation.hospitals)]
        return [*hospitals, AGGREGATOR, *([DEALER] if config.aggregation.norm_check else [])]
    if config.task == "serve":  # hospitals come and go
        return [DEALER, "model-owner"]
    return ["hospital-0", "model-owner", *([DEALER] if config.inference.dealer else [])]


def may_lose_hospitals(config: Config) -> bool:
    """Whether a training run goes on when it loses a hospital."""
    return config.task == "train" and config.federation.quorum_size < config.federation.hospitals
