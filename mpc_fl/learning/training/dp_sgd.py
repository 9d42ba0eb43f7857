"""One round of local training with differential privacy: DP-SGD (Abadi et al., CCS 2016), patient by patient.

Each step draws patients independently with the sampling rate, takes one record of each, clips every patient's gradient
to the clipping norm, sums, adds Gaussian noise, divides by the configured batch size, and steps. The sum moves by at most
the clipping norm when one patient is added or removed, whatever their data: the unit of privacy is the patient. Nothing
else of a step depends on how many patients there are: the rate is public (`federation.planning`), and so is the divisor.

Opacus's optimizer does noise, scale and step; its generator is replaced by the project's stream cipher. Layers that
draw at random (dropout, stochastic depth) are off, BatchNorm keeps its statistics: every network trains in evaluation
mode, so that a patient's gradient depends on that patient alone.

FedProx (Li et al., MLSys 2020) adds mu/2 |w - w_0|^2 to the loss, w_0 where the round began. Its gradient mu (w - w_0) joins
after clipping, noise and division: clipping would let it crowd out patients. It costs no privacy, because w_0 is the
global model and w what earlier noised steps made of it: nothing else of a patient is in it (post-processing).

An augmented patient's gradient is the mean over random copies of its record, before clipping (`augmentation`), so it moves the sum
by no more. Weights of classes scale the loss before clipping, too. The learning rate follows a schedule of public numbers.

Momentum starts at zero in every round, or goes on from the round before (`training.keep_momentum`): it is made of earlier noised
steps, which were charged, and stays at the hospital.

Where a hospital trains in several processes, they share out the clipping and summing of step 3 (`process_group`).
Sampling, noise and the step itself stay in the hospital's own process. So they do on its CPU where gradients are computed on
a GPU (`device`): for the noise every step brings them from there, and then takes the parameters up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.crypto.stream_cipher import Seed, Stream
from mpc_fl.errors import DataError, ModelError, PrivacyBudgetError
from mpc_fl.learning.data.dataset import PatientRecords
from mpc_fl.learning.device import CPU, Device, at_work, follow, gradients_of, on_device, repeatable
from mpc_fl.learning.models.parameters import flatten_parameters, trainable_parameters
from mpc_fl.learning.privacy.accounting import SubsampledGaussian
from mpc_fl.learning.training.augmentation import Inputs, augmented, copies_per_record
from mpc_fl.learning.training.batch_pieces import pieces_of
from mpc_fl.learning.training.per_sample_gradients import (
    Loss,
    Method,
    choose_per_sample_method,
    clipped_sum,
    loss_with,
    require_gradients_of_each,
    working_copy,
)
from mpc_fl.learning.training.proximal_term import add_proximal_term
from mpc_fl.learning.training.sampling import sample_patients, sampling_seed_of
from mpc_fl.learning.training.schedules import learning_rate_factor

if TYPE_CHECKING:
    from mpc_fl.learning.training.process_group import TrainingGroup


@dataclass(frozen=True)
class LocalTraining:
    """How one hospital trains, the same in every round of a run.

    `noise_multiplier`: None without differential privacy. `sample_rate`: the probability of a patient per step.
    `sampling_seed`: a `Seed`, None for a fresh one in every round, a number for simulation only. `method` overrides
    `training.per_sample_gradients` (choose once, use for all rounds). `group` shares out each step over its processes; the
    result is the same up to rounding. `velocity`, float32 (P,), is the momentum a round begins with; None: zero. `device`: where
    gradients are computed.
    """

    config: Config
    noise_multiplier: float | None
    sample_rate: float
    sampling_seed: Seed | int | None = None
    method: Method | None = None
    group: TrainingGroup | None = None
    velocity: torch.Tensor | None = None
    device: Device = CPU

    @property
    def event(self) -> SubsampledGaussian | None:
        """What a round spends; None without differential privacy. Raises `PrivacyBudgetError` without a noise multiplier."""
        if self.config.privacy.mechanism == "none":
            return None
        if self.noise_multiplier is None:
            raise PrivacyBudgetError("private training without a noise multiplier", "calibrate it to privacy.epsilon")
        return SubsampledGaussian(self.noise_multiplier, self.sample_rate, self.config.training.local_steps)


@dataclass(frozen=True)
class LocalRound:
    """Outcome of one round. `update` (new minus old parameters, float32 (P,)) and `event` may be released together;
    everything else describes the hospital's patients without noise and is for its own eyes, `velocity` (float32 (P,)) too: it is
    the momentum after the last step, None where it is not kept."""

    update: torch.Tensor
    event: SubsampledGaussian | None
    steps: int
    records_used: int
    mean_loss: float
    clipped_fraction: float
    method: str
    velocity: torch.Tensor | None = None


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


def _mean_gradient(model: nn.Module, loss: Loss, inputs: Inputs, labels: torch.Tensor) -> float:
    """Mean gradient of the batch into `.grad`, without clipping; returns the summed loss. In pieces that fit memory."""
    total, copies = 0.0, copies_per_record(inputs)
    for piece, own in pieces_of(inputs, labels):
        value = loss(model(piece), own) / copies
        (value / len(inputs)).backward()
        total += float(value.detach())
    return total


@dataclass
class _Measured:
    """What a hospital keeps of its steps, summed up."""

    losses: float = 0.0
    records: int = 0
    clipped: int = 0

    def mean_loss(self) -> float:
        return self.losses / self.records if self.records else float("nan")

    def clipped_fraction(self) -> float:
        return self.clipped / self.records if self.records else 0.0


# Makes one step from inputs of N records and labels int64 (N,), perhaps of no patient; `measured` gets its losses.
TakeStep = Callable[[Inputs, torch.Tensor, _Measured], None]


def _private_steps(
    working: nn.Module,
    sgd: torch.optim.SGD,
    training: LocalTraining,
    method: Method,
    noise_stream: Callable[[int], Stream],
) -> TakeStep:
    """Steps that clip every patient's gradient and add noise, of `noise_stream` for each parameter anew."""
    from mpc_fl.learning.training.noised_optimizer import StreamNoiseOptimizer

    norm, group, noise_multiplier = training.config.privacy.clipping_norm, training.group, training.noise_multiplier
    loss = loss_with(training.config.training.class_weights)
    assert noise_multiplier is not None  # `event` came first
    optimizer = StreamNoiseOptimizer(
        sgd,
        noise_multiplier=noise_multiplier,
        clipping_norm=norm,
        expected_batch_size=training.config.training.batch_size,
        noise_stream=noise_stream,
    )

    computed = on_device(working, training.device)

    def take(inputs: Inputs, labels: torch.Tensor, measured: _Measured) -> None:
        if group is None:
            follow(computed, working)
            sums = clipped_sum(computed, loss, inputs, labels, norm, method)
        else:
            sums = group.clipped_sum(working, inputs, labels, norm, method)
        measured.losses += float(sums.losses.sum())
        measured.clipped += int((sums.norms > norm).sum())
        optimizer.zero_grad()
        optimizer.accumulate(sums.gradients)
        optimizer.step()

    return take


def _plain_steps(working: nn.Module, sgd: torch.optim.SGD, training: LocalTraining) -> TakeStep:
    """Steps of SGD without clipping of patients and without noise; a batch of nobody makes none.

    `training.gradient_clipping` shortens the batch's mean gradient, which bounds a step and protects nobody.
    """
    settings, group = training.config.training, training.group
    loss, norm = loss_with(settings.class_weights), settings.gradient_clipping
    parameters = [parameter for _, parameter in trainable_parameters(working)]
    computed = on_device(working, training.device)

    def take(inputs: Inputs, labels: torch.Tensor, measured: _Measured) -> None:
        if not len(inputs):
            return
        sgd.zero_grad()
        if group is None:
            follow(computed, working)
            measured.losses += _mean_gradient(computed, loss, inputs, labels)
            gradients_of(computed, working)
        else:
            measured.losses += group.mean_gradient(working, inputs, labels)
        if norm is not None:
            nn.utils.clip_grad_norm_(parameters, norm)
        sgd.step()

    return take


def _method_of(training: LocalTraining, working: nn.Module, input_shape: tuple[int, ...]) -> Method:
    if training.method is not None:
        return training.method
    configured = training.config.training.per_sample_gradients
    if configured != "auto":
        require_gradients_of_each(on_device(working, training.device), input_shape, configured)
        return configured
    copies = training.config.training.augmentation.copies
    return choose_per_sample_method(working, input_shape, device=training.device, copies=copies)


def _update(model: nn.Module, working: nn.Module, round_number: int) -> torch.Tensor:
    """What changed, in the order of the model's own parameters (tracing may have reordered the copy's)."""
    trained = dict(working.named_parameters())
    new = torch.cat([trained.get(name, old).detach().reshape(-1) for name, old in trainable_parameters(model)])
    update = new - flatten_parameters(model)
    if not bool(torch.isfinite(update).all()):
        fix = "lower training.learning_rate, or without privacy set training.gradient_clipping=1"
        raise ModelError(f"training diverged in round {round_number}", fix)
    return update


def _begin_with(sgd: torch.optim.SGD, model: nn.Module, working: nn.Module, velocity: torch.Tensor | None) -> None:
    """Let the first step have momentum `velocity`, float32 (P,) in the order of the model's own parameters."""
    if velocity is None:
        return
    own = trainable_parameters(model)
    pieces = dict(zip((name for name, _ in own), velocity.split([value.numel() for _, value in own]), strict=True))
    for name, parameter in trainable_parameters(working):
        sgd.state[parameter]["momentum_buffer"] = pieces[name].view_as(parameter).clone()


def _velocity(sgd: torch.optim.SGD, model: nn.Module, working: nn.Module) -> torch.Tensor:
    """The momentum after the last step, as `_begin_with` takes it; zero for a parameter that was never stepped."""
    trained = dict(working.named_parameters())
    moving = {name: sgd.state.get(parameter, {}).get("momentum_buffer") for name, parameter in trained.items()}
    of_model = trainable_parameters(model)
    pieces = [(torch.zeros_like(old) if moving.get(name) is None else moving[name]) for name, old in of_model]
    return torch.cat([piece.detach().reshape(-1) for piece in pieces])


def train_locally(
    model: nn.Module,
    data: PatientRecords,
    training: LocalTraining,
    round_number: int,
    noise_seed: Seed,
    progress: Callable[[int, int], None] | None = None,
) -> LocalRound:
    """Train the configured number of steps from the weights in `model`, which itself stays as it is.

    A step that draws nobody adds noise all the same. The noise comes from streams of `noise_seed` labelled by round, step
    and parameter, so the same round cannot be drawn twice from one seed. `progress(step, steps)` follows each step. With
    mechanism `none`: plain SGD on the same kind of batches, no clipping, no noise, no event.

    Raises `DataError` for malformed data, `ModelError` if the method cannot handle the model or training diverges,
    `PrivacyBudgetError` for a missing noise multiplier, `SecrecyError` if a round is repeated with the same seeds,
    `TrainingProcessError` if a process of the group dies or is late.
    """
    _check(data, training.sample_rate)
    event, settings = training.event, training.config.training

    # 1. A copy in which every gradient depends on one patient only.
    working = working_copy(model)
    parameters = [parameter for _, parameter in trainable_parameters(working)]
    sgd = torch.optim.SGD(parameters, lr=settings.learning_rate, momentum=settings.momentum)
    if settings.proximal:
        add_proximal_term(sgd, settings.proximal)
    if training.config.keeps_momentum:
        _begin_with(sgd, model, working, training.velocity)
    step, method = 0, None
    if event is None:
        take_step = _plain_steps(working, sgd, training)
    else:
        method = _method_of(training, working, tuple(data.inputs.shape[1:]))
        take_step = _private_steps(
            working, sgd, training, method, lambda index: noise_seed.stream("dp noise", round_number, step, index)
        )
    if training.group is not None:
        training.group.begin_round(working, event is not None)

    order, measured = sampling_seed_of(training.sampling_seed), _Measured()
    for step in range(settings.local_steps):
        # 2. Poisson-sample patients, one record each.
        drawn = order.stream("poisson sampling", round_number, step)
        rows = sample_patients(data.records_of_patient, training.sample_rate, drawn)
        measured.records += len(rows)
        inputs = augmented(settings.augmentation, data.inputs[rows], order.derive("augmentation", round_number, step))
        # 3. Clip and sum, add noise, scale, step.
        for parameter_group in sgd.param_groups:
            parameter_group["lr"] = settings.learning_rate * learning_rate_factor(settings, round_number, step)
        with at_work(training.device), repeatable():
            take_step(inputs, data.labels[rows], measured)
        if progress is not None:
            progress(step + 1, settings.local_steps)

    # 4. What changed.
    return LocalRound(
        update=_update(model, working, round_number),
        event=event,
        steps=settings.local_steps,
        records_used=measured.records,
        mean_loss=measured.mean_loss(),
        clipped_fraction=measured.clipped_fraction(),
        method=method or "plain",
        velocity=_velocity(sgd, model, working) if training.config.keeps_momentum else None,
    )
