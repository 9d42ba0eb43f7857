"""Federated SGD with distributed noise: only the noised sum of all hospitals' clipped gradients is ever opened.

Protocol, step s of round k, hospitals 0..n-1 and the aggregator, all with the same parameters:
  1. each hospital draws its patients with the sampling rate, clips each one's gradient, rounds it to the grid and adds
     the integers up, exactly (`distributed_mechanism.add_patients`)
  2. it adds its part of the noise, a discrete Gaussian of variance sigma^2 / (n - t) (`noised_share`)
  3. secure sum in the mechanism's ring, opened to the aggregator alone
  4. the aggregator divides, steps with momentum and sends the new parameters

Security. As `secure_sum`: nobody learns more than the opened sum, and that carries noise for all hospitals together, also
against t hospitals that take their own part out (Kairouz, Liu and Steinke, ICML 2021). With mechanism `local` each hospital adds
n times the variance to reach the same epsilon; here the noise in the mean is smaller by sqrt(n - t).

Rounds and bytes. One round per step: each hospital sends 4 bytes per parameter in Z_2^32 (8 in Z_2^64) and receives 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from mpc_fl.config import AGGREGATOR, Config
from mpc_fl.distributed_mechanism import (
    DistributedGaussian,
    mean_gradient,
    noised_share,
    plan_mechanism,
    require_patients,
    step_total_variation,
)
from mpc_fl.errors import HeadroomError
from mpc_fl.models import flatten_parameters, load_flat_parameters, trainable_parameters
from mpc_fl.opening import SecretDomain, open_to
from mpc_fl.per_sample_gradients import Method, rounded_sum, sum_cross_entropy, working_copy
from mpc_fl.privacy import calibrate_noise_multiplier
from mpc_fl.reveal_ledger import Scalar
from mpc_fl.secrecy import Private
from mpc_fl.secure_sum import secure_sum
from mpc_fl.stream_cipher import Seed
from mpc_fl.training import PatientRecords, sample_patients, sampling_seed_of

_SUM = "sum of clipped gradients"


def mechanism_of(config: Config, parameters: int) -> DistributedGaussian:
    """The mechanism of a run, from public values alone and so the same at all parties.

    A noise multiplier that is not configured is calibrated for the sampling rate of the smallest hospital there may be.
    The ring is Z_2^32 where headroom allows it, else Z_2^64. Raises `HeadroomError` or `PrivacyBudgetError`.
    """
    settings, training, hospitals = config.privacy, config.training, config.federation.hospitals
    noise = settings.noise_multiplier
    if noise is None:
        assert settings.smallest_hospital is not None  # the configuration demands it
        rate = min(1.0, training.batch_size / settings.smallest_hospital)
        distance = step_total_variation(parameters, hospitals, settings.colluders)
        steps = training.rounds * training.local_steps
        noise = calibrate_noise_multiplier(
            settings.epsilon, settings.delta, rate, steps, [], settings.accountant, "the federation", distance
        )

    def planned(ring_bits: int) -> DistributedGaussian:
        return plan_mechanism(
            parameters=parameters,
            hospitals=hospitals,
            colluders=settings.colluders,
            expected_patients=training.batch_size,
            clipping_norm=settings.clipping_norm,
            noise_multiplier=noise,
            ring_bits=32 if ring_bits == 32 else 64,
        )

    try:
        return planned(32)
    except HeadroomError:
        return planned(64)


def privacy_of_steps(config: Config, steps: int) -> dict[str, Scalar]:
    """What all parties may know of the privacy that `steps` steps spend: what was agreed, no hospital's own figure."""
    settings = config.privacy
    if settings.mechanism == "none":
        return {"mechanism": "none"}
    return {
        "mechanism": settings.mechanism,
        "unit": "patient",
        "steps": steps,
        "clipping norm": settings.clipping_norm,
        "delta": settings.delta,
        "epsilon of all rounds at most": settings.epsilon,
    }


@dataclass(frozen=True)
class Steps:
    """What a hospital keeps of one round's steps. It describes its patients without noise and never leaves it."""

    mean_loss: float
    clipped_fraction: float
    count: int
    method: str


def hospital_steps(
    domain: SecretDomain,
    model: nn.Module,
    data: PatientRecords,
    config: Config,
    mechanism: DistributedGaussian,
    sample_rate: float,
    noise_seed: Seed,
    sampling_seed: Seed | int | None,
    number: int,
    method: Method,
    step_done: Callable[[int, int], None],
) -> Steps:
    """Steps 1 to 4 at a hospital, `training.local_steps` times; `model` gets the parameters of the last one.

    Raises `HeadroomError` before anything is sent when a sum exceeds its bound, `PeerLostError` for a lost party.
    """
    links, steps = domain.runtime.links, config.training.local_steps
    working, order = working_copy(model), sampling_seed_of(sampling_seed)
    losses, used, clipped = 0.0, 0, 0
    for step in range(steps):
        # 1. and 2.
        links.set_phase(f"round {number} training")
        rows = sample_patients(data.records_of_patient, sample_rate, order.stream("poisson sampling", number, step))
        require_patients(mechanism, len(rows), links.name)
        sums = rounded_sum(working, sum_cross_entropy, data.inputs[rows], data.labels[rows], mechanism, method)
        losses += float(sums.losses.sum())
        clipped += int((sums.norms > config.privacy.clipping_norm).sum())
        used += len(rows)
        seed = noise_seed.derive("distributed noise", number, step)
        share = noised_share(mechanism, Private("clipped gradients", sums.total), seed, config.runtime.threads)
        # 3. and 4.
        links.set_phase(f"round {number} aggregation")
        why = f"round {number} step {step + 1}: noised gradient"
        open_to(domain, secure_sum(domain, share, 0, _SUM), [AGGREGATOR], why, privacy_of_steps(config, 1))
        shape = (mechanism.parameters,)
        load_flat_parameters(working, links.receive_tensor(AGGREGATOR, "global model", torch.float32, shape))
        step_done(step + 1, steps)
    _copy_parameters(working, model)
    return Steps(losses / used if used else float("nan"), clipped / used if used else 0.0, steps, method)


@dataclass
class ServerOptimizer:
    """SGD with momentum at the aggregator, in float64; `velocity` is its state over steps and rounds."""

    learning_rate: float
    momentum: float
    velocity: torch.Tensor | None = None

    def step(self, parameters: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """New parameters, float32 (P,), from float32 parameters and a float64 gradient of the same shape."""
        self.velocity = gradient if self.velocity is None else self.momentum * self.velocity + gradient
        return (parameters.double() - self.learning_rate * self.velocity).float()


def aggregator_steps(
    domain: SecretDomain,
    model: nn.Module,
    config: Config,
    mechanism: DistributedGaussian,
    optimizer: ServerOptimizer,
    number: int,
) -> None:
    """Steps 3 and 4 at the aggregator, whose own summand is zero; `model` gets the parameters of the last step."""
    links, working = domain.runtime.links, working_copy(model)
    for step in range(config.training.local_steps):
        zeros = Private("clipped gradients", torch.zeros(mechanism.parameters, dtype=mechanism.dtype))
        why = f"round {number} step {step + 1}: noised gradient"
        opened = open_to(domain, secure_sum(domain, zeros, 0, _SUM), [AGGREGATOR], why, privacy_of_steps(config, 1))
        assert opened is not None
        stepped = optimizer.step(flatten_parameters(working), mean_gradient(mechanism, opened.long()))
        load_flat_parameters(working, stepped)
        for peer in links.peers:
            links.send_tensor(peer, "global model", stepped)
    _copy_parameters(working, model)


@torch.no_grad()
def _copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """By name: tracing may have put the parameters of the working copy into another order."""
    stepped = dict(source.named_parameters())
    for name, parameter in trainable_parameters(target):
        if name in stepped:
            parameter.copy_(stepped[name])
