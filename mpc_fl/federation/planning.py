"""The state of a hospital and of the aggregator over the rounds of a run, and what has to be clear before the first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpc_fl.aggregation.norm_check_session import check_of
from mpc_fl.aggregation.quorum_sum import Rules
from mpc_fl.config.config import AGGREGATOR, Config
from mpc_fl.crypto.ring import FixedPoint, MeanHeadroom
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ConfigError, HeadroomError, PrivacyBudgetError
from mpc_fl.federation.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mpc_fl.federation.feature_statistics import Normalisation, plan_features
from mpc_fl.federation.federated_sgd import mechanism_of
from mpc_fl.learning.data.loading import Dataset
from mpc_fl.learning.data.phantoms import public_phantoms
from mpc_fl.learning.models.architectures import (
    build_model,
    calibrate_batchnorm,
    flatten_parameters,
    load_flat_parameters,
    load_normalisation_state,
    normalisation_state,
    shared_coordinates,
)
from mpc_fl.learning.models.evaluation import require_evaluation_headroom
from mpc_fl.learning.models.model_file import flatten_buffers
from mpc_fl.learning.privacy.accounting import (
    PrivacyBudget,
    PrivacyLedger,
    SubsampledGaussian,
    calibrate_noise_multiplier,
    check_delta,
    epsilon_of,
)
from mpc_fl.learning.privacy.distributed_gaussian import DistributedGaussian
from mpc_fl.learning.training.dp_sgd import sampling_rate
from mpc_fl.learning.training.per_sample_gradients import choose_per_sample_method
from mpc_fl.learning.training.process_group import TrainingGroup
from mpc_fl.learning.training.server_optimizers import ServerOptimizer, calibrate_own, join_parts, server_optimizer

CALIBRATION_IMAGES = 64


def headroom_of(config: Config) -> MeanHeadroom:
    """The headroom of the weighted mean over all hospitals; `require` it before a run."""
    fixed_point = FixedPoint(config.aggregation.fraction_bits, config.aggregation.update_bound)
    return MeanHeadroom(fixed_point, config.federation.hospitals)


def sum_rules(config: Config) -> Rules:
    """How the sums of a training run are made: closing masks only where a hospital may be left out of one."""
    federation = config.federation
    may_leave_out = federation.quorum_size < federation.hospitals or config.aggregation.norm_check
    closing = config.privacy.colluders + 1 if may_leave_out else 0
    seconds = federation.round_timeout or config.runtime.receive_timeout
    return Rules(AGGREGATOR, federation.quorum_size, closing, seconds)


def checked(
    rules: Rules, config: Config, mechanism: DistributedGaussian | None, parameters: int, weight_total: int
) -> Rules:
    """The rules of the sums that may have a check of norms: of updates or gradients."""
    return replace(rules, check=check_of(config, headroom_of(config), mechanism, parameters, weight_total))


def plan_release(
    config: Config, patients: int, spent: Iterable[SubsampledGaussian], who: str, rounds_done: int = 0
) -> SubsampledGaussian | None:
    """What the rest of the run will release of a hospital's patients; `None` without differential privacy.

    The noise multiplier is the configured one, or the smallest with which the run fits what `spent` leaves of the budget.
    Raises `PrivacyBudgetError` when nothing is left, the run does not fit or delta is too large, `HeadroomError` for more
    patients than sums have room for. Messages begin with `who`.
    """
    if patients > config.aggregation.count_bound:
        raise HeadroomError(f"{who} has more patients than aggregation.count_bound", "raise aggregation.count_bound")
    settings, past = config.privacy, list(spent)
    if settings.mechanism == "none":
        return None
    check_delta(settings.delta, patients, who)
    rate = sampling_rate(config, patients)
    steps = max(1, config.training.rounds - rounds_done) * config.training.local_steps
    noise = settings.noise_multiplier
    if patients < (settings.smallest_hospital or 0):
        raise PrivacyBudgetError(f"{who} has fewer patients than privacy.smallest_hospital", "lower that bound")
    if settings.mechanism == "distributed":
        planned = distributed_mechanism_of(config).event(rate, steps)
        noise = planned.noise_multiplier
    else:
        if noise is None:
            noise = calibrate_noise_multiplier(
                settings.epsilon, settings.delta, rate, steps, past, settings.accountant, who
            )
        planned = SubsampledGaussian(noise, rate, steps)
    total = epsilon_of([*past, planned], settings.delta, settings.accountant)
    if total > settings.epsilon:
        raise PrivacyBudgetError(
            f"{who}: {steps} steps with noise multiplier {noise:g} would bring epsilon to {total:.3f}, beyond the budget of "
            f"{settings.epsilon:g}",
            "raise privacy.noise_multiplier, or set it to null to have it calibrated",
        )
    return planned


def distributed_mechanism_of(config: Config) -> DistributedGaussian:
    """The public mechanism of a run with distributed noise."""
    return mechanism_of(config, len(flatten_parameters(build_model(config, config.data.input_shape, config.seed))))


def initial_model(config: Config) -> nn.Module:
    """The first global model: weights from the seed, frozen statistics calibrated on public synthetic images."""
    model = build_model(config, config.data.input_shape, config.seed)
    calibrate_on_public_images(model, config, None)
    return model


def calibrate_on_public_images(model: nn.Module, config: Config, normalisation: Normalisation | None) -> None:
    """Frozen BatchNorm statistics from public synthetic images, brought to the inputs' normalisation if there is one."""
    if config.model.normalisation == "frozen" and not config.data.is_table:
        images = public_phantoms(CALIBRATION_IMAGES, config)
        calibrate_batchnorm(model, images if normalisation is None else normalisation.apply(images))


# ---- a hospital --------------------------------------------------------------------------------------------------------


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
    method: Any = None
    group: TrainingGroup | None = None
    mechanism: DistributedGaussian | None = None
    normalisation: Normalisation | None = None
    noise_seed: Seed = field(default_factory=Seed.from_system)

    @property
    def sampling_seed(self) -> int | None:
        """Secret and fresh by default; a number in simulations, different at each hospital."""
        seed = self.config.training.sampling_seed
        return None if seed is None else seed * 1000 + self.rank

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
            self.normalisation = normalisation

    def epsilon(self) -> float | None:
        """Epsilon spent on these patients so far, all runs in the ledger together."""
        if self.config.privacy.mechanism == "none":
            return None
        return epsilon_of(self.ledger.spent(), self.budget.delta, self.budget.accountant)

    def checkpoint(self, directory: Path, number: int) -> None:
        """Keep what is this hospital's own after round `number`: its normalisation layers, and its accountant's state."""
        spent = [] if self.config.privacy.mechanism == "none" else self.ledger.state()
        save_checkpoint(
            directory,
            Checkpoint(number, normalisation_state(self.model), {"privacy accountant": spent}),
            self.config.run_digest(),
        )

    def resume(self, directory: Path, number: int) -> None:
        """Go back to this hospital's own layers after round `number`, if it has kept them.

        Raises `PrivacyBudgetError` when its privacy ledger lacks a release that it held then.
        """
        saved = load_checkpoint(directory, self.config.run_digest(), number)
        if saved is None:
            return
        if self.config.privacy.mechanism != "none":
            self.ledger.require(saved.facts["privacy accountant"])
        if self.config.training.local_normalisation:
            load_normalisation_state(self.model, saved.tensors)


def join(
    config: Config, rank: int, train: Dataset, test: Dataset, ledger: PrivacyLedger, directory: Path | None = None
) -> Hospital:
    """Prepare a hospital for a run, or for the rest of it after the last checkpoint in `directory`.

    Raises `PrivacyBudgetError` when the planned steps do not fit the budget, `HeadroomError` when sums could wrap.
    """
    headroom_of(config).require()
    require_evaluation_headroom(config.federation.hospitals, config.aggregation.count_bound)
    name = f"hospital-{rank}"
    last = load_checkpoint(directory, config.run_digest()) if directory is not None and config.site.resume else None
    budget = PrivacyBudget(config.privacy.epsilon, config.privacy.delta, config.privacy.accountant)
    spent = [] if config.privacy.mechanism == "none" else ledger.spent(run=run_name(config))
    spent += [] if config.privacy.mechanism == "none" else _features_to_come(config, ledger)
    planned = plan_release(config, train.patient_count, spent, name, 0 if last is None else last.round)
    noise = None if planned is None else planned.noise_multiplier
    rate = sampling_rate(config, train.patient_count)
    model = initial_model(config)
    coordinates = shared_coordinates(model, config.training.local_normalisation)
    hospital = Hospital(config, name, rank, model, train, test, ledger, budget, noise, rate, coordinates)
    if config.privacy.mechanism == "distributed":
        if config.site.training_processes > 1:
            raise ConfigError("distributed noise trains in one process", "set site.training_processes to 1")
        hospital.mechanism = distributed_mechanism_of(config)
    if config.privacy.mechanism != "none":
        wanted = config.training.per_sample_gradients
        hospital.method = choose_per_sample_method(model, config.data.input_shape) if wanted == "auto" else wanted
    return hospital


def _features_to_come(config: Config, ledger: PrivacyLedger) -> list[SubsampledGaussian]:
    """What the normalisation of the inputs will spend, unless it has already."""
    if config.data.normalise != "secure":
        return []
    if any(record.get("run") == features_run_name(config) for record in ledger.records()):
        return []
    event = plan_features(config).event()
    return [] if event is None else [event]


def features_run_name(config: Config) -> str:
    """How a privacy ledger names what the normalisation of the inputs spends."""
    return f"{run_name(config)} features"


def run_name(config: Config) -> str:
    """How a privacy ledger names this run: two runs of one configuration differ by their sessions."""
    return f"{config.name} {config.federation.session}".strip()


# ---- the aggregator ----------------------------------------------------------------------------------------------------


@dataclass
class Aggregator:
    """The aggregator's state over the rounds, all of it public or opened.

    `patients` is the opened total number of training patients, `weight_total` the public power of two above it.
    """

    config: Config
    model: nn.Module
    mechanism: DistributedGaussian | None
    optimizer: ServerOptimizer
    coordinates: torch.Tensor
    round: int = -1
    patients: int = 0
    weight_total: int = 1
    normalisation: Normalisation | None = None

    @property
    def shared_parameters(self) -> torch.Tensor:
        """What all hospitals have in common, float32 (S,)."""
        return flatten_parameters(self.model)[self.coordinates]

    def step(self, pseudo_gradient: torch.Tensor) -> torch.Tensor:
        """Step the shared parameters along a pseudo-gradient, float64 (S,); returns the new ones, float32 (S,)."""
        shared = self.optimizer.step(self.shared_parameters, pseudo_gradient)
        load_flat_parameters(self.model, join_parts(shared, flatten_parameters(self.model), self.coordinates))
        return shared

    def mean_factor(self, hospitals: int) -> float:
        """What turns the opened sum over so many hospitals into their mean.

        Weights are counts over `weight_total`. The total of all is known; how many patients those present have is not, or
        the difference would show an absent hospital's number: they count as their share of the hospitals.
        """
        return self.weight_total / self.patients * self.config.federation.hospitals / hospitals

    def checkpoint(self, directory: Path, number: int) -> None:
        """Keep the state after round `number`."""
        self.round = number
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.state().items()}
        if self.normalisation is not None:
            tensors["normalisation"] = self.normalisation.tensor()
        facts = {"patients": self.patients, "weight total": self.weight_total}
        save_checkpoint(directory, Checkpoint(number, tensors, facts), self.config.run_digest())

    def resume(self, directory: Path) -> bool:
        """Go back to the last checkpoint; False when there is none."""
        saved = load_checkpoint(directory, self.config.run_digest())
        if saved is None:
            return False
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}}
        for name, value in saved.tensors.items():
            if name == "normalisation":
                self.normalisation = Normalisation.of_tensor(value)
            else:
                part, _, rest = name.partition(".")
                parts[part][rest] = value
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state(parts["optimizer"])
        self.round, self.patients = saved.round, int(saved.facts["patients"])
        self.weight_total = int(saved.facts["weight total"])
        return True


def prepare_aggregator(config: Config) -> Aggregator:
    """The aggregator before the first round. Raises `HeadroomError` when sums could wrap."""
    headroom_of(config).require()
    mechanism = distributed_mechanism_of(config) if config.privacy.mechanism == "distributed" else None
    model = initial_model(config)
    coordinates = shared_coordinates(model, config.training.local_normalisation)
    return Aggregator(config, model, mechanism, server_optimizer(config), coordinates)


def initial_state(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """All parameters and frozen statistics of a model, float32 vectors, as a newcomer gets them."""
    return flatten_parameters(model), flatten_buffers(model)
