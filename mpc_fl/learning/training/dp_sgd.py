"""One round of local training with differential privacy: DP-SGD (Abadi et al., CCS 2016), patient by patient.

Each step draws patients independently with the sampling rate, takes one record of each, clips every patient's gradient
to the clipping norm, sums, adds Gaussian noise, divides by the expected number of patients, and steps. The sum moves by
at most the clipping norm when one patient is added or removed, whatever their data: the unit of privacy is the patient.

Opacus's optimizer does noise, scale and step; its generator is replaced by the project's stream cipher. Layers that
draw at random (dropout, stochastic depth) are off, BatchNorm keeps its statistics: every network trains in evaluation
mode, so that a patient's gradient depends on that patient alone.

FedProx (Li et al., MLSys 2020) adds mu/2 |w - w_0|^2 to the loss, w_0 where the round began. Its gradient mu (w - w_0) joins
after clipping, noise and division: clipping would let it crowd out patients. It costs no privacy, because w_0 is the
global model and w what earlier noised steps made of it: nothing else of a patient is in it (post-processing).

Where a hospital trains in several processes, they share out the clipping and summing of step 3 (`training_group`).
Sampling, noise and the step itself stay in the hospital's own process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import DataError, ModelError, PrivacyBudgetError
from mpc_fl.learning.data.dataset import PatientRecords
from mpc_fl.learning.models.parameters import flatten_parameters, trainable_parameters
from mpc_fl.learning.privacy.accounting import SubsampledGaussian
from mpc_fl.learning.training.noised_optimizer import StreamNoiseOptimizer, add_proximal_term
from mpc_fl.learning.training.per_sample_gradients import (
    Method,
    choose_per_sample_method,
    clipped_sum,
    sum_cross_entropy,
    working_copy,
)
from mpc_fl.learning.training.process_group import TrainingGroup
from mpc_fl.learning.training.sampling import sample_patients, sampling_seed_of


@dataclass(frozen=True)
class LocalRound:
    """Outcome of one round. `update` (new minus old parameters, float32 (P,)) and `event` may be released together;
    everything else describes the hospital's patients without noise and is for its own eyes."""

    update: torch.Tensor
    event: SubsampledGaussian | None
    steps: int
    patients: int
    records_used: int
    mean_loss: float
    clipped_fraction: float
    method: str
    seconds: float


def _check(data: PatientRecords, sample_rate: float) -> None:
    if len(data.inputs) != len(data.labels):
        raise DataError(f"{len(data.inputs)} inputs but {len(data.labels)} labels", "give one label per record")
    if not data.records_of_patient or any(len(records) == 0 for records in data.records_of_patient):
        raise DataError("a hospital needs patients, each with at least one record", "check the data folder")
    rows = torch.cat([torch.as_tensor(records) for records in data.records_of_patient])
    if len(torch.unique(rows)) != len(rows) or int(rows.min()) < 0 or int(rows.max()) >= len(data.inputs):
        raise DataError("the patients' records are not distinct rows of the inputs", "give every row to one patient")
    if not 0 < sample_rate <= 1:
        raise PrivacyBudgetError(f"the sampling rate must lie in (0, 1], got {sample_rate}", "see training.batch_size")


def _mean_gradient(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean gradient of the batch into `.grad`, without clipping; returns the summed loss."""
    value = sum_cross_entropy(model(inputs), labels)
    (value / len(inputs)).backward()
    return float(value.detach())


def train_locally(
    model: nn.Module,
    data: PatientRecords,
    config: Config,
    noise_multiplier: float | None,
    sample_rate: float,
    noise_seed: Seed,
    sampling_seed: Seed | int | None,
    round_number: int,
    progress: Callable[[int, int], None] | None = None,
    method: Method | None = None,
    group: TrainingGroup | None = None,
) -> LocalRound:
    """Train `config.training.local_steps` steps from the weights in `model`, which itself stays as it is.

    `sample_rate` is the probability of a patient per step; a step that draws nobody adds noise all the same. The noise
    comes from streams of `noise_seed` labelled by round, step and parameter, so the same round cannot be drawn
    twice from one seed. `sampling_seed`: a `Seed`, None for a fresh one, a number for simulation only. `method`
    overrides `config.training.per_sample_gradients` (choose once, use for all rounds). `progress(step, steps)` follows
    each step. `group` shares out each step over its processes; the result is the same up to rounding. With mechanism
    `none`: plain SGD on the same kind of batches, no clipping, no noise, no event. `config.training.proximal` adds the
    proximal term of FedProx to every step.

    Raises `DataError` for malformed data, `ModelError` if the method cannot handle the model or training diverges,
    `PrivacyBudgetError` for a missing noise multiplier, `SecrecyError` if a round is repeated with the same seeds,
    `TrainingProcessError` if a process of the group dies or is late.
    """
    start = time.perf_counter()
    _check(data, sample_rate)
    private = config.privacy.mechanism != "none"
    steps, patients = config.training.local_steps, len(data.records_of_patient)
    event: SubsampledGaussian | None = None
    if private:
        if noise_multiplier is None:
            raise PrivacyBudgetError("private training without a noise multiplier", "calibrate it to privacy.epsilon")
        event = SubsampledGaussian(noise_multiplier, sample_rate, steps)

    # 1. A copy in which every gradient depends on one patient only.
    working = working_copy(model)
    parameters = [parameter for _, parameter in trainable_parameters(working)]
    sgd = torch.optim.SGD(parameters, lr=config.training.learning_rate, momentum=config.training.momentum)
    if config.training.proximal:
        add_proximal_term(sgd, config.training.proximal)
    step = 0
    optimizer: StreamNoiseOptimizer | None = None
    if event is not None:
        configured = config.training.per_sample_gradients
        if method is None:
            method = (
                choose_per_sample_method(working, tuple(data.inputs.shape[1:])) if configured == "auto" else configured
            )
        optimizer = StreamNoiseOptimizer(
            sgd,
            noise_multiplier=event.noise_multiplier,
            clipping_norm=config.privacy.clipping_norm,
            expected_batch_size=sample_rate * patients,
            noise_stream=lambda index: noise_seed.stream("dp noise", round_number, step, index),
        )

    if group is not None:
        group.begin_round(working, private)
    order = sampling_seed_of(sampling_seed)
    loss_sum, used, clipped = 0.0, 0, 0
    for step in range(steps):
        # 2. Poisson-sample patients, one record each.
        rows = sample_patients(
            data.records_of_patient, sample_rate, order.stream("poisson sampling", round_number, step)
        )
        inputs, labels = data.inputs[rows], data.labels[rows]
        used += len(rows)
        # 3. Clip and sum, add noise, scale, step.
        if optimizer is not None:
            norm, by = config.privacy.clipping_norm, method or "loop"
            if group is None:
                sums = clipped_sum(working, sum_cross_entropy, inputs, labels, norm, by)
            else:
                sums = group.clipped_sum(working, inputs, labels, norm, by)
            loss_sum += float(sums.losses.sum())
            clipped += int((sums.norms > norm).sum())
            optimizer.zero_grad()
            optimizer.accumulate(sums.gradients)
            optimizer.step()
        elif len(rows):
            sgd.zero_grad()
            gradient = _mean_gradient if group is None else group.mean_gradient
            loss_sum += gradient(working, inputs, labels)
            sgd.step()
        if progress is not None:
            progress(step + 1, steps)

    # 4. What changed, in the order of the model's own parameters (tracing may have reordered the copy's).
    trained = dict(working.named_parameters())
    new = torch.cat([trained.get(name, old).detach().reshape(-1) for name, old in trainable_parameters(model)])
    update = new - flatten_parameters(model)
    if not bool(torch.isfinite(update).all()):
        raise ModelError(f"training diverged in round {round_number}", "lower training.learning_rate")
    return LocalRound(
        update=update,
        event=event,
        steps=steps,
        patients=patients,
        records_used=used,
        mean_loss=loss_sum / used if used else float("nan"),
        clipped_fraction=clipped / used if used else 0.0,
        method=(method or "loop") if private else "plain",
        seconds=time.perf_counter() - start,
    )
