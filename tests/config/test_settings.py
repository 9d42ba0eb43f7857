"""Every setting is described, by its own text or by that of its section, and what is said of it is what is checked."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from mpc_fl.apps.cli import config as config_commands
from mpc_fl.config.config import Config, parse_config
from mpc_fl.config.settings import schema, sections, setting, takes_text
from mpc_fl.errors import ConfigError

SETTINGS = [item for section in sections() for item in section.settings]


def test_every_value_of_a_configuration_is_a_setting() -> None:
    keys = set[str]()
    nested = Config().model_dump(mode="json")
    sectioned = {section.key for section in sections()}

    def walk(values: dict[str, object], prefix: str) -> None:
        for name, value in values.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict) and key in sectioned:
                walk(value, f"{key}.")
            elif key not in sectioned:
                keys.add(key)

    walk(nested, "")
    assert keys <= {item.key for item in SETTINGS}
    assert len({item.key for item in SETTINGS}) == len(SETTINGS)


@pytest.mark.parametrize("item", SETTINGS, ids=lambda item: item.key)
def test_every_setting_is_described(item: object) -> None:
    name = item.key.rpartition(".")[2]  # type: ignore[attr-defined]
    assert item.about or f"`{name}`" in item.section  # type: ignore[attr-defined]


def test_settings_are_found_and_what_is_no_setting_is_named_with_the_nearest() -> None:
    found = setting("privacy.epsilon")
    assert (found.kind, found.default) == ("number above 0", "8.0")
    assert setting("federation.hospitals").kind == "whole number from 2 to 1000"
    assert setting("data.channels").kind == "1 | 3"
    with pytest.raises(ConfigError, match="nearest known name is 'training.rounds'"):
        setting("training.rouds")


def test_texts_are_told_from_numbers_by_where_they_stand() -> None:
    texts = [("name",), ("data", "classes", ""), ("federation", "addresses", "hospital-0"), ("site", "data")]
    others = [
        ("seed",),
        ("data", "classes"),
        ("data",),
        ("model", "hidden", ""),
        ("nothing", "here"),
        (),
        ("name", "x"),
    ]
    assert all(takes_text(path) for path in texts) and not any(takes_text(path) for path in others)


def test_the_schema_names_every_section_and_refuses_what_the_program_refuses() -> None:
    whole = schema()
    assert set(whole["properties"]) == set(Config.model_fields) and whole["additionalProperties"] is False
    printed = CliRunner().invoke(config_commands.app, ["schema"])
    assert json.loads(printed.output) == json.loads(json.dumps(whole))


def test_explaining_says_the_default_that_a_configuration_has() -> None:
    default = parse_config({}, "x").training.rounds
    printed = CliRunner().invoke(config_commands.app, ["explain", "training.rounds", "--json"])
    assert json.loads(printed.output)["default"] == str(default)
    assert "local_steps" in CliRunner().invoke(config_commands.app, ["explain", "training"]).output
