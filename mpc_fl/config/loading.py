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
            node[last] = _plain(parse_yaml(text, functools.partial(_takes_text, (*parents, last))))
        except ValueError:
            raise ConfigError(f"--set {setting[:200]!r}: the value is not YAML that can be used", "quote it") from None
    return result


def _takes_text(setting: tuple[str, ...], within: tuple[str, ...]) -> bool:
    return takes_text((*setting, *within))


def _plain(values: Any) -> Any:
    """The same with texts for what JSON has no kind for: dates, sets, bytes."""
    return json.loads(json.dumps(values, default=str))


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read, override and validate a YAML file. Raises `ConfigError`."""
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
    return parse_config(apply_overrides(values or {}, overrides or []), str(path))
