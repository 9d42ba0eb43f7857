"""Every setting is described in a line of its own, and what is said of it is what is checked."""

from __future__ import annotations

import json
from typing import Annotated

import pytest
from pydantic import TypeAdapter
from typer.testing import CliRunner

from mpc_fl.apps.cli import config as config_commands
from mpc_fl.config.config import Config, parse_config
from mpc_fl.config.examples import EXAMPLES
from mpc_fl.config.loading import apply_overrides
from mpc_fl.config.mistakes import section_of
from mpc_fl.config.privacy import PrivacySection
from mpc_fl.config.settings import Setting, schema, sections, setting, takes_text
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
def test_every_setting_says_in_a_line_of_its_own_what_it_does(item: Setting) -> None:
    assert 10 <= len(item.about) <= 130, "give the field a description, short and with its unit"
    assert item.about != item.key


@pytest.mark.parametrize("item", SETTINGS, ids=lambda item: item.key)
def test_the_example_of_every_setting_is_a_value_that_it_takes(item: Setting) -> None:
    path, section = item.key.split("."), Config
    for name in path[:-1]:
        inner = section_of(section, name)
        assert inner is not None
        section = inner
    field = section.model_fields[path[-1]]
    values = apply_overrides({}, [f"{item.key}={item.example}"])
    for name in path:
        values = values[name]
    taken = TypeAdapter(Annotated[field.annotation, field]).validate_python(values)
    assert taken not in (None, "", (), {})


def test_no_example_is_of_a_setting_that_is_gone_or_has_one_by_itself() -> None:
    shown = {item.key: item.example for item in SETTINGS}
    assert {key: shown.get(key) for key in EXAMPLES} == EXAMPLES


def test_explaining_a_setting_says_that_one_and_explaining_a_section_its_settings() -> None:
    def explained(key: str) -> str:
        return CliRunner().invoke(config_commands.app, ["explain", key]).output

    assert explained("privacy.epsilon") == (
        "privacy.epsilon\n  promised to every patient over all runs of the privacy ledger\n  may be:  number above 0\n"
        "  default: 8.0\n  example: --set privacy.epsilon=8.0\n  section: mpc-fl config explain privacy\n"
    )
    assert "example: --set 'data.table.identifiers=[mrn, surname]'" in explained("data.table.identifiers")
    assert all(f"privacy.{name}:" in explained("privacy") for name in PrivacySection.model_fields)
    assert "Within it: data.partition, data.phantoms" in explained("data")
    assert "section" not in explained("seed")


def test_settings_are_found_and_what_is_no_setting_is_named_with_the_nearest() -> None:
    found = setting("privacy.epsilon")
    assert (found.kind, found.default) == ("number above 0", "8.0")
    assert setting("federation.hospitals").kind == "whole number from 2 to 1000"
    assert setting("data.channels").kind == "1 | 3"
    with pytest.raises(ConfigError, match="nearest known name is 'training.rounds'"):
        setting("training.rouds")
    with pytest.raises(ConfigError, match="nearest known name is 'federation.quorum'"):
        setting("quorum")
    with pytest.raises(ConfigError, match="nearest known name is 'training'"):
        setting("trainin")


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
