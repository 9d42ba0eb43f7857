"""Steps through the trained part give what steps through the whole network give, and the rest is passed once a record."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpc_fl.config.config import Config, parse_config
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ModelError
from mpc_fl.federation.planning import mechanism_of
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.device import CPU
from mpc_fl.learning.models.feature_cache import FeatureCache
from mpc_fl.learning.models.parameters import flatten_parameters, load_flat_parameters
from mpc_fl.learning.models.trainable import set_trainable
from mpc_fl.learning.training import frozen_part
from mpc_fl.learning.training.dp_sgd import LocalRound, LocalTraining, train_locally
from mpc_fl.learning.training.frozen_part import (
    FrozenOutputs,
    frozen_outputs_of,
    trained_part_and_records,
    trained_part_of,
)
from mpc_fl.learning.training.per_sample_gradients import rounded_sum, sum_cross_entropy, working_copy
from mpc_fl.learning.training.process_group import training_group

ROWS = 12
PARAMETERS = {"head": 4 * 36 * 3 + 3, "last:2": 4 * 36 * 3 + 3 + 8}
PRIVATE: dict[str, Any] = {"mechanism": "local", "noise_multiplier": 1e-3, "epsilon": 1e9, "delta": 1e-3}
DISTRIBUTED: dict[str, Any] = {"mechanism": "distributed", "noise_multiplier": 4.0, "epsilon": 200.0, "delta": 1e-3}


class CountedConv2d(nn.Conv2d):
    """A convolution that counts the records which pass through it."""

    passed = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CountedConv2d.passed += len(x)
        return super().forward(x)


class Drawing(nn.Module):
    """Adds something that is drawn anew in each call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


class DrawingConv2d(nn.Conv2d):
    """A convolution, which tracing keeps whole, that adds something drawn anew in each call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.rand_like(x)


class Remembering(nn.Module):
    """Adds what it had from the call before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = x + self.last
        self.last.copy_(x.detach().mean())
        return value


def configured(privacy: dict[str, Any], **training: Any) -> Config:
    values = {"trainable": "head", "local_steps": 3, "batch_size": 8, "learning_rate": 0.5, **training}
    return parse_config({"data": {"image_size": 8}, "training": values, "privacy": privacy}, "test")


def network(*before_head: nn.Module, trainable: str = "head") -> nn.Module:
    torch.manual_seed(3)
    layers = [CountedConv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Dropout(0.5), *before_head]
    return set_trainable(nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 36, 3)), trainable)


def records(rows: list[int] | None = None) -> Dataset:
    """One record of each patient, or two of the first ones."""
    rows = list(range(ROWS)) if rows is None else rows
    inputs = torch.randn(ROWS, 1, 8, 8, generator=torch.Generator().manual_seed(5))[rows]
    patients = torch.arange(len(rows)) // 2
    return Dataset(inputs, torch.arange(ROWS)[rows] % 3, patients, tuple(map(str, rows)))


def inputs_of(model: nn.Module, config: Config) -> FrozenOutputs:
    found = frozen_outputs_of(model, config, CPU, ROWS)
    assert found is not None
    return found


def in_both_ways(model: nn.Module, config: Config, **options: Any) -> tuple[LocalRound, LocalRound]:
    """A round of the whole network, and of its head."""
    noise = config.privacy.noise_multiplier if config.privacy.mechanism == "local" else None
    training = LocalTraining(config, noise, 0.7, Seed(b"s" * 32), **options)
    head, of_head = trained_part_and_records(model, records(), inputs_of(model, config))
    whole = train_locally(model, records(), training, 1, Seed(b"n" * 32))
    return whole, train_locally(
        head, of_head, LocalTraining(config, noise, 0.7, Seed(b"s" * 32), **options), 1, Seed(b"n" * 32)
    )


@pytest.mark.parametrize("privacy", [{"mechanism": "none"}, PRIVATE], ids=["no noise", "local noise"])
@pytest.mark.parametrize("method", ["loop", "vmap", "hooks"])
@pytest.mark.parametrize("trainable", PARAMETERS)
def test_a_round_of_the_trained_part_is_the_round_of_the_network(
    privacy: dict[str, Any], method: str, trainable: str
) -> None:
    proximal = {"momentum": 0.9, "proximal": 0.1, "strategy": "fedprox", "trainable": trainable}
    whole, alone = in_both_ways(network(trainable=trainable), configured(privacy, **proximal), method=method)
    assert len(whole.update) == PARAMETERS[trainable]
    assert float(whole.update.norm()) > 0.1
    torch.testing.assert_close(alone.update, whole.update, rtol=0, atol=1e-5)
    assert alone.mean_loss == pytest.approx(whole.mean_loss, abs=1e-5)
    assert alone.records_used == whole.records_used and alone.clipped_fraction == whole.clipped_fraction
    assert alone.event == whole.event


@pytest.mark.parametrize("trainable", PARAMETERS)
def test_a_rounded_sum_of_the_trained_part_is_that_of_the_network_up_to_rounding(trainable: str) -> None:
    config, model = configured(DISTRIBUTED, trainable=trainable), network(trainable=trainable)
    mechanism, data = mechanism_of(config, PARAMETERS[trainable]), records()
    head, of_head = trained_part_and_records(model, data, inputs_of(model, config))
    everybody = torch.arange(len(data))
    for method in ("loop", "vmap", "hooks"):
        whole = rounded_sum(working_copy(model), sum_cross_entropy, data.inputs, data.labels, mechanism, method)
        alone = rounded_sum(
            working_copy(head), sum_cross_entropy, of_head.inputs[everybody], data.labels, mechanism, method
        )
        assert int(whole.total.long().abs().max()) > 0.01 * mechanism.scale
        apart = (alone.total.long() - whole.total.long()).abs().max()
        assert int(apart) <= len(data) * (1 + 1e-6 * mechanism.scale)
        torch.testing.assert_close(alone.norms, whole.norms, rtol=1e-5, atol=0)


@settings(max_examples=6, deadline=None)
@given(
    st.permutations(range(ROWS)),
    st.integers(2, ROWS),
    st.sampled_from(["loop", "vmap", "hooks"]),
    st.sampled_from(sorted(PARAMETERS)),
)
def test_what_a_record_adds_is_its_own_whoever_else_is_there(
    order: list[int], count: int, method: Any, trainable: str
) -> None:
    config, model = configured(DISTRIBUTED, trainable=trainable), network(trainable=trainable)
    mechanism = mechanism_of(config, PARAMETERS[trainable])

    def added(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        data = records(rows)
        head, of_head = trained_part_and_records(model, data, inputs_of(model, config))
        values = of_head.inputs[torch.arange(len(rows))]
        return values, rounded_sum(head, sum_cross_entropy, values, data.labels, mechanism, method).total

    values, total = added(order[:count])
    fewer, without = added(order[1:count])
    own, alone = added(order[:1])
    assert torch.equal(values, torch.cat([own, fewer]))
    assert torch.equal(total, without + alone)


def test_a_record_passes_once_through_the_frozen_part_however_many_steps() -> None:
    config, model, data = configured(PRIVATE, local_steps=6), network(), records()
    inputs = inputs_of(model, config)
    CountedConv2d.passed, used = 0, 0
    for number in range(1, 4):
        head, of_head = trained_part_and_records(model, data, inputs)
        training = LocalTraining(config, 1e-3, 1.0, Seed(b"s" * 32), "vmap")
        done = train_locally(head, of_head, training, number, Seed(b"n" * 32))
        load_flat_parameters(model, flatten_parameters(model) + done.update)
        used += done.records_used
    assert used == 3 * 6 * data.patient_count
    assert 0 < CountedConv2d.passed <= len(data)
    of_head.inputs[torch.arange(len(data))]
    assert CountedConv2d.passed == len(data)


def test_records_that_nobody_draws_are_not_computed() -> None:
    config, model, data = configured(PRIVATE), network(), records()
    _, of_head = trained_part_and_records(model, data, inputs_of(model, config))
    CountedConv2d.passed = 0
    assert of_head.inputs[torch.tensor([4, 4, 1])].shape == (3, 4 * 36)
    assert CountedConv2d.passed == 2 and of_head.inputs.shape == (len(data), 4 * 36)
    assert not len(of_head.inputs[torch.tensor([], dtype=torch.int64)])


@pytest.mark.parametrize(
    "training",
    [
        {"augmentation": {"flip": True, "copies": 2}},
        {"trainable": "last:2", "augmentation": {"flip": True}},
        {"trainable": "bias"},
        {"trainable": "all"},
    ],
    ids=["copies", "copies, last:2", "bias", "all"],
)
def test_what_changes_before_the_trained_layers_takes_the_whole_network(training: dict[str, Any]) -> None:
    assert frozen_outputs_of(network(), configured(PRIVATE), CPU, ROWS) is not None
    assert frozen_outputs_of(network(), configured(PRIVATE, **training), CPU, ROWS) is None


@pytest.mark.parametrize("layer", [Drawing(), Remembering(), nn.Flatten(0)], ids=["draws", "keeps", "mixes"])
def test_a_network_that_draws_keeps_or_mixes_before_what_is_trained_is_taken_whole(layer: nn.Module) -> None:
    config, plain = configured(PRIVATE), network()
    assert frozen_outputs_of(plain, config, CPU, ROWS) is not None
    assert frozen_outputs_of(nn.Sequential(layer, *plain), config, CPU, ROWS) is None


def why_whole(model: nn.Module, config: Config, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, "mpc_fl"):
        assert frozen_outputs_of(model, config, CPU, ROWS) is None
    (message,) = caplog.messages
    return message.partition("steps pass through the whole network: ")[2]


def test_why_steps_take_the_whole_network_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, local = {"augmentation": {"flip": True}}, {"local_normalisation": True}
    assert why_whole(network(), configured(PRIVATE, **copies), caplog) == "copies of records are drawn anew"
    assert why_whole(network(), configured(PRIVATE, **local), caplog) == "normalisation is this hospital's own"
    nothing_before = set_trainable(nn.Sequential(nn.Linear(8, 3)), "head")
    assert why_whole(nothing_before, configured(PRIVATE), caplog) == "it cannot be cut before what is trained"
    drawing = nn.Sequential(DrawingConv2d(1, 1, 1), *network()).requires_grad_(False)
    drawing[-1].requires_grad_(True)
    assert "gives another value of the same record" in why_whole(drawing, configured(PRIVATE), caplog)
    monkeypatch.setattr(frozen_part, "LARGEST_BYTES", ROWS * 4 * 4 * 36 - 1)
    assert why_whole(network(), configured(PRIVATE), caplog) == (
        "what the trained layers read of 12 records takes 1 MiB, more than 1 MiB"
    )
    monkeypatch.setattr(frozen_part, "LARGEST_BYTES", ROWS * 4 * 4 * 36)
    with caplog.at_level(logging.INFO, "mpc_fl"):
        assert frozen_outputs_of(network(), configured(PRIVATE), CPU, ROWS) is not None
    assert caplog.messages[-1] == "steps begin at the trained layers: what they read takes 1 MiB"


def read_with(cache: FeatureCache, model: nn.Module, trainable: str = "head") -> tuple[torch.Tensor, int]:
    """All rows of a hospital that begins, and how many passed through what is not trained."""
    outputs = inputs_of(model, configured(PRIVATE, trainable=trainable))
    outputs.keep_in(cache)
    CountedConv2d.passed = 0
    _, of_part = trained_part_and_records(model, records(), outputs)
    return of_part.inputs[torch.arange(ROWS)], CountedConv2d.passed


@pytest.mark.parametrize("trainable", PARAMETERS)
def test_a_hospital_that_begins_again_reads_what_it_kept_bit_for_bit(
    tmp_path: Path, trainable: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain, passed = read_with(FeatureCache(tmp_path, Seed(b"k" * 32)), network(trainable=trainable), trainable)
    assert passed == ROWS and len(list(tmp_path.glob("*/*.sealed"))) == ROWS
    assert not any(path.read_bytes().count(plain[0].numpy().tobytes()[:16]) for path in tmp_path.glob("*/*"))
    model = network(trainable=trainable)
    load_flat_parameters(model, flatten_parameters(model) + 1.0)  # of the trained part, which another run begins with
    with caplog.at_level(logging.INFO, "mpc_fl"):
        again, passed = read_with(FeatureCache(tmp_path, Seed(b"k" * 32)), model, trainable)
    assert passed == 0 and torch.equal(again.view(torch.int32), plain.view(torch.int32))
    assert f"what the trained layers read of {ROWS} of {ROWS} records is of the cache {tmp_path}" in caplog.messages


@pytest.mark.parametrize("changed", ["weight", "cut", "layer", "key"])
def test_of_another_frozen_part_or_with_another_key_nothing_is_read(tmp_path: Path, changed: str) -> None:
    read_with(FeatureCache(tmp_path, Seed(b"k" * 32)), network())
    model, key = network(trainable="last:2" if changed == "cut" else "head"), b"other" * 6 + b"  "
    if changed == "weight":
        with torch.no_grad():
            model.get_parameter("0.weight")[0, 0, 0, 0] += 1e-3
    if changed == "layer":
        model[2] = nn.Hardtanh()  # no weight tells it from the one before
    cache = FeatureCache(tmp_path, Seed(key if changed == "key" else b"k" * 32))
    _, passed = read_with(cache, model, "last:2" if changed == "cut" else "head")
    assert passed == ROWS


def test_a_damaged_value_is_computed_anew_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, _ = read_with(FeatureCache(tmp_path, Seed(b"k" * 32)), network())
    first, second, *_ = sorted(tmp_path.glob("*/*.sealed"))
    first.write_bytes(second.read_bytes())
    second.write_bytes(second.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "mpc_fl"):
        again, passed = read_with(FeatureCache(tmp_path, Seed(b"k" * 32)), network())
    assert passed == 2 and torch.equal(again, plain)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [f"2 entries of the feature cache {tmp_path} were damaged: computed anew"]
    assert read_with(FeatureCache(tmp_path, Seed(b"k" * 32)), network())[1] == 0


@pytest.mark.parametrize("changed", ["parameter", "records"])
def test_what_is_kept_is_of_one_network_and_its_records(changed: str) -> None:
    config, model, data = configured(PRIVATE), network(), records()
    inputs = inputs_of(model, config)
    trained_part_and_records(model, data, inputs)
    with torch.no_grad():
        model.get_parameter("5.bias" if changed == "records" else "0.bias").add_(1.0)
    with pytest.raises(ModelError, match="has changed in the run"):
        trained_part_and_records(model, records() if changed == "records" else data, inputs)


def test_the_trained_part_is_as_the_model_is_now() -> None:
    model = network()
    load_flat_parameters(model, flatten_parameters(model) + 1.0)
    assert torch.equal(flatten_parameters(trained_part_of(model)), flatten_parameters(model))


@pytest.mark.processes
def test_several_processes_share_out_steps_of_the_head() -> None:
    config, model = configured(PRIVATE), network()
    config = config.with_values(site={"training_processes": 2})
    with training_group(config, trained_part_of(model)) as group:
        head, of_head = trained_part_and_records(model, records(), inputs_of(model, config))
        shared = train_locally(
            head, of_head, LocalTraining(config, 1e-3, 0.7, Seed(b"s" * 32), "vmap", group), 1, Seed(b"n" * 32)
        )
    whole, _ = in_both_ways(model, config, method="vmap")
    torch.testing.assert_close(shared.update, whole.update, rtol=0, atol=1e-5)
