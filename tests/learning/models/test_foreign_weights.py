"""Weights of others: read without running anything, fitted whole or not at all, and every refusal in one line."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError
from mpc_fl.learning.models import foreign_weights
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import FrozenBatchNorm2d, with_group_norm
from mpc_fl.learning.models.efficientnet_lite import efficientnet_lite0
from mpc_fl.learning.models.foreign_weights import Fitted, fit_weights, head_names, own_names, read_weights, weights_in

Weights = dict[str, torch.Tensor]


class Network(nn.Module):
    """Convolution, BatchNorm and head under torchvision's names."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)


def weights(classes: int = 3) -> Weights:
    torch.manual_seed(classes)
    state = Network(classes).state_dict()
    state["bn1.running_mean"].normal_()
    state["bn1.running_var"].uniform_(0.5, 2)
    state["bn1.num_batches_tracked"].fill_(77)
    return dict(state)


def file_of(value: Any, path: Path, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(ModelError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message and message.isprintable() and len(message) < 700
    return message


# Reading


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "nest",
    [
        lambda state: state,
        lambda state: OrderedDict(state),
        lambda state: {"state_dict": state, "epoch": 3, "arch": "resnet18"},
        lambda state: {"model": state, "args": {"lr": 0.1}},
        lambda state: {"model": {"state_dict": state}},
    ],
)
def test_checkpoints_are_read_wherever_the_tensors_lie(
    nest: Callable[[Weights], Any], legacy: bool, tmp_path: Path
) -> None:
    read = read_weights(file_of(nest(weights()), tmp_path / "file.pth", legacy))
    assert read.keys() == weights().keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in weights().items())


def test_safetensors_are_read_and_halves_become_float32(tmp_path: Path) -> None:
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights().items()}
    save_file(halves, tmp_path / "file")
    read = read_weights(tmp_path / "file")
    assert read["conv1.weight"].dtype == torch.float32
    assert torch.equal(read["conv1.weight"], weights()["conv1.weight"].half().float())


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_not_run(legacy: bool, tmp_path: Path) -> None:
    victim = tmp_path / "victim"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (victim,))

    path = file_of({"conv1.weight": torch.zeros(1), "x": Payload()}, tmp_path / "file", legacy)
    assert "is damaged, or holds more than tensors: give a safetensors file" in refusal(lambda: read_weights(path))
    path.write_bytes(pickle.dumps(Payload()))
    assert "is damaged" in refusal(lambda: read_weights(path))
    assert not victim.exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "holds no tensors by name"),
        ([torch.zeros(2)], "holds no tensors by name"),
        (torch.zeros(2), "holds no tensors by name"),
        ({"conv1.weight": torch.zeros(1), "epoch": 3}, "holds what is no plain tensor: 'epoch'"),
        ({1: torch.zeros(1)}, "holds what is no plain tensor: '1'"),
        ({"a\n\x1b[2J" + "b" * 500: 1}, "holds what is no plain tensor: 'a ?[2Jbbb"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "holds what is no plain tensor: 'a'"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "holds what is no plain tensor: 'a'"),
        ({"a": torch.zeros(2, device="meta")}, "holds what is no plain tensor: 'a'"),
    ],
)
def test_what_is_no_weights_is_named(value: Any, words: str, tmp_path: Path) -> None:
    assert words in refusal(lambda: read_weights(file_of(value, tmp_path / "file")))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "does not exist" in refusal(lambda: read_weights(tmp_path / "nowhere"))
    assert "Is a directory" in refusal(lambda: read_weights(tmp_path))
    for content in (b"", b"PK\x03\x04", b"hello", b"\x08" + bytes(7) + b"{"):
        (tmp_path / "file").write_bytes(content)
        assert "is damaged" in refusal(lambda: read_weights(tmp_path / "file"))


def test_sizes_are_bounded_before_memory_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated = file_of({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "repeated")  # one stored number
    assert "holds tensors of more than 2048 MiB" in refusal(lambda: read_weights(repeated))
    monkeypatch.setattr(foreign_weights, "LARGEST_FILE", 1 << 20)
    packed = tmp_path / "packed"
    with (
        zipfile.ZipFile(file_of(weights(), tmp_path / "plain")) as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for entry in plain.infolist():
            archive.writestr(entry.filename, plain.read(entry))
        archive.writestr("archive/data/9", bytes(2 << 20))
    assert packed.stat().st_size < 1 << 20
    assert "unpacks to more than 1 MiB" in refusal(lambda: read_weights(packed))
    with pytest.raises(ModelError, match="is larger than 0 MiB"):
        foreign_weights.read_bounded(packed, 10)


def test_flipped_bytes_are_refused_or_change_numbers_alone() -> None:
    small, draw = {"a.weight": torch.ones(3, 4), "n": torch.tensor(3)}, random.Random(0)
    contents = [save(small)]
    for legacy in (False, True):
        buffer = io.BytesIO()
        torch.save(small, buffer, _use_new_zipfile_serialization=not legacy)
        contents.append(buffer.getvalue())
    for content in contents:
        for _ in range(150):
            changed = bytearray(content)
            for _ in range(draw.choice((1, 1, 3))):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            try:
                weights_in(bytes(changed[: draw.choice((len(changed), draw.randrange(len(changed))))]), "file")
            except ModelError as error:
                assert str(error).isprintable()


# Fitting


def fitted(model: nn.Module, given: Weights) -> Fitted:
    done = fit_weights(model, given)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    return done


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "module.model."])
def test_names_behind_prefixes(prefix: str) -> None:
    model = Network()
    assert fitted(model, {prefix + name: tensor for name, tensor in weights().items()}) == Fitted(7, ())
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights().items() if "num_batches" not in name)


def test_a_head_of_another_number_of_classes_is_replaced_and_named() -> None:
    model = Network(3)
    before = model.fc.weight.detach().clone()
    assert fitted(model, weights(1000)) == Fitted(5, ("fc.weight", "fc.bias"))
    assert torch.equal(model.fc.weight, before)
    assert torch.equal(model.conv1.weight, weights(1000)["conv1.weight"])


def test_a_file_without_a_head_and_counters() -> None:
    given = {name: tensor for name, tensor in weights().items() if name[:2] != "fc" and "num_batches" not in name}
    assert fitted(Network(), given) == Fitted(5, ("fc.weight", "fc.bias"))


def without(name: str) -> Weights:
    return {key: tensor for key, tensor in weights().items() if key != name}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (without("conv1.weight"), "do not fit Network (missing: 'conv1.weight'): give weights of this model.arch"),
        (without("bn1.running_var"), "missing: 'bn1.running_var'"),
        (without("fc.bias"), "missing: 'fc.bias'"),
        ({**weights(), "layer9.weight": torch.zeros(1)}, "left over: 'layer9.weight'"),
        ({**weights(), "a\x1b[2J": torch.zeros(1)}, "left over: 'a?[2J'"),
        ({**weights(), "conv1.weight": torch.zeros(4, 1, 3, 3)}, "conv1.weight (4, 1, 3, 3) instead of (4, 3, 3, 3)"),
        ({**weights(), "fc.weight": torch.zeros(3, 9)}, "fc.weight (3, 9) instead of (3, 4)"),
        ({**weights(), "fc.weight": torch.zeros(9, 4)}, "fc.weight (9, 4) instead of (3, 4)"),  # its bias is for 3
        ({**weights(), "module.conv1.weight": torch.zeros(4, 3, 3, 3)}, "hold 'conv1.weight' twice"),
        ({**weights(), "conv1.weight": torch.full((4, 3, 3, 3), float("nan"))}, "'conv1.weight' that are not finite"),
        ({**weights(), "conv1.weight": torch.zeros(4, 3, 3, 3, dtype=torch.int64)}, "that are not finite numbers"),
        ({**weights(), "bn1.running_var": -torch.ones(4)}, "variances below zero in 'bn1.running_var'"),
        ({f"x{i}": torch.zeros(1) for i in range(100)}, "and 97 more"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(given: Weights, words: str) -> None:
    model = Network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert words in refusal(lambda: fit_weights(model, given))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_halves_that_overflow_are_refused(tmp_path: Path) -> None:
    large = {**weights(), "conv1.weight": torch.full((4, 3, 3, 3), 1e300, dtype=torch.float64)}
    read = read_weights(file_of(large, tmp_path / "file"))
    assert "not finite" in refusal(lambda: fit_weights(Network(), read))


@pytest.mark.parametrize("architecture", ["resnet18", "squeezenet1_1", "densenet121", "swin_t", "efficientnet_lite0"])
def test_the_last_layer_of_known_networks(architecture: str) -> None:
    networks = []
    for classes in (("a", "b"), ("a", "b", "c")):
        values = {"channels": 3, "image_size": 64, "classes": classes}
        networks.append(build_model(Config().with_values(model={"architecture": architecture}, data=values)))
    few, more = (model.state_dict() for model in networks)
    assert head_names(networks[0]) == tuple(name for name in few if few[name].shape != more[name].shape)
    assert fit_weights(networks[0], more).replaced == head_names(networks[0])


def test_frozen_batchnorm_takes_the_statistics_of_the_file() -> None:
    config = Config().with_values(model={"architecture": "resnet18"}, data={"channels": 3, "image_size": 64})
    source, model = build_model(config, seed=1), build_model(config, seed=2)
    state = {f"module.{name}": tensor.clone() for name, tensor in source.state_dict().items()}
    state["module.bn1.running_mean"].fill_(0.25)
    fit_weights(model, state)
    assert isinstance(model.bn1, FrozenBatchNorm2d) and bool((model.bn1.running_mean == 0.25).all())


def test_statistics_that_group_normalisation_has_no_place_for() -> None:
    given = weights()
    message = refusal(lambda: fit_weights(with_group_norm(Network()), given))
    assert "left over: 'bn1.running_mean', 'bn1.running_var'" in message
    assert message.endswith("set model.normalisation=frozen, which keeps the statistics of BatchNorm")


def test_names_that_torchvision_had_for_densenet() -> None:
    name = "features.denseblock1.denselayer1.norm.1.weight"
    assert list(own_names(Network(), {name: torch.zeros(1)})) == ["features.denseblock1.denselayer1.norm1.weight"]


def test_published_names_of_lite0_get_their_borders() -> None:
    model = efficientnet_lite0(3)
    published = {
        "_conv_stem.weight": torch.ones(32, 3, 3, 3),
        "_bn0.num_batches_tracked": torch.tensor(1),
        "_blocks.1._depthwise_conv.weight": torch.ones(96, 1, 3, 3),
        "_blocks.2._depthwise_conv.weight": torch.ones(144, 1, 3, 3),
    }
    found = own_names(model, published)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "features.stem.conv.weight": (32, 3, 4, 4),
        "features.blocks.1.depthwise.conv.weight": (96, 1, 4, 4),
        "features.blocks.2.depthwise.conv.weight": (144, 1, 3, 3),
    }
    assert own_names(model, found) == found
