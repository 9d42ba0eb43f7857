"""How films became the inputs of a model: settings that no shape of a tensor tells, held against those that it was trained with.

A model file says them. One of an earlier version does not; the configuration of its run may lie beside it, as a run leaves it.
How bright a film is no setting says (`learning.data.windows`), and `data.wrong_size` only whether one of another size is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError
from mpc_fl.parsing import parse_yaml

FILMS = "films"  # entry of a model file's description
_BESIDE = "config.yaml"
_SETTINGS = ("not_square", "frame")


def describe_films(config: Config) -> dict[str, str]:
    """The settings by which an image file becomes an input; nothing where records come from something else."""
    return {name: getattr(config.data, name) for name in _SETTINGS} if config.data.source == "images" else {}


def require_same_films(description: Mapping[str, Any], path: Path, config: Config) -> None:
    """Raise `ModelError` naming the setting that is not the one that the model in `path` was trained with, where that is known."""
    trained, here = _trained_with(description, path) or {}, describe_films(config)
    for name in here:
        if trained.get(name, here[name]) != here[name]:
            raise ModelError(
                f"model file {path} was trained with data.{name}={trained[name]}, the configuration has {here[name]}",
                "use the configuration the model was trained with",
            )


def unknown_films(description: Mapping[str, Any], path: Path, config: Config) -> str | None:
    """A sentence where images are read and nothing says how those of the training were; None where it is known, or no matter."""
    here = describe_films(config)
    if not here or _trained_with(description, path) is not None:
        return None
    taken = ", ".join(f"data.{name}={value}" for name, value in here.items())
    return (
        f"Neither the model file nor a {_BESIDE} beside it says how films became its inputs (an earlier version wrote it, or it "
        f"was trained on none): taken is what is configured, {taken}"
    )


def _trained_with(description: Mapping[str, Any], path: Path) -> dict[str, str] | None:
    """The settings of the training: none of them where it had no films, None where nothing says it."""
    said = description.get(FILMS)
    if said is None:
        data = _configured_beside(path)
        if data is None or data.get("source") != "images":
            return None if data is None else {}
        said = data
    if not isinstance(said, dict) or not all(isinstance(said.get(name), str) for name in _SETTINGS):
        return None
    return {name: said[name] for name in _SETTINGS}


def _configured_beside(path: Path) -> dict[str, Any] | None:
    try:
        values = parse_yaml((path.parent / _BESIDE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    data = values.get("data") if isinstance(values, dict) else None
    return data if isinstance(data, dict) else None
