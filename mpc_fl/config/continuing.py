"""With what a run may go on: the settings it was begun with, and those that may be others where it gets more rounds.

A run that failed goes on unchanged. One that shall have more rounds, finished or not, may change what `MAY_CHANGE` names and
nothing else: whatever else decides what a round is, or what was promised of those that are over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError

ROUNDS = "training.rounds"
# Beside the rounds themselves, which only grow: what is promised in all, and the noise of what is still to come.
MAY_CHANGE = (ROUNDS, "privacy.epsilon", "privacy.noise_multiplier")
_NAMED = 3  # settings in an error


def changed_settings(began: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that a run began with otherwise than `config` has them, by their dotted names: as they were, as they are.

    `began` is what `Config.settings_of_run` gave then. What it lacks, because there was no such setting, had the default.
    """
    was, now, default = _flat(began), _flat(config.settings_of_run()), _flat(Config().settings_of_run())
    pairs = {key: (was.get(key, default.get(key)), now.get(key)) for key in {**now, **was}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def has_more_rounds(began: Mapping[str, Any], config: Config) -> bool:
    """Whether a run that began with these settings gets more rounds by `config`."""
    return ROUNDS in changed_settings(began, config)


def require_same_run(began: Mapping[str, Any], config: Config, where: str) -> None:
    """Raise `ConfigError`, which names settings, where the run `where` cannot go on with `config`: see `MAY_CHANGE`."""
    changed = changed_settings(began, config)
    was, now = changed.get(ROUNDS, (0, 0))
    if not (type(was) is int and type(now) is int and was <= now):
        raise ConfigError(f"{where} was started with {ROUNDS} {was}, not {now}", "set it to more, never to fewer")
    if was < now and config.evaluation.chooses:
        raise ConfigError(
            f"{where} ends with the choice or calibration of its model, and cannot be given more rounds",
            "begin another run with its model: --from model.safetensors",
        )
    may_change = MAY_CHANGE if was < now else ()
    others = [key for key in changed if key not in may_change]
    if not others:
        return
    named = [f"{key} {_short(changed[key][0])}, not {_short(changed[key][1])}" for key in others[:_NAMED]]
    more = f" (and {len(others) - _NAMED} more)" if len(others) > _NAMED else ""
    fix = (
        "go on with the settings it had; with more training.rounds privacy.epsilon and noise_multiplier may change too"
    )
    raise ConfigError(f"{where} was started with {'; '.join(named)}{more}", fix)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted names; lists and mappings by name of a party are values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {}
        found |= inner or {f"{prefix}{key}": value}
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
