"""What a hospital has over the rounds of a run: its patients, its model, what is spent of their privacy, its own seeds."""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.config.evaluation import Evaluated
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ConfigError, ModelError
from mpc_fl.federation.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mpc_fl.federation.continuation import ends_before, require_room_for_rounds
from mpc_fl.federation.global_model import calibrate_own, initial_model
from mpc_fl.federation.model_digests import ModelDigests
from mpc_fl.federation.planning import (
    NOTHING_DONE,
    Done,
    budget_of,
    calibration_run_name,
    evaluation_run_name,
    features_run_name,
    groups_run_name,
    headroom_of,
    mechanism_of,
    plan_release,
    run_name,
    sample_rate_of,
    validation_run_name,
)
from mpc_fl.learning.data.dataset import Dataset, PatientRecords
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.data.tables import Part
from mpc_fl.learning.device import CPU, Device, device_of, on_device, repeatable
from mpc_fl.learning.models.batch_norm import load_normalisation_state, normalisation_state
from mpc_fl.learning.models.calibration import Calibration
from mpc_fl.learning.models.evaluation import Evaluation, require_evaluation_headroom
from mpc_fl.learning.models.parameters import flatten_parameters, join_parts, load_flat_parameters, shared_coordinates
from mpc_fl.learning.privacy.accounting import PrivacyBudget, SubsampledGaussian
from mpc_fl.learning.privacy.distributed_gaussian import DistributedGaussian
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.learning.training.dp_sgd import LocalTraining
from mpc_fl.learning.training.frozen_part import (
    FrozenOutputs,
    frozen_outputs_of,
    trained_part_and_records,
    trained_part_of,
)
from mpc_fl.learning.training.independent_records import require_independent_records
from mpc_fl.learning.training.per_sample_gradients import (
    Method,
    choose_per_sample_method,
    require_gradients_of_each,
    working_copy,
)
from mpc_fl.learning.training.process_group import TrainingGroup
from mpc_fl.roles import hospital_name

_VELOCITY = "momentum of local steps"  # in a checkpoint, beside normalisation layers by their names


@dataclass
class Hospital:
    """One hospital's state over the rounds. Everything here stays at this site."""

    config: Config
    name: str
    rank: int
    model: nn.Module
    train: Dataset
    test: Dataset
    ledger: PrivacyLedger
    budget: PrivacyBudget
    noise_multiplier: float | None
    sample_rate: float
    coordinates: torch.Tensor
    method: Method | None = None
    group: TrainingGroup | None = None
    device: Device = CPU
    mechanism: DistributedGaussian | None = None
    normalisation: Normalisation | None = None
    validation: Dataset | None = None
    calibration: Calibration | None = None  # of the final model, once it is fitted
    digests: ModelDigests = field(default_factory=ModelDigests)
    ends: tuple[int, ...] = ()  # after which rounds the run was complete before it was given more
    heaviest: int | None = None  # what it may weigh at most, where it is not in the opened number of patients
    kept_round: int = -1  # of the last checkpoint that it goes on from, -1 without one
    velocity: torch.Tensor | None = None  # the momentum of its last round, where it is kept
    frozen_outputs: FrozenOutputs | None = None  # where steps pass through the trained part alone
    noise_seed: Seed = field(default_factory=Seed.from_system)

    @property
    def sampling_seed(self) -> int | None:
        """Secret and fresh by default; a number in simulations, different at each hospital."""
        seed = self.config.training.sampling_seed
        return None if seed is None else seed * 1000 + self.rank

    @property
    def weight(self) -> int:
        """Its number of patients, or as much of it as fits beside those that were counted without it."""
        count = self.train.patient_count
        return count if self.heaviest is None else min(count, self.heaviest)

    @property
    def local_training(self) -> LocalTraining:
        """How it trains in every round."""
        config, noise, rate = self.config, self.noise_multiplier, self.sample_rate
        of_steps = (self.sampling_seed, self.method, self.group, self.velocity, self.device)
        return LocalTraining(config, noise, rate, *of_steps)

    @property
    def trained_network(self) -> nn.Module:
        """What its steps pass through: the network, or its trained part alone."""
        return self.model if self.frozen_outputs is None else trained_part_of(self.model)

    def trained(self) -> tuple[nn.Module, PatientRecords]:
        """What its steps pass through, and its training records as that reads them. Raises `ModelError` where the part before
        the trained one is not what it was."""
        if self.frozen_outputs is None:
            return self.model, self.train
        return trained_part_and_records(self.model, self.train, self.frozen_outputs)

    @property
    def shared_parameters(self) -> torch.Tensor:
        """What all hospitals have in common, float32 (S,)."""
        return flatten_parameters(self.model)[self.coordinates]

    def take_global(self, shared: torch.Tensor) -> None:
        """Put what the aggregator sent beside this hospital's own parameters, float32 (S,)."""
        load_flat_parameters(self.model, join_parts(shared, flatten_parameters(self.model), self.coordinates))
        calibrate_own(self.model, self.train.inputs, self.config)

    def normalise(self, normalisation: Normalisation) -> None:
        """Bring this hospital's inputs to the common mean and deviation, once."""
        if self.normalisation is None:
            self.train = replace(self.train, inputs=normalisation.apply(self.train.inputs))
            self.test = replace(self.test, inputs=normalisation.apply(self.test.inputs))
            if self.validation is not None:
                self.validation = replace(self.validation, inputs=normalisation.apply(self.validation.inputs))
            self.normalisation = normalisation

    @property
    def parts(self) -> dict[Part, Dataset]:
        """Its patients by what they are for."""
        found: dict[Part, Dataset] = {"train": self.train, "test": self.test}
        return found if self.validation is None else {**found, "validation": self.validation}

    @property
    def skipped_files(self) -> int:
        """Files that could not be read."""
        return sum(of.skipped for of in self.parts.values())

    @property
    def treatments(self) -> dict[str, int]:
        """To how many of its images was done what."""
        return dict(sum((Counter(of.treatments) for of in self.parts.values()), Counter[str]()))

    @property
    def left_aside(self) -> dict[str, int]:
        """What lies beside its records and is none; who validate lie among those who train."""
        return dict(Counter(self.train.left_aside) + Counter(self.test.left_aside))

    def records_of(self, whom: Evaluated) -> Dataset:
        """What it evaluates on. Raises `ConfigError` where no patient is kept aside to validate."""
        if whom == "test":
            return self.test
        if self.validation is None:
            raise ConfigError(f"{self.name} has no validation patients", "set data.validation_fraction")
        return self.validation

    def epsilon(self) -> float | None:
        """Epsilon spent on these patients so far, all runs in the ledger together; None where none holds any more."""
        if self.config.privacy.mechanism == "none":
            return None
        epsilon = self.ledger.epsilon(self.budget.delta, self.budget.accountant)
        return epsilon if math.isfinite(epsilon) else None

    def metrics(self, number: int, own: Evaluation, seconds: Mapping[str, float]) -> dict[str, Any]:
        """This site's own line about round `number`, which never leaves it: of a round without training, which puts its own
        figures in place."""
        return {
            "round": number,
            "loss": None,
            "epsilon": self.epsilon(),
            "noise_multiplier": self.noise_multiplier,
            "clipped_fraction": None,
            "steps": 0,
            "method": self.method,
            "own_accuracy": own.accuracy if own.records else None,
            "own_records": own.records,
            "patients": {part: of.patient_count for part, of in self.parts.items()},
            "records": {part: len(of) for part, of in self.parts.items()},
            "class_counts": {part: of.class_counts(len(self.config.data.classes)) for part, of in self.parts.items()},
            "skipped_files": self.skipped_files,
            "left_aside": self.left_aside,
            "treatments": self.treatments,
            "seconds": dict(seconds),
        }

    def releasing(self, round_number: int) -> Callable[[], None]:
        """What enters into the privacy ledger that something of the patients leaves now, before its first byte does."""
        if self.config.privacy.mechanism != "none":
            return self.ledger.release
        run = run_name(self.config)
        return functools.partial(self.ledger.charge_unprotected, run=run, round_number=round_number)

    def checkpoint(self, directory: Path, number: int) -> None:
        """Keep what is this hospital's own after round `number`: its normalisation layers, its momentum where that lasts over
        rounds, and its accountant's state."""
        tensors = normalisation_state(self.model) | ({} if self.velocity is None else {_VELOCITY: self.velocity})
        facts = {
            "privacy accountant": self.ledger.state(),
            "noise multiplier": self.noise_multiplier,
            "ends": list(self.ends),
        }
        save_checkpoint(directory, Checkpoint(number, tensors, facts), self.config)

    def resume(self, directory: Path, number: int) -> None:
        """Go back to this hospital's own layers and momentum after round `number`, if it has kept them.

        The shared parameters come from the aggregator and are held against what all signed (`audit_trail`). Raises
        `MpcFlError` when what was kept is not what it should be, `PrivacyBudgetError` when the privacy ledger lacks a
        release that it held then.
        """
        saved = load_checkpoint(directory, self.config, number, _wrong_facts)
        if saved is None:
            return
        self.ledger.require(saved.facts["privacy accountant"])
        tensors = dict(saved.tensors)
        velocity = tensors.pop(_VELOCITY, None)
        if self.config.keeps_momentum:
            self.velocity = self._checked(velocity)
        if self.config.training.local_normalisation:
            load_normalisation_state(self.model, tensors)

    def _checked(self, velocity: torch.Tensor | None) -> torch.Tensor | None:
        """A momentum that may be this hospital's; None before its first round. Raises `ModelError`."""
        if velocity is None:
            return None
        shape, is_float = flatten_parameters(self.model).shape, velocity.dtype == torch.float32
        if not is_float or velocity.shape != shape or not bool(torch.isfinite(velocity).all()):
            raise ModelError("the momentum in a checkpoint cannot be", "remove the directory and start the run anew")
        return velocity


def _wrong_facts(saved: Checkpoint) -> str | None:
    spent, ends = saved.facts.get("privacy accountant"), saved.facts.get("ends")
    if not isinstance(ends, list) or any(type(number) is not int for number in ends):
        return "holds no list of rounds after which the run was complete"
    return None if isinstance(spent, list) else "holds no state of a privacy accountant"


class Beginning:
    """What the hospitals of one process have alike before the first round, found once, when the first of them joins."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._methods: dict[tuple[bool, tuple[int, ...]], Method] = {}

    @functools.cached_property
    def _common(self) -> _Common:
        return _common_of(self.config)

    def join(
        self, rank: int, train: Dataset, test: Dataset, ledger: PrivacyLedger, directory: Path | None = None
    ) -> Hospital:
        """Prepare a hospital for a run, or for the rest of it after the last checkpoint in `directory`.

        Raises `PrivacyBudgetError` when the planned steps do not fit the budget, `HeadroomError` when sums could wrap.
        """
        config, name = self.config, hospital_name(rank)
        headroom_of(config).require()
        require_evaluation_headroom(config.federation.hospitals, config.aggregation.count_bound)
        resumes = directory is not None and config.site.resume
        last = load_checkpoint(directory, config, check=_wrong_facts) if directory is not None and resumes else None
        ends, spent, done = ends_before(last, config), list[SubsampledGaussian](), NOTHING_DONE
        if config.privacy.mechanism != "none":
            spent = ledger.spent(run=run_name(config))
            done = _done(config, ledger, None if last is None else last.round, ends)
        if last is not None:
            ledger.require(last.facts["privacy accountant"])
            require_room_for_rounds(config, last, done, train.patient_count, spent, name)
        planned = plan_release(config, train.patient_count, spent, name, done)
        noise = None if planned is None else planned.noise_multiplier
        rate, common = sample_rate_of(config, train.patient_count), self._common
        own = (copy.deepcopy(common.model), train, test, ledger, budget_of(config), noise, rate, common.coordinates)
        hospital = Hospital(config, name, rank, *own)
        hospital.kept_round, hospital.ends = -1 if last is None else last.round, ends
        hospital.device, hospital.mechanism = common.device, common.mechanism
        hospital.frozen_outputs = frozen_outputs_of(hospital.model, config, hospital.device, len(train))
        if config.privacy.mechanism != "none":
            hospital.method = self._method_at(hospital)
        return hospital

    def _method_at(self, hospital: Hospital) -> Method:
        """How gradients of single records are computed, found once for all hospitals whose steps pass through the same."""
        outputs = hospital.frozen_outputs
        shape = self.config.data.input_shape if outputs is None else outputs.shape[1:]
        passed = (outputs is None, tuple(shape))
        if passed not in self._methods:
            self._methods[passed] = _method_of(hospital, shape)
        return self._methods[passed]


def join(
    config: Config, rank: int, train: Dataset, test: Dataset, ledger: PrivacyLedger, directory: Path | None = None
) -> Hospital:
    """Prepare a hospital that has a process of its own: see `Beginning.join`."""
    return Beginning(config).join(rank, train, test, ledger, directory)


@dataclass(frozen=True)
class _Common:
    """See `Beginning`: the first model, what of it is shared, where it is computed, and the noise of all together."""

    model: nn.Module
    coordinates: torch.Tensor
    device: Device
    mechanism: DistributedGaussian | None


def _common_of(config: Config) -> _Common:
    model, mechanism = initial_model(config), None
    coordinates = shared_coordinates(model, config.training.local_normalisation)
    if config.privacy.mechanism == "distributed":
        if config.site.training_processes > 1:
            raise ConfigError("distributed noise trains in one process", "set site.training_processes to 1")
        mechanism = mechanism_of(config)
    return _Common(model, coordinates, device_of(config), mechanism)


def _method_of(hospital: Hospital, shape: tuple[int, ...]) -> Method:
    """How gradients of single records of this shape are computed. Raises `ModelError` where a network has none."""
    training, trained = hospital.config.training, hospital.trained_network
    wanted, mechanism, device = training.per_sample_gradients, hospital.mechanism, hospital.device
    if wanted == "auto":
        copies = training.augmentation.copies
        wanted = choose_per_sample_method(trained, shape, mechanism=mechanism, device=device, copies=copies)
    else:
        computed = on_device(working_copy(trained), device)
        with repeatable():
            require_gradients_of_each(computed, shape, wanted)
    if mechanism is not None and device.place.type != "cpu":
        computed = on_device(working_copy(trained), device)
        with repeatable():
            require_independent_records(computed, shape, mechanism, wanted)
    return wanted


def _done(config: Config, ledger: PrivacyLedger, rounds: int | None, ends: tuple[int, ...]) -> Done:
    """How far this run has come, with what was lost of it: by the ledger, where all that may have left is charged."""
    # What this run has reserved and not released never left, and will be replaced.
    charged = Counter(record.get("run") for record in ledger.records(run_name(config)))
    named = (
        run_name,
        features_run_name,
        evaluation_run_name,
        validation_run_name,
        calibration_run_name,
        groups_run_name,
    )
    steps, features, evaluations, validations, calibrations, groups = (charged[name(config)] for name in named)
    return Done(rounds, steps, features, evaluations, validations, calibrations, ends, groups)
