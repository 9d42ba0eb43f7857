"""The configuration of a run: one YAML file, validated, completed with defaults, saved with the run.

Sections follow the protocol: `data`, `model`, `training`, `privacy`, `evaluation`, `aggregation`, `inference`, `runtime` are
the same at every party and enter the digest that parties compare at the hand-shake; `federation` says who takes part and
where; `serving` is the model owner's own matter; `site` holds what differs from machine to machine (paths) and never leaves it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from mpc_fl.config.data import DataSection
from mpc_fl.config.deployment import MOST_HOSPITALS, FederationSection, RuntimeSection, SiteSection
from mpc_fl.config.evaluation import Evaluated, EvaluationSection
from mpc_fl.config.mistakes import explained
from mpc_fl.config.privacy import PrivacySection
from mpc_fl.config.protocols import (
    MASKS_BETWEEN_ALL_UP_TO,
    AggregationSection,
    InferenceSection,
    Reveal,
    ServingSection,
)
from mpc_fl.config.relays import relays_among_peers, require_relays
from mpc_fl.config.section import Section, Strategy
from mpc_fl.config.training import ModelSection, TrainingSection
from mpc_fl.errors import ConfigError
from mpc_fl.roles import AGGREGATOR, DEALER, HOSPITAL, MODEL_OWNER, hospital_names

_SECONDS_PER_LINK = 0.02
_SOURCES_WITH_ATTRIBUTES = ("images", "csv", "phantoms")
_FEWEST_PEERS = 3


class Config(Section):
    """All that a run follows: what is learned from what, under which promise, by whom, and where."""

    name: str = Field(default="phantoms", description="name of the run, in reports and privacy ledgers")
    task: Literal["train", "simulate", "infer", "serve"] = Field(
        default="train",
        description="set by the command: training, a simulation of it, one diagnosis, or a model owner that stays up",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="public; first weights and phantoms are drawn from it, never shares, masks or noise"
    )
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    training: TrainingSection = TrainingSection()
    privacy: PrivacySection = PrivacySection()
    evaluation: EvaluationSection = EvaluationSection()
    aggregation: AggregationSection = AggregationSection()
    inference: InferenceSection = InferenceSection()
    serving: ServingSection = ServingSection()
    runtime: RuntimeSection = RuntimeSection()
    federation: FederationSection = FederationSection()
    site: SiteSection = SiteSection()

    @model_validator(mode="after")
    def _check(self) -> Config:
        training, distributed = self.training, self.privacy.mechanism == "distributed"
        if self.task in ("train", "serve") and self.federation.hospitals > MOST_HOSPITALS:
            raise ValueError(
                f"a federation has at most {MOST_HOSPITALS} hospitals, and federation.hospitals is {self.federation.hospitals}; "
                "mpc-fl simulate takes more"
            )
        if self.task == "serve" and self.inference.batch_size > self.serving.largest_batch:
            raise ValueError(
                "inference.batch_size exceeds serving.images_per_minute or images_per_day, or that of all; lower it"
            )
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
        if training.local_normalisation and self.model.architecture in ("mlp", "linear"):
            raise ValueError(
                f"the {self.model.architecture} has no normalisation layers; set training.local_normalisation to false"
            )
        if training.average_last is not None and training.average_last > self.global_models:
            raise ValueError(
                f"a run has {self.global_models} global models; set training.average_last to no more than that"
            )
        if distributed and self.site.precision != "float32":
            # A patient's rounded gradient must come out the same whoever else is drawn: shown for float32 alone.
            raise ValueError("privacy.mechanism distributed needs gradients in float32; set site.precision to float32")
        self._check_recipe()
        if self.aggregation.mask_neighbours == "all" and self.federation.hospitals <= MASKS_BETWEEN_ALL_UP_TO:
            raise ValueError(
                f"up to {MASKS_BETWEEN_ALL_UP_TO} hospitals share masks with all others anyway; leave aggregation.mask_neighbours "
                "at auto"
            )
        if self.data.normalise == "weights" and self.model.initial_weights is None:
            raise ValueError("data.normalise weights takes constants from model.initial_weights, which is not set")
        if self.data.features is not None and self.model.architecture not in ("mlp", "linear"):
            raise ValueError("features are rows of numbers; set model.architecture to linear or mlp")
        if self.inference.public_features not in (None, self.data.features is not None):
            raise ValueError(
                "inference.public_features follows from data.features: set both, or neither, or leave the former null"
            )
        if not (self.data.features or self.training.computes_frozen_part_once) and self.site.feature_cache != "memory":
            raise ValueError("site.feature_cache keeps data.features, or what head or last:N reads; leave it at memory")
        if self.evaluation.noise_multiplier is not None and self.privacy.mechanism == "none":
            raise ValueError(
                "evaluation.noise_multiplier is charged to a budget; set privacy.mechanism, or leave it null"
            )
        if self.evaluation.groups.recorded and self.data.source not in _SOURCES_WITH_ATTRIBUTES:
            raise ValueError(
                f"data.source {self.data.source} says no sex, age or scanner of a record; leave evaluation.groups to site, or "
                f"use {', '.join(_SOURCES_WITH_ATTRIBUTES)}"
            )
        _require_parties(self.federation)
        return self

    @model_validator(mode="after")
    def _check_peers(self) -> Config:
        """What a run without an aggregator needs, and what it cannot do yet."""
        federation = self.federation
        if self.site.leave_after is not None and federation.coordinator == AGGREGATOR:
            raise ValueError(
                "site.leave_after is for runs without an aggregator; leave it null, or set federation.coordinator to none"
            )
        if federation.coordinator == AGGREGATOR and (federation.founders, federation.admission) != (None, "all"):
            raise ValueError(
                "federation.founders and federation.admission are for runs without an aggregator; with one all may join: "
                "leave both as they are"
            )
        if not self.trains or federation.coordinator == AGGREGATOR:
            return self
        _require_founders(federation)
        least = max(_FEWEST_PEERS, federation.hospitals // 2 + 1)
        if federation.quorum_size < least:
            # All learn a sum, so of two each would learn the other's; and two halves must not go on apart.
            raise ValueError(
                f"without a coordinator a sum needs {_FEWEST_PEERS} hospitals, and more than half of all; set federation.quorum to "
                f"{least} or more, or federation.coordinator to aggregator"
            )
        colluders = self.privacy.colluders or 0
        if 2 * federation.quorum_size - federation.hospitals <= colluders:
            # Of two quorums one hospital in both must be honest: else two sets open under one label, and the ledger forks.
            raise ValueError(
                f"without a coordinator any two quorums need more hospitals in common than privacy.colluders={colluders}; set "
                f"federation.quorum to {(federation.hospitals + colluders) // 2 + 1} or more, or lower privacy.colluders"
            )
        require_relays(federation, self.runtime)
        return self

    @model_validator(mode="after")
    def _check_validation(self) -> Config:
        evaluation, mechanism = self.evaluation, self.privacy.mechanism
        if not self.data.validation_fraction:
            if evaluation.asks_for_validation:
                raise ValueError(
                    "without validation patients there is nothing to choose, calibrate or judge trials by; set "
                    "data.validation_fraction, or leave evaluation.choose, calibrate, criterion, validate_every, "
                    "public_validation and test as they are"
                )
            return self
        if evaluation.public_validation and mechanism == "none":
            raise ValueError("evaluation.public_validation says whom privacy.mechanism need not protect; there is none")
        if mechanism != "none" and evaluation.noise_multiplier is None and not evaluation.public_validation:
            raise ValueError(
                "validation would open exact counts of patients whom privacy.mechanism protects; set "
                "evaluation.noise_multiplier, or evaluation.public_validation where they need no protection"
            )
        if (evaluation.validate_every or 1) > self.training.rounds:
            raise ValueError("evaluation.validate_every exceeds training.rounds")
        if evaluation.chooses and self.training.local_normalisation:
            raise ValueError(
                "with training.local_normalisation each hospital has a model of its own; set evaluation.choose to last and "
                "evaluation.calibrate to none"
            )
        return self

    def _check_recipe(self) -> None:
        """What `training` has of recipes must have an effect."""
        training, distributed = self.training, self.privacy.mechanism == "distributed"
        if training.augmentation.varies and (self.data.is_table or self.data.features is not None):
            raise ValueError("training.augmentation is for images that are records; features and tables have none")
        if training.keep_momentum and (distributed or self.strategy == "fedsgd"):
            raise ValueError(
                "the aggregator has the momentum, over all rounds, where every gradient is opened; set "
                "training.keep_momentum to false"
            )
        if training.class_weights is not None and len(training.class_weights) != len(self.data.classes):
            raise ValueError("training.class_weights must have one number for each of data.classes")
        if training.gradient_clipping is not None and self.privacy.mechanism != "none":
            raise ValueError(
                "with a privacy mechanism each patient's gradient is clipped to privacy.clipping_norm; leave "
                "training.gradient_clipping null"
            )
        if self.model.weight_standardisation and self.training.trainable.startswith("lora"):
            raise ValueError("adapters stand beside plain weights; set model.weight_standardisation to false")
        if self.model.weight_standardisation and self.model.architecture in ("mlp", "linear", "scattering"):
            raise ValueError(
                f"{self.model.architecture} has no trained convolutions; set model.weight_standardisation to false"
            )

    @property
    def trains(self) -> bool:
        """Whether the task is training, by parties of their own or simulated."""
        return self.task in ("train", "simulate")

    @property
    def among_peers(self) -> bool:
        """Whether hospitals train by themselves, without an aggregator."""
        return self.federation.coordinator == "none"

    @property
    def counts_patients(self) -> bool:
        """Whether the exact number of patients of all hospitals is opened, and updates are weighted by their own."""
        return self.privacy.mechanism == "none" and self.aggregation.weighted is not False

    @property
    def last_round(self) -> int:
        """The number of the run's last round: of training, or the one after it that chooses and calibrates the model."""
        return self.training.rounds + int(self.evaluation.chooses)

    def evaluates(self, number: int, whom: Evaluated = "test") -> bool:
        """Whether sums of evaluation are opened after round `number`, 0 for before the first one."""
        if whom == "validation":
            return bool(self.data.validation_fraction) and self.evaluation.validates(number, self.training.rounds)
        every = self.evaluation.every
        due = number in (0, self.last_round) or (every is not None and number % every == 0)
        return self.evaluation.test and due

    def evaluates_groups(self, number: int) -> bool:
        """Whether test patients are evaluated in groups after round `number`: of the final model alone."""
        return bool(self.evaluation.groups.attributes) and number == self.last_round and self.evaluates(number)

    def evaluation_noise(self, whom: Evaluated) -> float | None:
        """The noise multiplier of sums about these patients; None where they are exact."""
        return None if whom == "validation" and self.evaluation.public_validation else self.evaluation.noise_multiplier

    @property
    def strategy(self) -> Strategy:
        """The strategy in force: the configured one, else FedSGD with distributed noise and FedAvg without."""
        return self.training.strategy or ("fedsgd" if self.privacy.mechanism == "distributed" else "fedavg")

    @property
    def keeps_momentum(self) -> bool:
        """Whether a hospital's momentum lasts over rounds: as configured, else with local noise, where there is any."""
        training = self.training
        if training.keep_momentum is None:
            return self.privacy.mechanism == "local" and self.strategy != "fedsgd" and training.momentum > 0
        return training.keep_momentum

    @property
    def global_models(self) -> int:
        """How many global models a run makes: one after every sum of updates or gradients."""
        steps = self.training.local_steps if self.privacy.mechanism == "distributed" else 1
        return self.training.rounds * steps

    @property
    def noise_colluders(self) -> int:
        """How many hospitals may take their own part out of distributed noise: at least one, which knows its part."""
        return 1 if self.privacy.colluders is None else max(1, self.privacy.colluders)

    def absent_noise(self, quorum: int | None = None) -> int:
        """Of how many hospitals the noise may not be in a sum over `quorum` of them, `federation.quorum` by default: colluders and
        the missing. With `local` noise nobody relies on anybody else's; without noise there is none to be missing.
        """
        hospitals = self.federation.hospitals
        missing = hospitals - (self.federation.quorum_size if quorum is None else quorum)
        return {"none": 0, "local": hospitals - 1, "distributed": self.noise_colluders + missing}[
            self.privacy.mechanism
        ]

    @property
    def reveal(self) -> Reveal:
        """What a diagnosis opens to the hospital: what is configured; else the label alone where a model owner serves.

        A model owner of one diagnosis (`mpc-fl infer`, `mpc-fl party`) starts it by hand, for one hospital, and has compared
        the configuration with it: there null means logits, which either engine opens.
        """
        return self.inference.reveal or ("label" if self.task == "serve" else "logits")

    def digest(self) -> str:
        """SHA-256 over everything parties must agree on (all but `site` and `serving`), as hex."""
        shared = self.model_dump(mode="json", exclude={"site", "serving"})
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()

    def settings_of_run(self) -> dict[str, Any]:
        """What a run computes, as JSON can hold it: all settings but where its parties are, their names and their patience.

        `continuing` says with which others a run may go on.
        """
        places = {"addresses", "session", "dial_out_only", "relay", "round_timeout", "names"}
        return self.model_dump(
            mode="json", exclude={"site": True, "serving": True, "runtime": True, "federation": places}
        )

    def to_yaml(self) -> str:
        """The complete configuration as YAML that `loading.load_config` reads back to an equal object, but for what no file may
        say (`site.allow_packages`, `site.mlflow_uri`, `site.record_patients`)."""
        unsaid = {"site": {"allow_packages", "mlflow_uri", "record_patients"}}
        return yaml.safe_dump(self.model_dump(mode="json", exclude=unsaid), sort_keys=False)

    def with_values(self, **sections: dict[str, Any] | str | int) -> Config:
        """A copy with some values replaced: `with_values(site={"out": path}, task="infer")`. Raises `ConfigError`."""
        values = self.model_dump(mode="json")
        for name, change in sections.items():
            if isinstance(change, dict):
                values[name] = {**values[name], **change}
            else:
                values[name] = change
        return parse_config(values, "the resolved configuration")


def _require_parties(federation: FederationSection) -> None:
    """Every party that a federation gives an address or a relay is one. Raises `ValueError` naming the nearest."""
    leads = [AGGREGATOR] if federation.coordinator == AGGREGATOR else []
    known = [*hospital_names(federation.hospitals), *leads, HOSPITAL, MODEL_OWNER, DEALER]
    named = [*federation.addresses, *federation.names, *federation.dial_out_only, *federation.named_relays]
    for name in named:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"federation names a party '{name[:60]}', and there is none with federation.hospitals: {federation.hospitals}; "
                f"the nearest known name is '{nearest}'"
            )


def _require_founders(federation: FederationSection) -> None:
    """Founders can begin a run, and who is admitted by name is none of them. Raises `ValueError`."""
    founders = federation.founding
    if not federation.quorum_size <= len(founders) <= federation.hospitals:
        raise ValueError(
            f"{len(founders)} founders must be a quorum ({federation.quorum_size}) and no more than federation.hospitals "
            f"({federation.hospitals}); set federation.founders or federation.quorum"
        )
    if isinstance(federation.admission, str):
        return
    later = [name for name in hospital_names(federation.hospitals) if name not in founders]
    for name in federation.admission:
        if name not in later:
            raise ValueError(
                f"federation.admission names '{name[:60]}', which does not join later; who does: {', '.join(later) or 'nobody'}"
            )


def relays_of(config: Config) -> tuple[str, ...]:
    """Who passes on what parties say that can only dial out: the aggregator, or hospitals, unless named."""
    federation = config.federation
    if config.trains and config.among_peers:
        return relays_among_peers(federation)
    return federation.named_relays or ((AGGREGATOR,) if config.trains else ())


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
        raise explained(Config, error, source) from None


def party_names(config: Config) -> list[str]:
    """Names of all parties of the configured task, computing parties first in rank order."""
    if config.trains:
        hospitals = hospital_names(config.federation.hospitals)
        return hospitals if config.among_peers else [*hospitals, AGGREGATOR]
    if config.task == "serve":  # hospitals come and go
        return [DEALER, MODEL_OWNER]
    return [HOSPITAL, MODEL_OWNER, *([DEALER] if config.inference.dealer else [])]


def may_lose_hospitals(config: Config) -> bool:
    """Whether a training run goes on when it loses a hospital."""
    return config.task == "train" and config.federation.quorum_size < config.federation.hospitals


def connect_seconds(config: Config) -> float:
    """Seconds until all parties must be there: `runtime.connect_timeout`, and what greetings may take."""
    return config.runtime.connect_timeout + greeting_seconds(config)


def greeting_seconds(config: Config) -> float:
    """Seconds that all greetings together may take: 20 ms for each pair of parties. So long may one be silent meanwhile.

    A link costs its two ends 12 to 18 ms of processor time together (`benchmarks/connecting.py`), which all parties may take from
    the same two cores: 65 of them have 2,080 links.
    """
    parties = len(party_names(config))
    return _SECONDS_PER_LINK * parties * (parties - 1) / 2
