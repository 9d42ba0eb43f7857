"""Runs that begin with a model of an earlier one: what fits is taken over, the rest is named or refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.apps.cli.options import configure
from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError, ModelError
from mpc_fl.federation.global_model import initial_model, normalisation_of_weights
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.earlier_model import begun_anew
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.learning.models.published_weights import import_file
from mpc_fl.learning.models.weights_store import find, store_model
from tests.support.training_in_memory import Training

SCALE = Normalisation((0.4,), (0.2,))
CONFIG = Config().with_values(data={"image_size": 16}, model={"architecture": "small_cnn"})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mpc-fl" / "weights"


def trained(path: Path, config: Config = CONFIG, scale: Normalisation | None = None) -> Path:
    """A model file with weights that no seed gives, and statistics of its own."""
    model = build_model(config)
    with torch.no_grad():
        for value in model.state_dict(keep_vars=True).values():
            value.add_(1) if value.is_floating_point() else None
    save_model(path, model, config, scale)
    return path


def beginning_with(config: Config, path: Path) -> Config:
    """As `--from` has it."""
    (written := path.with_suffix(".yaml")).write_text(config.to_yaml())
    return configure(written, None, path)


def test_all_of_it_is_taken_over_under_the_digest_that_was_signed(tmp_path: Path, cache: Path) -> None:
    path = trained(tmp_path / "model.safetensors")
    config = beginning_with(CONFIG, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (
        config.model.initial_weights == digest and (cache / f"{digest}.safetensors").read_bytes() == path.read_bytes()
    )
    assert config.digest() != CONFIG.digest() and begun_anew(config) == ()
    own, fresh = initial_model(config).state_dict(), build_model(CONFIG).state_dict()
    for name, value in own.items():
        assert torch.equal(value, fresh[name] + 1) or not value.is_floating_point(), name
    assert beginning_with(config, path) == config
    assert import_file(path, "small_cnn").digest == digest


@pytest.mark.parametrize(
    "classes", [["normal", "ill"], ["normal", "viral", "bacterial"]], ids=["fewer", "another order"]
)
def test_the_last_layer_begins_anew_for_other_classes_and_is_named(classes: list[str], tmp_path: Path) -> None:
    path = trained(tmp_path / "model.safetensors")
    config = beginning_with(CONFIG.with_values(data={"classes": classes}), path)
    names = begun_anew(config)
    assert len(names) == 2 and all(name.startswith("9.") for name in names)
    own, fresh = initial_model(config).state_dict(), build_model(config).state_dict()
    assert all(torch.equal(own[name], fresh[name]) for name in names)
    assert torch.equal(own["0.weight"], fresh["0.weight"] + 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"architecture": "mlp"}}, "trained with model.architecture small_cnn, not mlp"),
        ({"model": {"normalisation": "group"}}, "trained with model.normalisation frozen, not group"),
        ({"data": {"image_size": 32}}, "9.weight"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = beginning_with(CONFIG.with_values(**changes), trained(tmp_path / "model.safetensors"))
    with pytest.raises(ModelError, match=said):
        initial_model(config)


def test_a_scale_that_the_model_does_not_have_is_no_scale(tmp_path: Path) -> None:
    path = trained(tmp_path / "model.safetensors")
    named = CONFIG.with_values(model={"initial_weights": store_model(path)}, data={"normalise": "weights"})
    with pytest.raises(ModelError, match="do not say how 1 channels are scaled"):
        normalisation_of_weights(named)


def test_the_scale_of_inputs_is_taken_over_or_measured_anew_and_never_dropped(tmp_path: Path) -> None:
    path = trained(tmp_path / "model.safetensors", CONFIG.with_values(data={"normalise": "secure"}), SCALE)
    with pytest.raises(ModelError, match="set data.normalise to weights, which takes their scale over, or to secure"):
        initial_model(beginning_with(CONFIG, path))
    named = CONFIG.with_values(model={"initial_weights": store_model(path)}, data={"normalise": "weights"})
    assert normalisation_of_weights(named) == SCALE
    (tmp_path / "plain.yaml").write_text("data: {image_size: 16, normalise: weights}")
    assert configure(tmp_path / "plain.yaml", ["model.architecture=small_cnn"], path).digest() == named.digest()
    initial_model(named)
    initial_model(beginning_with(CONFIG.with_values(data={"normalise": "secure"}), path))


def test_a_head_on_features_goes_on_with_the_same_features_and_their_scale(tmp_path: Path) -> None:
    features: dict[str, Any] = {"image_size": 64, "features": {"extractor": "scattering"}, "normalise": "secure"}
    config = Config().with_values(data=features, model={"architecture": "linear"})
    scale = Normalisation((0.0,) * 3473, (1.0,) * 3473, to_norm_1=True)
    path = trained(tmp_path / "model.safetensors", config, scale)
    named = config.with_values(model={"initial_weights": store_model(path)}, data={"normalise": "weights"})
    assert normalisation_of_weights(named) == scale
    other = named.with_values(data={"features": {"extractor": "scattering", "mirror": False}})
    with pytest.raises(ModelError, match=r"trained with data.features \{.*'mirror': True"):
        initial_model(other)


def test_other_files_and_other_digests_are_refused(tmp_path: Path) -> None:
    path = trained(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"model.initial_weights is {'5' * 64}, and .* has SHA-256"):
        beginning_with(CONFIG.with_values(model={"initial_weights": "5" * 64}), path)
    (tmp_path / "text").write_text("text")
    with pytest.raises(ModelError, match="text is damaged, or no file of mpc-fl"):
        beginning_with(CONFIG, tmp_path / "text")
    with pytest.raises(ModelError, match="is a model of 'small_cnn', not of 'resnet18'"):
        import_file(path, "resnet18")


def test_a_site_without_the_file_is_told_the_digest_and_what_to_do(tmp_path: Path, cache: Path) -> None:
    config = beginning_with(CONFIG, trained(tmp_path / "model.safetensors"))
    find(config.model.initial_weights or "", None).unlink()
    with pytest.raises(
        ModelError, match=rf"{config.model.initial_weights} are not at .*get its model.safetensors and import"
    ):
        initial_model(config)


def test_a_run_begins_with_the_model_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Training(tmp_path / "first", monkeypatch)
    first.run()
    digest = store_model(first.party("aggregator") / "model.safetensors")
    second = Training(
        tmp_path / "second", monkeypatch, model={"architecture": "mlp", "hidden": [2], "initial_weights": digest}
    )
    second.run()
    assert set(second.said.values()) == {"finished"}, second.said
