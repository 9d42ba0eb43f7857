"""Federated SGD with distributed noise: only the noised sum of all hospitals' clipped gradients is ever opened.

Protocol, step s of round k, hospitals 0..n-1 and the aggregator, all with the same parameters:
  1. each hospital draws its patients with the sampling rate, clips each one's gradient, rounds it to the grid and adds
     the integers up, exactly (`distributed_gaussian.add_patients`)
  2. it adds its part of the noise, a discrete Gaussian of variance sigma^2 / (n - t) (`noised_share`)
  3. secure sum in the mechanism's ring, opened to the aggregator alone
  4. the aggregator divides, steps with momentum and sends the new parameters

Security. As `quorum_sum`: nobody learns more than the opened sum, and that carries noise for all hospitals together, also
against t hospitals that take their own part out (Kairouz, Liu and Steinke, ICML 2021). With mechanism `local` each hospital adds
n times the variance to reach the same epsilon; here the noise in the mean is smaller by sqrt(n - t).

Rounds and bytes. One round per step: each hospital sends 4 bytes per parameter in Z_2^32 (8 in Z_2^64) and receives 4.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Missed, Rules, missed_by
from mpc_fl.config.config import Config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import SumLostError
from mpc_fl.federation.aggregator_state import Aggregator
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.distribution import receive_global, send_global
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.federation.model_digests import ModelDigests, sum_terms
from mpc_fl.federation.planning import privacy_of_steps
from mpc_fl.learning.device import at_work, follow, on_device, repeatable
from mpc_fl.learning.models.parameters import flatten_parameters, load_flat_parameters, trainable_parameters
from mpc_fl.learning.privacy.distributed_gaussian import mean_gradient, noised_share, require_patients
from mpc_fl.learning.training.augmentation import augmented
from mpc_fl.learning.training.per_sample_gradients import loss_with, rounded_sum, working_copy
from mpc_fl.learning.training.sampling import sample_patients, sampling_seed_of
from mpc_fl.learning.training.schedules import learning_rate_factor
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Steps:
    """What a hospital keeps of one round's steps. It describes its patients without noise and never leaves it."""

    mean_loss: float
    clipped_fraction: float
    count: int
    method: str


class OwnGradients:
    """A hospital's part of one round of steps: steps 1 and 2 of each, and the parameters that it begins with.

    `mechanism` is that of the run. The model of the hospital stays as it is until `keep`.
    """

    def __init__(self, hospital: Hospital, plan: RoundPlan) -> None:
        assert hospital.mechanism is not None and hospital.method is not None  # with distributed noise alone
        self.mechanism, self._method = hospital.mechanism, hospital.method
        self._hospital, self._number = hospital, plan.number
        trained, self._patients = hospital.trained()
        self._working, self._order = working_copy(trained), sampling_seed_of(hospital.sampling_seed)
        self._noise_seed = hospital.noise_seed.derive("round", *plan.round_of)  # fresh for every attempt
        self._computed = on_device(self._working, hospital.device)
        self._loss = loss_with(hospital.config.training.class_weights)
        self._losses, self._used, self._clipped = 0.0, 0, 0

    @property
    def parameters(self) -> torch.Tensor:
        """Those of the next step, float32 (P,), in the order in which gradients are summed."""
        return flatten_parameters(self._working)

    def share(self, step: int) -> Private[torch.Tensor]:
        """The clipped gradients of the patients that this step draws, with this hospital's part of the noise, int32 or int64 (P,).

        Raises `HeadroomError` when the sum exceeds its bound.
        """
        hospital, number, mechanism = self._hospital, self._number, self.mechanism
        config, patients = hospital.config, self._patients
        drawn = self._order.stream("poisson sampling", number, step)
        rows = sample_patients(patients.records_of_patient, hospital.sample_rate, drawn)
        require_patients(mechanism, len(rows), hospital.name)
        copies_seed = self._order.derive("augmentation", number, step)
        inputs = augmented(config.training.augmentation, patients.inputs[rows], copies_seed)
        with at_work(hospital.device), repeatable():
            follow(self._computed, self._working)
            sums = rounded_sum(self._computed, self._loss, inputs, patients.labels[rows], mechanism, self._method)
        self._losses += float(sums.losses.sum())
        self._clipped += int((sums.norms > config.privacy.clipping_norm).sum())
        self._used += len(rows)
        seed = self._noise_seed.derive("distributed noise", number, step)
        return noised_share(mechanism, Private("clipped gradients", sums.total), seed, config.runtime.threads)

    def step_to(self, parameters: torch.Tensor) -> None:
        """The global parameters after a step, float32 (P,)."""
        load_flat_parameters(self._working, parameters)

    def keep(self) -> Steps:
        """Give the hospital's model the parameters of the last step; what is known of all of them."""
        _copy_parameters(self._working, self._hospital.model)
        used, count = self._used, self._hospital.config.training.local_steps
        mean_loss, clipped = (self._losses / used, self._clipped / used) if used else (float("nan"), 0.0)
        return Steps(mean_loss, clipped, count, self._method)


def agreed_gradient(
    config: Config, hospitals: tuple[str, ...], plan: RoundPlan, step: int, digests: ModelDigests
) -> AgreedSum:
    """The sum of one step, as all its parties know it."""
    seen = sum_terms(config, plan.weight_total, digests)
    return AgreedSum(hospitals, ("gradient", *plan.round_of, step), _about(config, plan.number, step), seen)


def stepped_along(
    aggregator: Aggregator, parameters: torch.Tensor, opened: torch.Tensor, hospitals: int, step_of: tuple[int, int]
) -> torch.Tensor:
    """Step 4: `parameters`, float32 (P,), after a step along the opened sum over so many hospitals; `step_of` is round and step."""
    config, mechanism, (number, step) = aggregator.config, aggregator.mechanism, step_of
    assert mechanism is not None  # with distributed noise alone
    # The mean over those present: `mean_gradient` divides by the number of all hospitals.
    gradient = mean_gradient(mechanism, opened.long()) * (mechanism.hospitals / hospitals)
    stepped = aggregator.optimizer.step(parameters, gradient, learning_rate_factor(config.training, number, step))
    return aggregator.average.take(stepped, (number - 1) * config.training.local_steps + step)


def keep_stepped(aggregator: Aggregator, parameters: torch.Tensor) -> None:
    """Give the aggregator's model the parameters of the last step, float32 (P,), in the order in which gradients are summed."""
    working = working_copy(aggregator.model)
    load_flat_parameters(working, parameters)
    _copy_parameters(working, aggregator.model)
    aggregator.digests.take(parameters=aggregator.shared_parameters)


def _about(config: Config, number: int, step: int) -> Description:
    why = f"round {number} step {step + 1}: noised gradient"
    return Description("sum of clipped gradients", why, privacy_of_steps(config, 1))


def hospital_steps(
    hospital: Hospital, domain: SecretDomain, rules: Rules, plan: RoundPlan, step_done: Callable[[int, int], None]
) -> tuple[tuple[str, ...], Steps] | Missed:
    """Steps 1 to 4 at a hospital, `training.local_steps` times; its model gets the parameters of the last one.

    Returns the hospitals of the last sum, or why there is none. `step_done(step, steps)` follows each step. The privacy
    ledger counts the round as released before its first summand leaves. Raises `HeadroomError` before anything is sent when
    a sum exceeds its bound, `PeerLostError` for a lost aggregator. Every step's sum is bound to the model it begins with.
    """
    links, config, steps, hospitals = (
        domain.links,
        hospital.config,
        hospital.config.training.local_steps,
        plan.hospitals,
    )
    gradients = OwnGradients(hospital, plan)
    for step in range(steps):
        # 1. and 2.
        links.set_phase(f"round {plan.number} training")
        share = gradients.share(step)
        # 3. and 4.
        links.set_phase(f"round {plan.number} aggregation")
        agreed = agreed_gradient(config, hospitals, plan, step, hospital.digests)
        missed: Missed | None = None
        try:
            hospitals = contribute(domain, rules, agreed, share, hospital.ledger.release)
        except SumLostError as error:
            log.warning("%s", error)
            missed = missed_by(links.name, error)
        if links.name not in hospitals or missed is not None:
            # The steps so far are dropped: what the next sum is bound to must be the model that this hospital has.
            hospital.digests.take(parameters=hospital.shared_parameters)
            return missed or "left out"
        gradients.step_to(receive_global(links, hospital.digests, gradients.mechanism.parameters))
        step_done(step + 1, steps)
    kept = gradients.keep()
    hospital.digests.take(parameters=hospital.shared_parameters)  # in the order that is signed and sent to newcomers
    return hospitals, kept


def aggregator_steps(aggregator: Aggregator, domain: SecretDomain, rules: Rules, plan: RoundPlan) -> tuple[str, ...]:
    """Steps 3 and 4 at the aggregator; its model gets the parameters of the last step. Returns the hospitals of its sum.

    Raises `QuorumError` when too few are left, `SumLostError` when a sum cannot be opened any more; the optimizer has then
    stepped for the sums before, whose gradients are opened and spent.
    """
    links, config, mechanism = domain.links, aggregator.config, aggregator.mechanism
    assert mechanism is not None  # with distributed noise alone
    hospitals, parameters = plan.hospitals, flatten_parameters(working_copy(aggregator.model))
    for step in range(config.training.local_steps):
        agreed = agreed_gradient(config, hospitals, plan, step, aggregator.digests)
        hospitals, opened = collect(domain, rules, agreed, plan.starts, mechanism.dtype, (mechanism.parameters,))
        parameters = stepped_along(aggregator, parameters, opened, len(hospitals), (plan.number, step))
        send_global(links, aggregator.digests, hospitals, parameters)
    keep_stepped(aggregator, parameters)
    return hospitals


@torch.no_grad()
def _copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """By name: tracing may have put the parameters of the working copy into another order."""
    stepped = dict(source.named_parameters())
    for name, parameter in trainable_parameters(target):
        if name in stepped:
            parameter.copy_(stepped[name])
