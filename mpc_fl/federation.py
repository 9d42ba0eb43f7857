"""One federated round, as every role runs it: the main path of training.

Round k, hospitals 0..n-1 and the aggregator, all of them CrypTen parties of one world:
  1. all start from the same global model
  2. each hospital charges its privacy ledger, then trains with differentially private SGD on its own patients
  3. each hospital encodes count * update and count in the ring; refused if they do not fit
  4. weighted mean on shares; the two sums are opened to the aggregator alone
  5. the aggregator applies the mean and sends the new global model
  6. all hospitals evaluate it on their own test patients; only the sum of the counts is opened
  7. all sign the round's openings and the new global model into the reveal ledger
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mpc_fl.config import AGGREGATOR, Config
from mpc_fl.data import Dataset
from mpc_fl.distributed_mechanism import DistributedGaussian
from mpc_fl.errors import ConfigError, HeadroomError, PrivacyBudgetError, ProtocolError
from mpc_fl.federated_sgd import (
    ServerOptimizer,
    Steps,
    aggregator_steps,
    hospital_steps,
    mechanism_of,
    privacy_of_steps,
)
from mpc_fl.models import build_model, calibrate_batchnorm, flatten_parameters, load_flat_parameters
from mpc_fl.opening import SecretDomain
from mpc_fl.per_sample_gradients import choose_per_sample_method
from mpc_fl.phantoms import public_phantoms
from mpc_fl.privacy import (
    PrivacyBudget,
    PrivacyLedger,
    SubsampledGaussian,
    calibrate_noise_multiplier,
    check_delta,
    epsilon_of,
)
from mpc_fl.ring import FixedPoint, Headroom
from mpc_fl.secrecy import Private
from mpc_fl.secure_sum import encode_weighted, weighted_mean
from mpc_fl.statistics import Evaluation, evaluate_locally, secure_evaluation
from mpc_fl.stream_cipher import Seed
from mpc_fl.training import sampling_rate, train_locally
from mpc_fl.training_group import TrainingGroup
from mpc_fl.transport import Links
from mpc_fl.weights import flatten_buffers, load_flat_buffers

log = logging.getLogger(__name__)

CALIBRATION_IMAGES = 64
EVALUATION_CHUNK = 64

Notify = Callable[[str, int, int], None]


def headroom_of(config: Config) -> Headroom:
    """The headroom of the weighted sum over all hospitals; `require` it before a run."""
    fixed_point = FixedPoint(config.aggregation.fraction_bits, config.aggregation.update_bound)
    weight_bound = config.aggregation.count_bound if config.aggregation.weighted else 1
    return Headroom(fixed_point, config.federation.hospitals, weight_bound)


def plan_release(
    config: Config, patients: int, spent: Iterable[SubsampledGaussian], who: str
) -> SubsampledGaussian | None:
    """What the whole run will release of a hospital's patients; `None` without differential privacy.

    The noise multiplier is the configured one, or the smallest with which the run fits what `spent` leaves of the budget.
    Raises `PrivacyBudgetError` when nothing is left, the run does not fit or delta is too large, `HeadroomError` for more
    patients than sums have room for. Messages begin with `who`.
    """
    if config.aggregation.weighted and patients > config.aggregation.count_bound:
        raise HeadroomError(f"{who} has more patients than aggregation.count_bound", "raise aggregation.count_bound")
    settings, past = config.privacy, list(spent)
    if settings.mechanism == "none":
        return None
    check_delta(settings.delta, patients, who)
    rate, steps = sampling_rate(config, patients), config.training.rounds * config.training.local_steps
    noise = settings.noise_multiplier
    if settings.mechanism == "distributed":
        if patients < (settings.smallest_hospital or 0):
            raise PrivacyBudgetError(f"{who} has fewer patients than privacy.smallest_hospital", "lower that bound")
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
    if config.model.normalisation == "frozen" and not config.data.is_table:
        calibrate_batchnorm(model, public_phantoms(CALIBRATION_IMAGES, config))
    return model


@torch.no_grad()
def predict(model: nn.Module, inputs: torch.Tensor, chunk: int = EVALUATION_CHUNK) -> torch.Tensor:
    """Logits of a model in evaluation mode, float32 (records, classes)."""
    model.eval()
    pieces = [model(inputs[start : start + chunk]) for start in range(0, len(inputs), chunk)]
    return torch.cat(pieces) if pieces else torch.zeros(0, 1)


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
    method: Any = None
    group: TrainingGroup | None = None
    mechanism: DistributedGaussian | None = None
    noise_seed: Seed = field(default_factory=Seed.from_system)

    @property
    def sampling_seed(self) -> int | None:
        """Secret and fresh by default; a number in simulations, different at each hospital."""
        seed = self.config.training.sampling_seed
        return None if seed is None else seed * 1000 + self.rank

    def epsilon(self) -> float | None:
        """Epsilon spent on these patients so far, all runs in the ledger together."""
        if self.config.privacy.mechanism == "none":
            return None
        return epsilon_of(self.ledger.spent(), self.budget.delta, self.budget.accountant)


def join(config: Config, rank: int, train: Dataset, test: Dataset, ledger: PrivacyLedger) -> Hospital:
    """Prepare a hospital for a run: model, sampling rate, noise multiplier for the budget that is left.

    Raises `PrivacyBudgetError` when the planned steps do not fit the budget, `HeadroomError` when sums could wrap.
    """
    headroom_of(config).require()
    name = f"hospital-{rank}"
    budget = PrivacyBudget(config.privacy.epsilon, config.privacy.delta, config.privacy.accountant)
    spent = [] if config.privacy.mechanism == "none" else ledger.spent()
    planned = plan_release(config, train.patient_count, spent, name)
    noise = None if planned is None else planned.noise_multiplier
    rate = sampling_rate(config, train.patient_count)
    model = initial_model(config)
    hospital = Hospital(config, name, rank, model, train, test, ledger, budget, noise, rate)
    if config.privacy.mechanism == "distributed":
        if config.site.training_processes > 1:
            raise ConfigError("distributed noise trains in one process", "set site.training_processes to 1")
        hospital.mechanism = distributed_mechanism_of(config)
    if config.privacy.mechanism != "none":
        wanted = config.training.per_sample_gradients
        hospital.method = choose_per_sample_method(model, config.data.input_shape) if wanted == "auto" else wanted
    return hospital


def receive_initial_model(hospital: Hospital, links: Links) -> None:
    """Take parameters and frozen statistics from the aggregator, so that all start bit for bit alike."""
    parameters, buffers = flatten_parameters(hospital.model), flatten_buffers(hospital.model)
    load_flat_parameters(
        hospital.model, links.receive_tensor(AGGREGATOR, "initial parameters", torch.float32, parameters.shape)
    )
    load_flat_buffers(
        hospital.model, links.receive_tensor(AGGREGATOR, "initial statistics", torch.float32, buffers.shape)
    )


def send_initial_model(model: nn.Module, links: Links) -> None:
    """The aggregator's side of `receive_initial_model`."""
    for peer in links.peers:
        links.send_tensor(peer, "initial parameters", flatten_parameters(model))
        links.send_tensor(peer, "initial statistics", flatten_buffers(model))


def hospital_round(hospital: Hospital, domain: SecretDomain, number: int, notify: Notify) -> dict[str, Any]:
    """Round `number` at a hospital. Returns this site's own metrics (they never leave it).

    Raises `PrivacyBudgetError` before training if the round would exceed the budget, `HeadroomError` if the update is
    NaN, infinite or too large, before anything is sent; `PeerLostError` when a party is lost or late.
    """
    began = time.monotonic()
    steps, train_seconds = _take_steps(hospital, domain, number, notify)
    aggregate_seconds = time.monotonic() - began - train_seconds
    log.info("round %d: trained in %.1f s, aggregated in %.1f s", number, train_seconds, aggregate_seconds)
    notify("aggregation", number, hospital.config.training.rounds)

    # 6. Evaluate on the hospital's own test patients; only sums over hospitals are opened.
    evaluation_began = time.monotonic()
    own = hospital_evaluation(hospital, domain, number)
    notify("evaluation", number, hospital.config.training.rounds)
    return {
        "round": number,
        "loss": steps.mean_loss,
        "epsilon": hospital.epsilon(),
        "noise_multiplier": hospital.noise_multiplier,
        "clipped_fraction": steps.clipped_fraction,
        "steps": steps.count,
        "method": steps.method,
        "own_accuracy": own.accuracy,
        "own_records": own.records,
        "skipped_files": hospital.train.skipped + hospital.test.skipped,
        "seconds": {
            "train": train_seconds,
            "aggregate": aggregate_seconds,
            "evaluate": time.monotonic() - evaluation_began,
        },
    }


def _take_steps(hospital: Hospital, domain: SecretDomain, number: int, notify: Notify) -> tuple[Steps, float]:
    """Steps 2 to 5 at a hospital; returns what it keeps of them, and the seconds spent on training."""
    config, links = hospital.config, domain.runtime.links
    old = flatten_parameters(hospital.model)

    # 2. Train with differential privacy; the ledger is charged by what the round will release.
    links.set_phase(f"round {number} training")
    began = time.monotonic()

    def step_done(done: int, total: int) -> None:
        notify("training", (number - 1) * total + done, config.training.rounds * total)

    if hospital.noise_multiplier is not None:
        charge_round(hospital, number)
    if hospital.mechanism is not None:
        # Distributed noise: steps 2 to 5 for every single step, see `federated_sgd`.
        before = links.seconds_of(f"round {number} training")
        steps = hospital_steps(
            domain,
            hospital.model,
            hospital.train,
            config,
            hospital.mechanism,
            hospital.sample_rate,
            hospital.noise_seed,
            hospital.sampling_seed,
            number,
            hospital.method,
            step_done,
        )
        return steps, links.seconds_of(f"round {number} training") - before
    local = train_locally(
        hospital.model,
        hospital.train,
        config,
        hospital.noise_multiplier,
        hospital.sample_rate,
        hospital.noise_seed,
        hospital.sampling_seed,
        number,
        step_done,
        hospital.method,
        hospital.group,
    )
    trained = time.monotonic()

    # 3. Encode; the count is as secret as the update.
    links.set_phase(f"round {number} aggregation")
    count = hospital.train.patient_count if config.aggregation.weighted else 1
    headroom = headroom_of(config)
    encoded = encode_weighted(
        Private(f"update of {hospital.name}", local.update),
        Private(f"patient count of {hospital.name}", count),
        headroom,
    )

    # 4. and 5. Mean on shares, opened to the aggregator, which sends the new global model.
    why = f"round {number}: mean update"
    weighted_mean(
        domain,
        *encoded,
        config.aggregation.fraction_bits,
        AGGREGATOR,
        why,
        privacy_of_steps(config, config.training.local_steps),
    )
    load_flat_parameters(hospital.model, links.receive_tensor(AGGREGATOR, "global model", torch.float32, old.shape))
    return Steps(local.mean_loss, local.clipped_fraction, local.steps, local.method), trained - began


def charge_round(hospital: Hospital, number: int) -> None:
    """Write the round's release into the privacy ledger before anything that depends on patients is computed."""
    assert hospital.noise_multiplier is not None
    steps = hospital.config.training.local_steps
    if hospital.mechanism is not None:
        event = hospital.mechanism.event(hospital.sample_rate, steps)
    else:
        event = SubsampledGaussian(hospital.noise_multiplier, hospital.sample_rate, steps)
    hospital.ledger.charge(event, run=hospital.config.name, round_number=number, budget=hospital.budget)


def hospital_evaluation(hospital: Hospital, domain: SecretDomain, number: int) -> Evaluation:
    """Step 6 at a hospital; also run once before the first round."""
    domain.runtime.links.set_phase(f"round {number} evaluation")
    probabilities = torch.softmax(predict(hospital.model, hospital.test.inputs), dim=1)
    own = evaluate_locally(probabilities, hospital.test.labels)
    config = hospital.config
    secure_evaluation(
        domain,
        Private(f"evaluation of {hospital.name}", own),
        len(config.data.classes),
        config.aggregation.count_bound,
        AGGREGATOR,
        f"round {number}: evaluation counts",
    )
    return own


@dataclass
class Aggregator:
    """The aggregator's state over the rounds: the global model, and for distributed noise mechanism and optimizer."""

    config: Config
    model: nn.Module
    mechanism: DistributedGaussian | None
    optimizer: ServerOptimizer


def prepare_aggregator(config: Config) -> Aggregator:
    """The aggregator before the first round. Raises `HeadroomError` when sums could wrap."""
    headroom_of(config).require()
    mechanism = distributed_mechanism_of(config) if config.privacy.mechanism == "distributed" else None
    optimizer = ServerOptimizer(config.training.learning_rate, config.training.momentum)
    return Aggregator(config, initial_model(config), mechanism, optimizer)


def aggregator_round(aggregator: Aggregator, domain: SecretDomain, number: int, notify: Notify) -> Evaluation:
    """Round `number` at the aggregator: steps 4 to 6. Its own summand is zero; it learns the opened sums."""
    config = aggregator.config
    domain.runtime.links.set_phase(f"round {number} aggregation")
    if aggregator.mechanism is not None:
        aggregator_steps(domain, aggregator.model, config, aggregator.mechanism, aggregator.optimizer, number)
    else:
        _average(config, aggregator.model, domain, number)
    notify("aggregation", number, config.training.rounds)

    # 6. Sum of the hospitals' evaluation counts.
    evaluation = aggregator_evaluation(config, domain, number)
    notify("evaluation", number, config.training.rounds)
    log.info("round %d: accuracy %.1f %% on the test records of all hospitals", number, 100 * evaluation.accuracy)
    return evaluation


def _average(config: Config, model: nn.Module, domain: SecretDomain, number: int) -> None:
    """Steps 4 and 5 at the aggregator: open the weighted mean of the updates, apply and send it."""
    links = domain.runtime.links
    old = flatten_parameters(model)

    # 4. The aggregator holds a share like everybody else.
    zeros = Private("aggregator's zero", torch.zeros(old.shape, dtype=torch.int64))
    no_weight = Private("aggregator's zero weight", torch.zeros(1, dtype=torch.int64))
    why, privacy = f"round {number}: mean update", privacy_of_steps(config, config.training.local_steps)
    mean = weighted_mean(domain, zeros, no_weight, config.aggregation.fraction_bits, AGGREGATOR, why, privacy)
    assert mean is not None

    # 5. Apply and send.
    load_flat_parameters(model, (old.double() + mean).float())
    for peer in links.peers:
        links.send_tensor(peer, "global model", flatten_parameters(model))


def aggregator_evaluation(config: Config, domain: SecretDomain, number: int) -> Evaluation:
    """Step 6 at the aggregator; also run once before the first round."""
    domain.runtime.links.set_phase(f"round {number} evaluation")
    evaluation = secure_evaluation(
        domain,
        None,
        len(config.data.classes),
        config.aggregation.count_bound,
        AGGREGATOR,
        f"round {number}: evaluation counts",
    )
    assert evaluation is not None
    return evaluation


def announce_end(links: Links, rounds: int) -> None:
    """At the aggregator, when its results are written: tell all hospitals that the run is complete."""
    links.set_phase("conclusion")
    for peer in links.peers:
        links.send_object(peer, "complete", {"rounds": rounds})


def await_end(links: Links, rounds: int) -> None:
    """At a hospital: nothing counts as a success before the aggregator says so. Raises `PeerLostError` otherwise."""
    links.set_phase("conclusion")
    if links.receive_object(AGGREGATOR, "complete").get("rounds") != rounds:
        raise ProtocolError("the aggregator ended after another number of rounds", "run the same version everywhere")
