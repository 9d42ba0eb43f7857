"""Strategies against plain implementations: torch's optimizers, autograd of the penalised loss, names of layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from mpc_fl.config.config import Config, parse_config
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ConfigError, ModelError
from mpc_fl.federation.global_model import calibrate_own
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import load_normalisation_state, normalisation_state
from mpc_fl.learning.models.parameters import (
    flatten_parameters,
    join_parts,
    load_flat_parameters,
    shared_coordinates,
    trainable_parameters,
)
from mpc_fl.learning.training.dp_sgd import LocalTraining, train_locally
from mpc_fl.learning.training.process_group import training_group
from mpc_fl.learning.training.server_optimizers import ServerAdam, ServerOptimizer, ServerSGD, server_optimizer

torch.set_num_threads(1)


class Records(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor
    records_of_patient: list[torch.Tensor]


def records(count: int = 12, size: int = 16, seed: int = 0) -> Records:
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.rand(count, 1, size, size, generator=generator), torch.arange(count) % 3
    return Records(inputs, labels, [torch.tensor([row]) for row in range(count)])


def configured(**sections: Any) -> Config:
    return parse_config({"data": {"image_size": 16}, "privacy": {"mechanism": "none"}, **sections}, "test")


def pseudo_gradients(count: int, size: int = 50, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.randint(-4, 3, (size,), generator=generator).double()
    return [scales * torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(count)]


def start(size: int = 50) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(2))


# --- server optimizers ------------------------------------------------------------------------------------------------


def test_fedavg_adds_the_mean_update_and_nothing_else() -> None:
    optimizer = server_optimizer(configured())
    flat = start()
    for update in pseudo_gradients(5):
        expected = (flat.double() + update).float()
        flat = optimizer.step(flat, -update)
        assert torch.equal(flat, expected)
    assert optimizer.state() == {}


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_momentum_is_that_of_torch(momentum: float) -> None:
    parameter = nn.Parameter(start().double())
    theirs = torch.optim.SGD([parameter], lr=0.3, momentum=momentum)
    ours, flat = ServerSGD(0.3, momentum), start()
    for gradient in pseudo_gradients(6):
        parameter.grad = gradient.clone()
        theirs.step()
        flat = ours.step(flat, gradient)
    torch.testing.assert_close(flat, parameter.detach().float(), rtol=1e-6, atol=1e-6)


def test_distributed_noise_steps_as_before() -> None:
    """Bit for bit what the aggregator computed when this was the only optimizer."""
    config = configured(privacy={"mechanism": "distributed", "noise_multiplier": 1.0})
    assert config.strategy == "fedsgd"
    optimizer = server_optimizer(config)
    flat = expected = start()
    velocity = None
    for gradient in pseudo_gradients(6):
        velocity = gradient if velocity is None else config.training.momentum * velocity + gradient
        expected = (expected.double() - config.training.learning_rate * velocity).float()
        flat = optimizer.step(flat, gradient)
        assert torch.equal(flat, expected)


def test_adam_is_torchs_without_bias_correction_and_with_an_initial_second_moment() -> None:
    """torch.optim.Adam with its corrections undone by the learning rate and epsilon of each step."""
    rate, beta, decay, tau = 0.05, 0.8, 0.99, 1e-2
    parameter = nn.Parameter(start().double())
    theirs = torch.optim.Adam([parameter], betas=(beta, decay))
    theirs.state[parameter] = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros(50, dtype=torch.float64),
        "exp_avg_sq": torch.full((50,), tau**2, dtype=torch.float64),
    }
    ours, flat = ServerAdam(rate, beta, tau), start()
    for step, gradient in enumerate(pseudo_gradients(6), start=1):
        correction = (1 - decay**step) ** 0.5
        theirs.param_groups[0].update(lr=rate * (1 - beta**step) / correction, eps=tau / correction)
        parameter.grad = gradient.clone()
        theirs.step()
        flat = ours.step(flat, gradient)
    torch.testing.assert_close(flat, parameter.detach().float(), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(flat, start())


def test_yogi_by_plain_loops() -> None:
    ours, flat = ServerAdam(0.1, 0.9, 1e-3, yogi=True), start(5)
    values, first, second = start(5).tolist(), [0.0] * 5, [1e-6] * 5
    for gradient in pseudo_gradients(8, 5):
        flat = ours.step(flat, gradient)
        for index, g in enumerate(gradient.tolist()):
            first[index] = 0.9 * first[index] + (1 - 0.9) * g
            difference = second[index] - g * g
            sign = (difference > 0) - (difference < 0)
            second[index] -= (1 - 0.99) * g * g * sign
            values[index] -= 0.1 * first[index] / (second[index] ** 0.5 + 1e-3)
        # The server rounds its parameters to float32 after each step.
        values = torch.tensor(values).tolist()
    torch.testing.assert_close(flat, torch.tensor(values), rtol=1e-5, atol=1e-6)


OPTIMIZERS = {
    "fedavg": lambda: ServerSGD(1.0),
    "fedavgm": lambda: ServerSGD(1.0, 0.9),
    "fedadam": lambda: ServerAdam(0.03, 0.9, 1e-3),
    "fedyogi": lambda: ServerAdam(0.03, 0.9, 1e-3, yogi=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_restored_state_goes_on_bit_for_bit(name: str, after: int, tmp_path: Path) -> None:
    gradients, whole, flat = pseudo_gradients(6), OPTIMIZERS[name](), start()
    for gradient in gradients[:after]:
        flat = whole.step(flat, gradient)
    save_file(whole.state(), tmp_path / "state.safetensors")
    resumed = OPTIMIZERS[name]()
    resumed.load_state(load_file(tmp_path / "state.safetensors"))
    other = flat.clone()
    for gradient in gradients[after:]:
        flat, other = whole.step(flat, gradient), resumed.step(other, gradient)
    assert torch.equal(flat, other)
    for key, value in whole.state().items():
        assert value.dtype == torch.float64 and torch.equal(value, resumed.state()[key])


def test_a_state_is_a_copy_and_gradients_stay_the_callers() -> None:
    for name in ("fedavgm", "fedadam"):
        optimizer, gradient = OPTIMIZERS[name](), pseudo_gradients(1)[0]
        kept = gradient.clone()
        flat = optimizer.step(start(), gradient)
        taken = {key: value.clone() for key, value in optimizer.state().items()}
        for value in optimizer.state().values():
            value.zero_()
        gradient.zero_()
        assert all(torch.equal(value, taken[key]) for key, value in optimizer.state().items())
        optimizer.step(flat, kept)


def test_states_of_another_strategy_are_refused() -> None:
    states = {}
    for name, make in OPTIMIZERS.items():
        optimizer = make()
        optimizer.step(start(), pseudo_gradients(1)[0])
        states[name] = optimizer.state()
    for name, state in (("fedavg", "fedavgm"), ("fedavgm", "fedadam"), ("fedadam", "fedavgm")):
        with pytest.raises(ModelError, match="not that of this strategy"):
            OPTIMIZERS[name]().load_state(states[state])
    wrong = {key: value.float() for key, value in states["fedadam"].items()}
    with pytest.raises(ModelError, match="not that of this strategy"):
        OPTIMIZERS["fedadam"]().load_state(wrong)


def test_steps_beyond_float32_are_refused_and_leave_no_trace() -> None:
    optimizer: ServerOptimizer
    for optimizer in (ServerSGD(1.0, 0.9), ServerAdam(1e39, 0.9, 1e-3)):
        with pytest.raises(ModelError, match="range of float32"):
            optimizer.step(start(), torch.full((50,), 1e39, dtype=torch.float64))
        assert optimizer.state() == {}
    with pytest.raises(ValueError, match="one length"):
        ServerSGD(1.0).step(start(), pseudo_gradients(1, 49)[0])


# --- FedProx ----------------------------------------------------------------------------------------------------------

PROXIMAL = {"strategy": "fedprox", "proximal": 0.7, "local_steps": 4, "batch_size": 12, "learning_rate": 0.2}


def penalised_descent(model: nn.Module, data: Records, config: Config) -> torch.Tensor:
    """Autograd of loss + mu/2 |w - w_0|^2 and torch's SGD, all records in every step; returns new minus old."""
    trained, old = copy.deepcopy(model).eval(), [p.detach().clone() for p in model.parameters()]
    sgd = torch.optim.SGD(trained.parameters(), lr=config.training.learning_rate, momentum=config.training.momentum)
    for _ in range(config.training.local_steps):
        distance = sum((p - origin).square().sum() for p, origin in zip(trained.parameters(), old, strict=True))
        loss = nn.functional.cross_entropy(trained(data.inputs), data.labels) + config.training.proximal / 2 * distance
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return flatten_parameters(trained) - flatten_parameters(model)


@pytest.mark.parametrize("method", ["plain", "loop", "vmap"])
def test_fedprox_is_descent_on_the_penalised_loss(method: str) -> None:
    """Private training too, with a clipping norm that clips nobody and next to no noise: the term is not clipped."""
    private = {"clipping_norm": 1e3, "noise_multiplier": 1e-9, "mechanism": "local", "epsilon": 1e9}
    config = configured(training=PROXIMAL, privacy=private if method != "plain" else {"mechanism": "none"})
    model, data = build_model(config, input_shape=(1, 16, 16), seed=3), records()
    noise = 1e-9 if method != "plain" else None
    chosen: Any = None if method == "plain" else method
    local = train_locally(model, data, LocalTraining(config, noise, 1.0, method=chosen), 1, Seed.from_system())
    expected = penalised_descent(model, data, config)
    torch.testing.assert_close(local.update, expected, rtol=1e-3, atol=2e-5)
    without = configured(training={**PROXIMAL, "strategy": "fedavg", "proximal": 0.0})
    free = train_locally(model, data, LocalTraining(without, None, 1.0), 1, Seed.from_system())
    assert float((free.update - expected).norm()) > 0.1 * float(expected.norm())
    assert float(local.update.norm()) < float(free.update.norm())


def test_the_proximal_term_is_outside_of_clipping_and_noise() -> None:
    """With equal sampling and noise the first steps are equal, and the second differ by exactly the term."""
    settings = {**PROXIMAL, "local_steps": 2, "momentum": 0.0}
    updates = {}
    for mu, strategy in ((0.0, "fedavg"), (0.7, "fedprox")):
        config = configured(
            training={**settings, "strategy": strategy, "proximal": mu},
            privacy={"mechanism": "local", "clipping_norm": 1e-6, "noise_multiplier": 1e5, "epsilon": 1e9},
        )
        model = build_model(config, input_shape=(1, 16, 16), seed=3)
        seed = Seed(b"x" * 32)
        updates[mu] = train_locally(model, records(), LocalTraining(config, 1e5, 1.0, 5, "loop"), 1, seed).update
        one = configured(
            training={**settings, "strategy": "fedavg", "proximal": 0.0, "local_steps": 1},
            privacy=config.privacy.model_dump(),
        )
        first = train_locally(model, records(), LocalTraining(one, 1e5, 1.0, 5, "loop"), 1, Seed(b"x" * 32)).update
    # w_2 = w_1 - lr (g_2 + mu (w_1 - w_0)); clipped gradients are 1e-6, so g_2 is noise and the same in both.
    torch.testing.assert_close(updates[0.7] - updates[0.0], -0.2 * 0.7 * first, rtol=1e-3, atol=1e-5)


@pytest.mark.processes
@pytest.mark.parametrize("mechanism", ["none", "local"])
def test_fedprox_in_several_processes(mechanism: str) -> None:
    privacy = {"mechanism": mechanism, "clipping_norm": 0.5, "noise_multiplier": 1e-9, "epsilon": 1e9}
    config = configured(training=PROXIMAL, privacy=privacy, site={"training_processes": 2})
    model, data = build_model(config, input_shape=(1, 16, 16), seed=3), records()
    noise = 1e-9 if mechanism == "local" else None

    def trained(group: Any) -> torch.Tensor:
        training = LocalTraining(config, noise, 0.6, 9, "loop", group)
        return train_locally(model, data, training, 1, Seed.from_system()).update

    with training_group(config, model) as group:
        torch.testing.assert_close(trained(group), trained(None), rtol=1e-3, atol=1e-5)


# --- FedBN ------------------------------------------------------------------------------------------------------------


def network(architecture: str, normalisation: str) -> nn.Module:
    channels, size = (3, 32) if architecture == "resnet18" else (1, 16)
    config = parse_config({"data": {"channels": channels, "image_size": size},
                           "model": {"architecture": architecture, "normalisation": normalisation}}, "test")  # fmt: skip
    return build_model(config, input_shape=(channels, size, size), seed=0)


def names_of(model: nn.Module, coordinates: torch.Tensor) -> set[str]:
    """Names of the parameters whose coordinates are set, all of a parameter or none."""
    names, place = set(), 0
    for name, parameter in trainable_parameters(model):
        part = coordinates[place : place + parameter.numel()]
        assert bool(part.all()) or not bool(part.any())
        place += parameter.numel()
        if bool(part.all()):
            names.add(name)
    assert place == len(coordinates)
    return names


@pytest.mark.parametrize("normalisation", ["frozen", "group"])
def test_small_cnn_shares_convolutions_and_the_classifier(normalisation: str) -> None:
    model = network("small_cnn", normalisation)
    assert names_of(model, shared_coordinates(model, True)) == {"0.weight", "4.weight", "9.weight", "9.bias"}
    assert bool(shared_coordinates(model, False).all())
    statistics = {"running_mean", "running_var", "num_batches_tracked"} if normalisation == "frozen" else set()
    expected = {f"{layer}.{name}" for layer in (1, 5) for name in {"weight", "bias"} | statistics}
    assert set(normalisation_state(model)) == expected


@pytest.mark.parametrize("normalisation", ["frozen", "group"])
def test_resnet18_keeps_its_twenty_normalisation_layers(normalisation: str) -> None:
    model = network("resnet18", normalisation)
    coordinates = shared_coordinates(model, True)
    own = {name for name, _ in trainable_parameters(model)} - names_of(model, coordinates)
    assert len(own) == 40 and all(".bn" in f".{name}" or "downsample.1" in name for name in own)
    assert int((~coordinates).sum()) == 9600 and len(coordinates) == 11_178_051
    assert len(normalisation_state(model)) == (100 if normalisation == "frozen" else 40)


def test_networks_without_normalisation_are_refused() -> None:
    with pytest.raises(ModelError, match="no normalisation layer"):
        shared_coordinates(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False)), True)


@given(st.integers(0, 2**31))
def test_parts_join_to_the_whole(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    coordinates = torch.rand(40, generator=generator) < 0.5
    own, sent = torch.randn(2, 40, generator=generator)
    joined = join_parts(sent[coordinates], own, coordinates)
    assert torch.equal(joined[coordinates], sent[coordinates]) and torch.equal(joined[~coordinates], own[~coordinates])
    everything = torch.ones(40, dtype=torch.bool)
    assert torch.equal(join_parts(sent, own, everything), sent)
    with pytest.raises(ValueError, match="do not make up"):
        join_parts(sent[1:], own, everything)


def test_a_round_leaves_each_hospital_its_own_normalisation() -> None:
    """Two hospitals and an aggregator, in one process: what is shared agrees, what is local does not travel."""
    config = configured(training={"local_normalisation": True, "local_steps": 3, "batch_size": 12})
    central = build_model(config, input_shape=(1, 16, 16), seed=3)
    coordinates = shared_coordinates(central, True)
    initial = normalisation_state(central)
    optimizer = server_optimizer(config)
    hospitals = [copy.deepcopy(central) for _ in range(2)]
    updates, own = [], []
    for rank, model in enumerate(hospitals):
        data = records(seed=rank)
        calibrate_own(model, data.inputs, config)
        local = train_locally(model, data, LocalTraining(config, None, 1.0), 1, Seed.from_system())
        updates.append(local.update[coordinates])
        own.append(flatten_parameters(model) + local.update)
    mean = torch.stack(updates).double().mean(dim=0)
    stepped = optimizer.step(flatten_parameters(central)[coordinates], -mean)
    load_flat_parameters(central, join_parts(stepped, flatten_parameters(central), coordinates))
    for rank, model in enumerate(hospitals):
        load_flat_parameters(model, join_parts(stepped, own[rank], coordinates))
        calibrate_own(model, records(seed=rank).inputs, config)
    flats = [flatten_parameters(model) for model in (central, *hospitals)]
    assert all(torch.equal(flat[coordinates], flats[0][coordinates]) for flat in flats)
    assert not torch.equal(flats[1][~coordinates], flats[2][~coordinates])
    assert all(torch.equal(value, initial[name]) for name, value in normalisation_state(central).items())
    # What all sign is the shared network with the initial normalisation, which each hospital can put together.
    for model in hospitals:
        common = copy.deepcopy(model)
        load_normalisation_state(common, initial)
        assert all(torch.equal(value, common.state_dict()[name]) for name, value in central.state_dict().items())
    with pytest.raises(ModelError, match="do not fit"):
        load_normalisation_state(network("small_cnn", "group"), initial)


@pytest.mark.parametrize(
    ("mechanism", "local", "changes"), [("none", True, True), ("none", False, False), ("local", True, False)]
)
def test_own_statistics_are_measured_only_where_no_privacy_is_promised(
    mechanism: str, local: bool, changes: bool
) -> None:
    config = configured(training={"local_normalisation": local}, privacy={"mechanism": mechanism})
    model = build_model(config, input_shape=(1, 16, 16), seed=3)
    before = normalisation_state(model)
    calibrate_own(model, records().inputs, config)
    after = normalisation_state(model)
    assert any(not torch.equal(before[name], after[name]) for name in before) == changes


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": {"strategy": "fedprox"}}, "needs a proximal coefficient"),
        ({"training": {"proximal": 0.1}}, "set strategy: fedprox"),
        ({"training": {"strategy": "fedprox", "proximal": 0.1, "local_steps": 1}}, "first local step"),
        ({"training": {"strategy": "fedprox", "proximal": 20.0}}, "overshoot"),
        ({"training": {"server_momentum": 0.9}}, "fedavg has no server_momentum"),
        ({"training": {"strategy": "fedavgm", "server_adaptivity": 0.1}}, "fedavgm has no server_adaptivity"),
        ({"training": {"strategy": "fedsgd"}}, "set training.local_steps to 1"),
        ({"training": {"strategy": "fedsgd", "local_steps": 1, "server_learning_rate": 2}}, "steps with training.learning"),
        ({"training": {"strategy": "fedavg"}, "privacy": {"mechanism": "distributed", "noise_multiplier": 1}}, "fedsgd"),
        (
            {"training": {"strategy": "fedadam", "proximal": 0.1}, "privacy": {"mechanism": "distributed", "noise_multiplier": 1}},
            "must be 0",
        ),
        (
            {"training": {"local_normalisation": True}, "privacy": {"mechanism": "distributed", "noise_multiplier": 1}},
            "whole noise at each hospital",
        ),
        ({"training": {"local_normalisation": True}, "model": {"architecture": "mlp"}}, "no normalisation layers"),
        ({"training": {"strategy": "fedadagrad"}}, "'training.strategy' is not valid"),
    ],
)  # fmt: skip
def test_combinations_that_make_no_sense_are_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "f.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value) and str(caught.value).startswith("f.yaml: ")


def test_each_strategy_has_its_optimizer() -> None:
    distributed = {"mechanism": "distributed", "noise_multiplier": 1.0}
    gradient, flat = pseudo_gradients(2), start()

    def after_two_steps(optimizer: ServerOptimizer) -> torch.Tensor:
        return optimizer.step(optimizer.step(flat, gradient[0]), gradient[1])

    for sections, expected in (
        ({}, ServerSGD(1.0)),
        ({"training": {"strategy": "fedprox", "proximal": 0.1}}, ServerSGD(1.0)),
        ({"training": {"strategy": "fedavg", "server_learning_rate": 0.5}}, ServerSGD(0.5)),
        ({"training": {"strategy": "fedavgm", "server_momentum": 0.4}}, ServerSGD(1.0, 0.4)),
        ({"training": {"strategy": "fedsgd", "local_steps": 1, "momentum": 0.3}}, ServerSGD(1.0, 0.3)),
        ({"training": {"learning_rate": 0.2, "momentum": 0.3}, "privacy": distributed}, ServerSGD(0.2, 0.3)),
        ({"training": {"strategy": "fedadam", "server_adaptivity": 0.1}}, ServerAdam(0.03, 0.9, 0.1)),
        ({"training": {"strategy": "fedyogi", "server_learning_rate": 0.2}, "privacy": distributed},
         ServerAdam(0.2, 0.9, 1e-3, yogi=True)),
    ):  # fmt: skip
        ours = server_optimizer(configured(**sections))
        assert torch.equal(after_two_steps(ours), after_two_steps(expected)), sections
