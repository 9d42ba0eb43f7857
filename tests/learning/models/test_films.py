"""A model is asked about films that became its inputs as those of its training did, where its file or its run says how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError
from mpc_fl.inference.serving.visits import service_digest
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.model_file import load_model, note_on_films, save_model


def _config(**data: Any) -> Config:
    return Config().with_values(data={"source": "images", "classes": ["a", "b"], "image_size": 8, **data})


def _saved(path: Path, config: Config) -> Path:
    save_model(path, build_model(config, seed=1), config)
    return path


def _of_an_earlier_version(path: Path) -> Path:
    """The same file without what it says of films."""
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["mpc-fl"])
    del description["films"]
    save_file(load_file(path), path, metadata={"mpc-fl": json.dumps(description)})
    return path


@pytest.mark.parametrize("other", [{"not_square": "stretch"}, {"not_square": "crop"}, {"frame": "middle"}])
@pytest.mark.parametrize("said_by", ["the file", "the run"])
def test_other_settings_than_those_of_the_training_are_refused(
    other: dict[str, str], said_by: str, tmp_path: Path
) -> None:
    trained = _config(wrong_size="resize")
    path = _saved(tmp_path / "model.safetensors", trained)
    if said_by == "the run":
        _of_an_earlier_version(path)
        (tmp_path / "config.yaml").write_text(trained.to_yaml())
    ((name, value),) = other.items()
    with pytest.raises(ModelError) as caught:
        load_model(path, _config(**other))
    had = getattr(trained.data, name)
    assert f"was trained with data.{name}={had}, the configuration has {value}" in str(caught.value)
    load_model(path, trained)
    load_model(path, _config(wrong_size="error"))  # says only whether a film is refused
    assert note_on_films(path, trained) is None
    # Who asks about something else than films, asks about no film.
    load_model(path, Config().with_values(data={"source": "npz", "classes": ["a", "b"], "image_size": 8, **other}))


@pytest.mark.parametrize("beside", [None, "data: {source: images}", "]", "data: 3", "- 1"])
def test_a_model_of_an_earlier_version_works_with_a_note(beside: str | None, tmp_path: Path) -> None:
    path = _of_an_earlier_version(_saved(tmp_path / "model.safetensors", _config()))
    if beside is not None:
        (tmp_path / "config.yaml").write_text(beside)
    load_model(path, _config(not_square="crop"))
    note = note_on_films(path, _config(not_square="crop"))
    assert note is not None and "data.not_square=crop, data.frame=error" in note and "\n" not in note


def test_a_model_of_phantoms_is_asked_about_any_films(tmp_path: Path) -> None:
    phantoms = Config().with_values(data={"classes": ["a", "b"], "image_size": 8})
    path = _saved(tmp_path / "model.safetensors", phantoms)
    load_model(path, _config(not_square="crop"))
    assert note_on_films(path, _config()) is not None and note_on_films(path, phantoms) is None
    (tmp_path / "config.yaml").write_text(phantoms.to_yaml())
    assert note_on_films(path, _config()) is None


def test_who_asks_a_service_makes_films_as_it_does() -> None:
    usual = service_digest(_config())
    assert service_digest(_config(wrong_size="resize")) == usual  # as of hospitals of earlier versions
    others = {service_digest(_config(**other)) for other in ({"not_square": "crop"}, {"frame": "first"})}
    assert len(others) == 2 and usual not in others
