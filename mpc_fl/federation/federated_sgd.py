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

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Missed, Rules
from mpc_fl.aggregation.words import broadcast, next_word, say
from mpc_fl.config.config import Config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.federation.planning import privacy_of_steps
from mpc_fl.learning.data.dataset import PatientRecords
from mpc_fl.learning.models.parameters import flatten_parameters, load_flat_parameters, trainable_parameters
from mpc_fl.learning.privacy.distributed_gaussian import (
    DistributedGaussian,
    mean_gradient,
    noised_share,
    require_patients,
)
from mpc_fl.learning.training.per_sample_gradients import Method, rounded_sum, sum_cross_entropy, working_copy
from mpc_fl.learning.training.sampling import sample_patients, sampling_seed_of
from mpc_fl.learning.training.server_optimizers import ServerOptimizer
from mpc_fl.links.links import Links
from mpc_fl.roles import AGGREGATOR
from mpc_fl.sharing.opening import SecretDomain


@dataclass(frozen=True)
class Steps:
    """What a hospital keeps of one round's steps. It describes its patients without noise and never leaves it."""

    mean_loss: float
    clipped_fraction: float
    count: int
    method: str


def _about(config: Config, number: int, step: int) -> Description:
    why = f"round {number} step {step + 1}: noised gradient"
    return Description("sum of clipped gradients", why, privacy_of_steps(config, 1))


def hospital_steps(
    domain: SecretDomain,
    rules: Rules,
    model: nn.Module,
    data: PatientRecords,
    config: Config,
    mechanism: DistributedGaussian,
    sample_rate: float,
    noise_seed: Seed,
    sampling_seed: Seed | int | None,
    round_of: tuple[int, int],
    hospitals: tuple[str, ...],
    method: Method,
    step_done: Callable[[int, int], None],
    before_keys: Callable[[], None] | None = None,
) -> tuple[tuple[str, ...], Steps] | Missed:
    """Steps 1 to 4 at a hospital, `training.local_steps` times; `model` gets the parameters of the last one.

    `round_of` is (round, attempt). Returns the hospitals of the last sum, or why there is none. `noise_seed` must be fresh
    for every attempt. Raises `HeadroomError` before anything is sent when a sum exceeds its bound, `PeerLostError` for a
    lost aggregator.
    """
    links, steps, number = domain.links, config.training.local_steps, round_of[0]
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
        agreed = AgreedSum(hospitals, ("gradient", *round_of, step), _about(config, number, step))
        hospitals = contribute(domain, rules, agreed, share, before_keys)
        if links.name not in hospitals:
            return "left out"
        if next_word(links, AGGREGATOR, ("model", "void"))["word"] == "void":
            return "void"
        shape = (mechanism.parameters,)
        load_flat_parameters(working, links.receive_tensor(AGGREGATOR, "global model", torch.float32, shape))
        step_done(step + 1, steps)
    _copy_parameters(working, model)
    kept = Steps(losses / used if used else float("nan"), clipped / used if used else 0.0, steps, method)
    return hospitals, kept


def send_global(links: Links, hospitals: tuple[str, ...], shared: torch.Tensor) -> None:
    """At the aggregator: the new global parameters, float32, for the hospitals of the sum they were made of."""
    say(links, hospitals, "model")
    broadcast(hospitals, lambda name: links.send_tensor(name, "global model", shared))


def aggregator_steps(
    domain: SecretDomain,
    rules: Rules,
    model: nn.Module,
    config: Config,
    mechanism: DistributedGaussian,
    optimizer: ServerOptimizer,
    round_of: tuple[int, int],
    hospitals: tuple[str, ...],
    starts: Mapping[str, str],
) -> tuple[str, ...]:
    """Steps 3 and 4 at the aggregator; `model` gets the parameters of the last step. Returns the hospitals of its sum.

    Raises `QuorumError` when too few are left, `SumLostError` when a sum cannot be opened any more; the optimizer has then
    stepped for the sums before, whose gradients are opened and spent.
    """
    links, working, number = domain.links, working_copy(model), round_of[0]
    parameters = flatten_parameters(working)
    for step in range(config.training.local_steps):
        agreed = AgreedSum(hospitals, ("gradient", *round_of, step), _about(config, number, step))
        hospitals, opened = collect(domain, rules, agreed, starts, mechanism.dtype, (mechanism.parameters,))
        # The mean over those present: `mean_gradient` divides by the number of all hospitals.
        gradient = mean_gradient(mechanism, opened.long()) * (mechanism.hospitals / len(hospitals))
        parameters = optimizer.step(parameters, gradient)
        send_global(links, hospitals, parameters)
    load_flat_parameters(working, parameters)
    _copy_parameters(working, model)
    return hospitals


@torch.no_grad()
def _copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """By name: tracing may have put the parameters of the working copy into another order."""
    stepped = dict(source.named_parameters())
    for name, parameter in trainable_parameters(target):
        if name in stepped:
            parameter.copy_(stepped[name])
