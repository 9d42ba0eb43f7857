"""Networks of installed packages: what is checked, what is replaced, and how they train and are diagnosed with."""

from __future__ import annotations

import datetime
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpc_fl.config.config import Config
from mpc_fl.crypto.authority import Authority
from mpc_fl.errors import ConfigError, DisagreementError, ModelError, UnsupportedLayerError
from mpc_fl.federation.global_model import code_of, initial_model
from mpc_fl.inference.diagnosis import require_supported
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import FrozenBatchNorm2d
from mpc_fl.learning.models.model_file import load_model, save_model
from mpc_fl.links.handshake import Agreement, check_greeting, make_greeting
from tests.support.installed_package import NETWORK, install
from tests.support.training_in_memory import Training


def config_of(package: str, **changes: dict[str, Any]) -> Config:
    values = {"model": {"architecture": f"{package}:network"}, "site": {"allow_packages": [package]}, **changes}
    return Config().with_values(data={"image_size": 8}).with_values(**values)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    name = f"own_{zlib.crc32(request.node.name.encode())}"
    monkeypatch.syspath_prepend(install(tmp_path / "packages", name, getattr(request, "param", NETWORK), "3.1"))
    return name


def test_weights_follow_from_the_seed_and_batchnorm_is_replaced(package: str) -> None:
    config = config_of(package)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first, second, other = build_model(config), build_model(config), build_model(config, seed=5)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.state_dict()["0.weight"], other.state_dict()["0.weight"])
    assert isinstance(first[1], FrozenBatchNorm2d)
    assert isinstance(build_model(config.with_values(model={"normalisation": "group"}))[1], torch.nn.GroupNorm)
    statistics = initial_model(config)[1].running_mean
    assert not torch.equal(statistics, torch.zeros(4)), "calibrated on public images"


def test_a_site_that_does_not_allow_it_runs_none_of_it(package: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{package}:network is code of the package {package.replace('_', '-')} 3.1, which"
    ):
        build_model(config_of(package, site={"allow_packages": []}))


RANDOM = "import os, torch\nfrom torch import nn\ndef network(s, c):\n    n = nn.Sequential(nn.Flatten(), nn.Linear(64, c))\n"
BROKEN = {
    "def network(s, c):\n    return 'none'\n": "gives str, which is no network",
    "def network(s):\n    return None\n": r"raised TypeError: .*: it is to be: def network\(input_shape, classes\)",
    RANDOM
    + "    n[1].bias.data[0] = os.urandom(1)[0] + 256 * os.urandom(1)[0]\n    return n\n": "gives other weights when",
    RANDOM + "    return n.double()\n": r"has '1.weight' of torch.float64",
    RANDOM + "    n[1].weight.data[0] = float('nan')\n    return n\n": "'1.weight' that are not finite",
    RANDOM
    + "    return nn.Sequential(n, nn.Linear(c, 5))\n": r"gives torch.float32 \(2, 5\) of 2 records, not logits float32 \(2, 3\)",
    RANDOM + "    return nn.Flatten()\n": "has no parameters to train",
    RANDOM + "    return nn.Sequential(nn.Flatten(), nn.Linear(7, c))\n": "its network raised RuntimeError",
    RANDOM
    + "    class Both(nn.BatchNorm2d):\n        def forward(self, x):\n            return super().forward(x).relu()\n"
    + "    return nn.Sequential(Both(1), n)\n": "Both does more than BatchNorm",
}


@pytest.mark.parametrize(("package", "said"), list(BROKEN.items()), indirect=["package"], ids=range(len(BROKEN)))
def test_what_is_no_network_is_named(package: str, said: str) -> None:
    with pytest.raises(ModelError, match=said) as refused:
        build_model(config_of(package))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_hospitals_train_it_with_privacy_and_the_file_is_read_again(
    method: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(
        tmp_path / "run",
        monkeypatch,
        model={"architecture": f"{package}:network"},
        site={"allow_packages": [package]},
        privacy={"mechanism": "local", "noise_multiplier": 2.0},
        training={"rounds": 1, "local_steps": 1, "batch_size": 8, "per_sample_gradients": method},
    )
    training.run()
    assert set(training.said.values()) == {"finished"}, training.said
    load_model(training.party("aggregator") / "model.safetensors", training.config)


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_both_engines_take_it_where_they_know_its_layers(engine: str, package: str, tmp_path: Path) -> None:
    config = config_of(package, inference={"engine": engine}).with_values(task="infer")
    save_model(tmp_path / "model", build_model(config), config)
    require_supported(config, load_model(tmp_path / "model", config))


UNKNOWN = RANDOM + "    return nn.Sequential(nn.Mish(), n)\n"


@pytest.mark.parametrize("package", [UNKNOWN], indirect=True, ids=["mish"])
@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_a_layer_that_engines_do_not_know_is_named(engine: str, package: str) -> None:
    config = config_of(package, inference={"engine": engine}).with_values(task="infer")
    with pytest.raises(UnsupportedLayerError, match="of type Mish .*has no encrypted counterpart"):
        require_supported(config, build_model(config))


def test_parties_with_another_version_or_another_network_are_told_at_the_hand_shake(package: str) -> None:
    said = code_of(config_of(package))
    assert said.startswith(f"{package.replace('_', '-')} 3.1, state ") and code_of(Config()) == ""
    authority = Authority(datetime.timedelta(days=1))
    hospital, aggregator = authority.issue("hospital-0"), authority.issue("aggregator")
    mine = Agreement("session", "d" * 64, "train", said)
    assert check_greeting(
        make_greeting(hospital, mine, "aggregator", bytes(31) + b"\x09"), "hospital-0", aggregator, mine
    )
    for code in (said.replace("3.1", "3.2"), said[:-1] + "x", ""):
        theirs = make_greeting(
            hospital, Agreement("session", "d" * 64, "train", code), "aggregator", bytes(31) + b"\x09"
        )
        with pytest.raises(DisagreementError, match="hospital-0 runs a network of .* and aggregator of .* 3.1, state"):
            check_greeting(theirs, "hospital-0", aggregator, mine)
