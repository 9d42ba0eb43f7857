"""Reading a configuration: a YAML file, then the values that the command line sets (`--set a.b=c`), then validation.

Whatever is wrong is told in one line that names the file, the key, and the nearest known name.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from mpc_fl.config.config import Config, parse_config
from mpc_fl.config.settings import takes_text
from mpc_fl.errors import ConfigError
from mpc_fl.parsing import DEEPEST, parse_yaml

_NULLS = ("", "~", "null")  # of YAML


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Apply `a.b=c` settings, values read as YAML. Raises `ConfigError` for a malformed setting."""
    result = _plain(values)
    for setting in overrides:
        key, separator, text = setting.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {setting!r} is not of the form a.b=c", "for example --set training.rounds=3")
        *parents, last = key.strip().split(".")
        if len(parents) > DEEPEST:
            raise ConfigError(f"--set {setting[:60]!r} is nested too deeply", "shorten the key")
        node = result
        for parent in parents:
            child = node.get(parent)
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"--set {setting!r}: '{parent}' is a value, not a section", "shorten the key")
            node = child
        try:
            # A dot is needed before an exponent in YAML floats; 1e-5 would stay a string, which pydantic parses.
            node[last] = _plain(_value((*parents, last), text))
        except ValueError:
            raise ConfigError(f"--set {setting[:200]!r}: the value is not YAML that can be used", "quote it") from None
    return result


def _value(setting: tuple[str, ...], text: str) -> Any:
    """What is set: YAML, but where a text is expected all of it as it stands, `[A-Z]+(\\d+)` or `run # 3`, unless it is quoted."""
    stripped = text.strip()
    plain = stripped.isprintable() and stripped.lower() not in _NULLS and not stripped.startswith(("'", '"'))
    if plain and takes_text(setting):
        return stripped
    return parse_yaml(text, functools.partial(_takes_text, setting))


def _takes_text(setting: tuple[str, ...], within: tuple[str, ...]) -> bool:
    return takes_text((*setting, *within))


def _plain(values: Any) -> Any:
    """The same with texts for what JSON has no kind for: dates, sets, bytes."""
    return json.loads(json.dumps(values, default=str))


def load_config(path: Path, overrides: list[str] | None = None, begins_with: str | None = None) -> Config:
    """Read, override and validate a YAML file. Raises `ConfigError`.

    `begins_with` is the SHA-256 of initial weights that were given beside it; the file may name no others.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read configuration {path}: {reason}", "give the path of a YAML file") from None
    try:
        values = parse_yaml(text, takes_text)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}", "correct it there; mind indentation and quotes") from None
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path}: not a mapping of sections", "start from one of the files in configs/")
    site = values.get("site") if values is not None else None
    if isinstance(site, dict) and site.get("allow_packages"):
        raise ConfigError(
            f"{path}: site.allow_packages lets code of others run, and a file could come from them",
            "remove it there; give --set site.allow_packages=[NAME] on the command line",
        )
    if isinstance(site, dict) and str(site.get("mlflow_uri") or "").startswith("http"):
        raise ConfigError(
            f"{path}: site.mlflow_uri says where this site's own numbers go, without noise, and a file could come from others",
            "remove it there; give --set site.mlflow_uri=URI on the command line",
        )
    if isinstance(site, dict) and site.get("record_patients"):
        raise ConfigError(
            f"{path}: site.record_patients lets messages about real patients be recorded, and a file could come from others",
            "remove it there; give --set site.record_patients=true on the command line",
        )
    return parse_config(_beginning(apply_overrides(values or {}, overrides or []), begins_with, path), str(path))


def _beginning(values: dict[str, Any], weights: str | None, path: Path) -> dict[str, Any]:
    """The values with the initial weights that were given beside them, if any."""
    model = values.get("model") or {}
    if weights is None or not isinstance(model, dict):
        return values
    if model.get("initial_weights") not in (None, weights):
        raise ConfigError(
            f"{path}: model.initial_weights is {model['initial_weights']}, and the model that was given has SHA-256 {weights}",
            "leave model.initial_weights null, or give the file that it names",
        )
    return {**values, "model": {**model, "initial_weights": weights}}
