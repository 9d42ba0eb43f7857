"""Recipes of local steps: weights of classes, clipping without privacy, momentum that lasts over rounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ConfigError, ModelError
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.parameters import flatten_parameters, load_flat_parameters
from mpc_fl.learning.training.dp_sgd import LocalRound, LocalTraining, train_locally
from mpc_fl.learning.training.per_sample_gradients import clipped_sum, loss_with, sum_cross_entropy

torch.set_num_threads(1)


class Records(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor
    records_of_patient: list[torch.Tensor]


def records(count: int = 12) -> Records:
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(3))
    return Records(inputs, torch.arange(count) % 3, list(torch.arange(count).split(1)))


def configured(mechanism: str = "none", **training: Any) -> Config:
    return Config().with_values(
        model={"architecture": "mlp", "hidden": [5]},
        training={"rounds": 2, "local_steps": 3, "per_sample_gradients": "loop", "learning_rate": 0.1, **training},
        privacy={"mechanism": mechanism},
    )


def model() -> nn.Module:
    return build_model(configured(), input_shape=(4,), seed=0)


def trained(config: Config, number: int = 1, start: nn.Module | None = None, **changes: Any) -> LocalRound:
    noise = None if config.privacy.mechanism == "none" else 1.0
    training = replace(LocalTraining(config, noise, 1.0), **changes)
    return train_locally(start or model(), records(), training, number, Seed(bytes(32)).derive("round", number))


# ---- weights of classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["loop", "vmap", "hooks"])
def test_a_class_counts_as_often_as_its_weight_says(method: Any) -> None:
    network, data, weights = model(), records(), [2.0, 0.5, 1.0]
    weighted = clipped_sum(network, loss_with(weights), data.inputs, data.labels, 1e9, method)
    expected = [torch.zeros_like(parameter) for parameter in network.parameters()]
    for value, label in zip(data.inputs, data.labels, strict=True):
        loss = sum_cross_entropy(network(value.unsqueeze(0)), label.unsqueeze(0)) * weights[int(label)]
        for total, gradient in zip(expected, torch.autograd.grad(loss, list(network.parameters())), strict=True):
            total += gradient
    for one, other in zip(weighted.gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_weights_come_before_clipping() -> None:
    network, data = model(), records()
    heavy = clipped_sum(network, loss_with([1e6] * 3), data.inputs[:1], data.labels[:1], 0.5)
    norm = torch.cat([part.reshape(-1) for part in heavy.gradients]).norm()
    assert float(norm) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("mechanism", ["none", "local"])
def test_weights_of_one_change_nothing_and_others_do(mechanism: str) -> None:
    plain = trained(configured(mechanism)).update
    assert torch.equal(trained(configured(mechanism, class_weights=[1, 1, 1])).update, plain)
    assert not torch.allclose(trained(configured(mechanism, class_weights=[1, 3, 1])).update, plain, rtol=1e-3)


# ---- clipping without privacy ------------------------------------------------------------------------------------------


def test_clipping_bounds_every_step_and_nothing_below_its_norm() -> None:
    one = {"local_steps": 1, "momentum": 0.0}
    free = trained(configured(**one)).update
    norm = float(free.norm()) / 0.1
    bounded = trained(configured(**one, gradient_clipping=norm / 4)).update
    torch.testing.assert_close(bounded, free / 4, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(trained(configured(**one, gradient_clipping=norm * 2)).update, free)


def test_what_diverges_without_clipping_does_not_with_it() -> None:
    wild = {"learning_rate": 1e6, "local_steps": 30}
    with pytest.raises(ModelError, match="training.gradient_clipping"):
        trained(configured(**wild, momentum=0.99))
    bounded = trained(configured(**wild, momentum=0.0, gradient_clipping=1e-3)).update
    assert float(bounded.norm()) <= 30 * 1e6 * 1e-3 * 1.001


# ---- momentum over rounds ----------------------------------------------------------------------------------------------


def test_two_rounds_with_kept_momentum_are_one_of_all_their_steps() -> None:
    """Everybody is in every step, so rounds make no difference then."""
    config = configured(keep_momentum=True)
    first, between = trained(config), model()
    load_flat_parameters(between, flatten_parameters(between) + first.update)
    second = trained(config, 2, between, velocity=first.velocity)
    at_once = trained(configured(local_steps=6, rounds=1)).update
    torch.testing.assert_close(first.update + second.update, at_once, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(first.update + trained(config, 2, between).update, at_once, rtol=1e-2)


def test_momentum_is_kept_with_local_noise_unless_said_otherwise() -> None:
    """Phantoms and the demo learnt more with it in every run (docs/training.md); without noise a rate may then be too high."""
    assert configured("local").keeps_momentum and not configured("none").keeps_momentum
    assert configured("none", keep_momentum=True).keeps_momentum
    assert not configured("local", keep_momentum=False).keeps_momentum
    assert not configured("local", momentum=0.0).keeps_momentum
    assert not configured("local", strategy="fedsgd", local_steps=1).keeps_momentum
    assert not configured().with_values(privacy={"mechanism": "distributed", "noise_multiplier": 1.0}).keeps_momentum


def test_kept_momentum_moves_a_private_step_by_itself_alone() -> None:
    config, velocity = configured("local", keep_momentum=True, local_steps=1), torch.arange(43.0)
    with_it = trained(config, 2, sampling_seed=5, velocity=velocity).update
    without = trained(config, 2, sampling_seed=5).update
    torch.testing.assert_close(with_it - without, -0.1 * 0.9 * velocity, rtol=1e-4, atol=1e-5)


def test_the_velocity_of_a_round_is_torchs() -> None:
    config = configured(keep_momentum=True, local_steps=1)
    first = trained(config)
    torch.testing.assert_close(first.velocity, -first.update / 0.1, rtol=1e-4, atol=1e-6)
    assert trained(configured()).velocity is None


# ---- what has no effect ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"gradient_clipping": 1.0}}, "privacy.clipping_norm"),
        ({"training": {"class_weights": [1.0, 2.0]}}, "one number for each"),
        ({"training": {"class_weights": [1.0, 2.0, 0.0]}}, "not valid"),
        ({"training": {"keep_momentum": True, "momentum": 0.0}}, "no momentum of 0"),
        ({"training": {"keep_momentum": True, "strategy": "fedsgd", "local_steps": 1}}, "the aggregator has the momentum"),
        (
            {"training": {"keep_momentum": True}, "privacy": {"mechanism": "distributed", "noise_multiplier": 1.0}},
            "the aggregator has the momentum",
        ),
        ({"training": {"ema_decay": 0.9, "average_last": 2}}, "set one of them"),
        ({"model": {"architecture": "mlp", "weight_standardisation": True}}, "no trained convolutions"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused_in_one_line(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config().with_values(**sections)
    assert message in str(caught.value) and "\n" not in str(caught.value)
