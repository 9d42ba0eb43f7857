"""DP-SGD: per-sample gradients agree, sensitivity is the clipping norm, noise has its scale and its own source.

Statistical tests draw fresh secrets; each states how often it fails by chance.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import DataError, ModelError, PrivacyBudgetError, SecrecyError
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import calibrate_batchnorm
from mpc_fl.learning.models.parameters import flatten_buffers, flatten_parameters, trainable_parameters
from mpc_fl.learning.models.rewriting import without_in_place
from mpc_fl.learning.models.trainable import set_trainable
from mpc_fl.learning.privacy.accounting import SubsampledGaussian
from mpc_fl.learning.training.dp_sgd import LocalTraining, train_locally
from mpc_fl.learning.training.noised_optimizer import StreamNoiseOptimizer, gaussian_noise
from mpc_fl.learning.training.per_sample_gradients import (
    Method,
    choose_per_sample_method,
    clipped_sum,
    sum_cross_entropy,
)
from mpc_fl.learning.training.sampling import sample_patients, sampling_rate

torch.set_num_threads(1)


class Records(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor
    records_of_patient: list[torch.Tensor]


def batch(count: int, *shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def configured(architecture: str, normalisation: str = "group", **sections: dict[str, object]) -> Config:
    return Config().with_values(model={"architecture": architecture, "normalisation": normalisation}, **sections)


def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


# --- per-sample gradients ---------------------------------------------------------------------------------------------


def clipped_by_opacus(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, norm: float) -> torch.Tensor:
    """Opacus alone: its hooks, its clipping, its mean reduction."""
    observed = GradSampleModule(without_in_place(model).train(), loss_reduction="mean")
    parameters = list(observed.parameters())
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters, lr=1.0), noise_multiplier=0.0, max_grad_norm=norm, expected_batch_size=len(inputs)
    )
    nn.functional.cross_entropy(observed(inputs), labels).backward()
    optimizer.clip_and_accumulate()
    return joined([parameter.summed_grad for parameter in parameters])


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    ("architecture", "shape", "count"), [("small_cnn", (1, 32, 32), 6), ("resnet18", (3, 32, 32), 3)]
)
def test_all_methods_agree_with_opacus(architecture: str, shape: tuple[int, ...], count: int) -> None:
    # In float64: with float32, rounding puts some activations on the other side of a ReLU's kink.
    model = build_model(configured(architecture), input_shape=shape, seed=0).double()
    inputs, labels = batch(count, *shape)
    inputs = inputs.double()
    expected = clipped_by_opacus(model, inputs, labels, 0.7)
    pure = without_in_place(model)
    for method in ("loop", "vmap", "hooks"):
        result = clipped_sum(pure, sum_cross_entropy, inputs, labels, 0.7, method)
        torch.testing.assert_close(joined(result.gradients), expected, rtol=0, atol=1e-5)
        assert result.norms.shape == result.losses.shape == (count,)
    assert all(parameter.grad is None for parameter in pure.parameters())


def test_methods_agree_with_frozen_batchnorm_and_hooks_refuse_it() -> None:
    model = build_model(configured("small_cnn", "frozen"), input_shape=(1, 32, 32), seed=0)
    inputs, labels = batch(6, 1, 32, 32)
    calibrate_batchnorm(model, inputs)
    pure = without_in_place(model)
    loop = clipped_sum(pure, sum_cross_entropy, inputs, labels, 0.7, "loop")
    for method in ("vmap", "layers"):
        other = clipped_sum(pure, sum_cross_entropy, inputs, labels, 0.7, method)
        torch.testing.assert_close(joined(loop.gradients), joined(other.gradients), rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match="BatchNorm"):
        clipped_sum(pure, sum_cross_entropy, inputs, labels, 0.7, "hooks")
    assert choose_per_sample_method(model, (1, 32, 32), 8) in ("layers", "loop", "vmap")


@pytest.mark.parametrize("which", ["head", "lora:1"])
def test_batchnorm_that_is_not_trained_mixes_no_records_under_hooks(which: str) -> None:
    """Opacus's hooks want layers in training mode, where BatchNorm would take its statistics from the batch."""
    model = build_model(configured("small_cnn", "frozen"), input_shape=(1, 32, 32), seed=0)
    inputs, labels = batch(6, 1, 32, 32)
    calibrate_batchnorm(model, inputs)
    pure = without_in_place(set_trainable(model, which))
    for name, parameter in trainable_parameters(pure):
        if name.endswith("up.weight"):
            nn.init.constant_(parameter, 0.1)
    statistics = flatten_buffers(pure)
    loop, hooks, vectorised = (
        joined(clipped_sum(pure, sum_cross_entropy, inputs, labels, 0.7, method).gradients)
        for method in ("loop", "hooks", "vmap")
    )
    torch.testing.assert_close(hooks, loop, rtol=0, atol=1e-5)
    torch.testing.assert_close(vectorised, loop, rtol=0, atol=1e-5)
    assert torch.equal(flatten_buffers(pure), statistics)


def linear_model(seed: int = 0) -> nn.Module:
    return build_model(
        configured("mlp").with_values(model={"architecture": "mlp", "hidden": [5]}), input_shape=(4,), seed=seed
    )


records = st.lists(
    st.tuples(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4), st.integers(0, 2)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(records, st.floats(0.01, 100.0), st.sampled_from(["layers", "loop", "vmap", "hooks"]))
def test_one_patient_moves_the_sum_by_at_most_the_clipping_norm(
    rows: list[tuple[list[float], int]], norm: float, method: Method
) -> None:
    model = linear_model()
    inputs = torch.tensor([row for row, _ in rows])
    labels = torch.tensor([label for _, label in rows])
    with_all = joined(clipped_sum(model, sum_cross_entropy, inputs, labels, norm, method).gradients)
    without_last = joined(clipped_sum(model, sum_cross_entropy, inputs[:-1], labels[:-1], norm, method).gradients)
    # float32 rounding of the sum itself: 2^-24 of at most 5 clipping norms per addition.
    assert float((with_all - without_last).double().norm()) <= norm * (1 + 1e-5)


@pytest.mark.parametrize("method", ["layers", "loop", "vmap", "hooks"])
def test_a_poisoned_record_counts_as_zero(method: Method) -> None:
    model = linear_model()
    inputs, labels = batch(3, 4)
    expected = clipped_sum(model, sum_cross_entropy, inputs[:2], labels[:2], 1.0, method)
    for value in (float("nan"), float("inf"), 3e38):
        inputs[2] = value
        result = clipped_sum(model, sum_cross_entropy, inputs, labels, 1.0, method)
        assert bool(torch.isfinite(joined(result.gradients)).all())
        if value != 3e38:
            torch.testing.assert_close(joined(result.gradients), joined(expected.gradients))


def test_small_gradients_are_not_scaled_and_no_records_give_zero() -> None:
    model = linear_model()
    inputs, labels = batch(3, 4)
    value = sum_cross_entropy(model(inputs), labels)
    plain = torch.autograd.grad(value, list(model.parameters()))
    result = clipped_sum(model, sum_cross_entropy, inputs, labels, 1e6)
    torch.testing.assert_close(joined(result.gradients), joined(list(plain)))
    assert float(joined(clipped_sum(model, sum_cross_entropy, inputs[:0], labels[:0], 1.0).gradients).abs().max()) == 0


# --- noise ------------------------------------------------------------------------------------------------------------


def noisy_step(noise_multiplier: float, clipping_norm: float, expected_batch_size: float, size: int) -> torch.Tensor:
    parameter = nn.Parameter(torch.zeros(size))
    seed = Seed.from_system()
    optimizer = StreamNoiseOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        noise_multiplier=noise_multiplier,
        clipping_norm=clipping_norm,
        expected_batch_size=expected_batch_size,
        noise_stream=lambda index: seed.stream("noise", index),
    )
    optimizer.accumulate([torch.zeros(size)])
    optimizer.step()
    with pytest.raises(PrivacyBudgetError, match="without a clipped sum"):
        optimizer.add_noise()
    return -parameter.detach()


def test_noise_has_the_standard_deviation_of_the_mechanism() -> None:
    size, expected = 200_000, 1.7 * 0.3 / 16
    noise = noisy_step(1.7, 0.3, 16, size).double()
    # Mean and standard deviation of n normal values lie within 6 standard errors but for 4e-9 of all runs.
    assert abs(float(noise.mean())) < 6 * expected / size**0.5
    assert abs(float(noise.std()) - expected) < 6 * expected / (2 * size) ** 0.5


def test_noise_is_normal() -> None:
    values = np.sort(gaussian_noise(Seed.from_system().stream("test"), (100_000,)).numpy())
    cumulative = torch.special.ndtr(torch.from_numpy(values)).numpy()
    distance = np.abs(cumulative - (np.arange(len(values)) + 0.5) / len(values)).max()
    # Kolmogorov-Smirnov: P(distance > t) < 2 exp(-2 n t^2), here 4e-9.
    assert distance < (10 / len(values)) ** 0.5


def data(patients: int = 12, records: int = 2) -> Records:
    inputs, labels = batch(patients * records, 4)
    return Records(inputs, labels, list(torch.arange(patients * records).split(records)))


def small_config(**training: object) -> Config:
    return configured("mlp").with_values(
        model={"architecture": "mlp", "hidden": [5]},
        training={"local_steps": 3, "per_sample_gradients": "loop", **training},
    )


KEY = bytes(range(32))


def test_the_global_generator_has_no_influence_and_the_seeds_fix_everything() -> None:
    updates = []
    for disturbance in (1, 2):
        torch.rand(disturbance)
        state = torch.random.get_rng_state()
        result = train_locally(linear_model(), data(), LocalTraining(small_config(), 1.0, 0.5, 7), 0, Seed(KEY))
        assert torch.equal(torch.random.get_rng_state(), state)
        updates.append(result.update)
    assert torch.equal(updates[0], updates[1])
    other = train_locally(linear_model(), data(), LocalTraining(small_config(), 1.0, 0.5, 7), 0, Seed.from_system())
    assert not torch.equal(updates[0], other.update)


def test_a_round_cannot_be_drawn_twice_from_one_seed() -> None:
    seed = Seed(KEY)
    train_locally(linear_model(), data(), LocalTraining(small_config(), 1.0, 0.5), 0, seed)
    train_locally(linear_model(), data(), LocalTraining(small_config(), 1.0, 0.5), 1, seed)
    with pytest.raises(SecrecyError):
        train_locally(linear_model(), data(), LocalTraining(small_config(), 1.0, 0.5), 1, seed)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_patients_are_sampled_independently_with_one_record_each() -> None:
    patients, rate, draws = 400, 0.3, 200
    owners = torch.arange(patients * 3) // 3
    lists = list(torch.arange(patients * 3).split(3))
    seed = Seed.from_system()
    sizes, rows = [], []
    for step in range(draws):
        sample = sample_patients(lists, rate, seed.stream(step))
        assert len(torch.unique(owners[sample])) == len(sample)  # one record per patient
        sizes.append(len(sample))
        rows.append(sample)
    # 6 standard errors of a binomial mean (false alarm 2e-9); its variance within 50 %, over 7 standard errors of 10 %
    # (chi-square with 199 degrees of freedom, below 1e-5).
    spread = (patients * rate * (1 - rate)) ** 0.5
    assert abs(np.mean(sizes) - patients * rate) < 6 * spread / draws**0.5
    assert 0.5 < np.var(sizes) / spread**2 < 1.5
    taken = torch.cat(rows)
    for position in range(3):  # every record of a patient equally often, 6 standard errors
        share = float((taken % 3 == position).double().mean())
        assert abs(share - 1 / 3) < 6 * (2 / 9 / len(taken)) ** 0.5
    everybody = sample_patients(lists, 1.0, seed.stream("all"))
    assert torch.equal(owners[everybody], torch.arange(patients))


def test_a_step_without_patients_still_adds_noise_and_counts() -> None:
    result = train_locally(linear_model(), data(), LocalTraining(small_config(), 1.0, 1e-12), 0, Seed(KEY))
    assert result.records_used == 0 and result.steps == 3
    assert result.event == SubsampledGaussian(1.0, 1e-12, 3)
    assert float(result.update.abs().min()) > 0


# --- whole rounds -----------------------------------------------------------------------------------------------------


def test_a_round_leaves_the_model_alone_and_reports_the_difference() -> None:
    model = linear_model()
    before = flatten_parameters(model)
    seen: list[tuple[int, int]] = []
    result = train_locally(
        model,
        data(),
        LocalTraining(small_config(), 1.0, 0.5, 7),
        0,
        Seed(KEY),
        progress=lambda step, steps: seen.append((step, steps)),
    )
    assert torch.equal(flatten_parameters(model), before)
    assert result.update.shape == before.shape and result.update.dtype == torch.float32
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert result.method == "loop" and 0 <= result.clipped_fraction <= 1 and result.mean_loss > 0


def test_methods_give_the_same_round() -> None:
    rounds = [
        train_locally(
            linear_model(), data(), LocalTraining(small_config(per_sample_gradients=name), 1.0, 0.5, 7), 0, Seed(KEY)
        )
        for name in ("loop", "vmap", "hooks", "auto")
    ]
    for other in rounds[1:]:
        torch.testing.assert_close(other.update, rounds[0].update, rtol=0, atol=1e-5)


def test_without_mechanism_it_is_plain_sgd() -> None:
    config = small_config(local_steps=1, learning_rate=0.1).with_values(privacy={"mechanism": "none"})
    model, records_of_all = linear_model(), data(records=1)
    result = train_locally(model, records_of_all, LocalTraining(config, None, 1.0), 0, Seed(KEY))
    value = nn.functional.cross_entropy(model(records_of_all.inputs), records_of_all.labels)
    gradient = joined(list(torch.autograd.grad(value, list(model.parameters()))))
    torch.testing.assert_close(result.update, -0.1 * gradient, rtol=1e-4, atol=1e-6)
    assert result.event is None


def test_training_with_little_noise_learns() -> None:
    inputs, _ = batch(60, 4)
    labels = inputs[:, :3].argmax(1)
    records_of_all = Records(inputs, labels, list(torch.arange(60).split(1)))
    model = linear_model()
    config = small_config(local_steps=60, learning_rate=1.0, per_sample_gradients="hooks")
    result = train_locally(model, records_of_all, LocalTraining(config, 0.1, 0.5, 7), 0, Seed(KEY))
    before = float(nn.functional.cross_entropy(model(inputs), labels).detach())
    assert result.mean_loss < 0.8 * before


def test_bad_data_and_missing_noise_are_named() -> None:
    good, model, config = data(), linear_model(), small_config()

    def attempt(records_given: Records, noise: float | None = 1.0, rate: float = 0.5) -> None:
        train_locally(model, records_given, LocalTraining(config, noise, rate), 0, Seed.from_system())

    with pytest.raises(DataError, match="one label per record"):
        attempt(good._replace(labels=good.labels[1:]))
    with pytest.raises(DataError, match="at least one record"):
        attempt(good._replace(records_of_patient=[torch.tensor([], dtype=torch.int64)]))
    with pytest.raises(DataError, match="distinct rows"):
        attempt(good._replace(records_of_patient=[torch.tensor([0]), torch.tensor([0, 1])]))
    with pytest.raises(DataError, match="distinct rows"):
        attempt(good._replace(records_of_patient=[torch.tensor([99])]))
    with pytest.raises(PrivacyBudgetError, match="without a noise multiplier"):
        attempt(good, noise=None)
    with pytest.raises(PrivacyBudgetError, match="sampling rate"):
        attempt(good, rate=0.0)


def test_divergence_is_an_error() -> None:
    config = small_config(learning_rate=1e38).with_values(privacy={"mechanism": "none"})
    with pytest.raises(ModelError, match="lower training.learning_rate"):
        train_locally(linear_model(), data(), LocalTraining(config, None, 1.0), 0, Seed(KEY))


def test_sampling_rate_is_capped() -> None:
    assert sampling_rate(Config(), 400) == 64 / 400
    assert sampling_rate(Config(), 10) == 1.0
