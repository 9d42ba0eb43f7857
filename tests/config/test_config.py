"""Configuration: complete, refused with the nearest name, overridable, saved and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.config.config import parse_config, party_names
from mpc_fl.config.loading import apply_overrides, load_config
from mpc_fl.errors import ConfigError
from mpc_fl.roles import hospital_names

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_are_valid_and_survive_saving(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "saved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainin": {}}, "unknown key 'trainin': the nearest known name is 'training'"),
        ({"training": {"round": 3}}, "unknown key 'training.round': the nearest known name is 'training.rounds'"),
        ({"data": {"partition": {"methd": 1}}}, "nearest known name is 'data.partition.method'"),
        ({"privacy": {"epsilon": -1}}, "'privacy.epsilon' is not valid"),
        ({"privacy": {"epsilon": float("nan")}}, "'privacy.epsilon' is not valid"),
        ({"data": {"classes": ["a"]}}, "at least two different classes"),
        ({"data": {"source": "csv"}}, "table.features"),
        ({"federation": {"addresses": {"hospitl-1": "a:1"}}}, "the nearest known name is 'hospital-1'"),
        (
            {"federation": {"dial_out_only": ["hospital-3"]}},
            "a party 'hospital-3', and there is none with federation.hospitals: 3",
        ),
        ({"federation": {"relay": "agregator"}}, "the nearest known name is 'aggregator'"),
        ({"federation": {"names": {"hospitl-1": "charite"}}}, "the nearest known name is 'hospital-1'"),
        ({"federation": {"names": {"hospital-3": "charite"}}}, "there is none with federation.hospitals: 3"),
        ({"federation": {"names": {"hospital-0": "Charité"}}}, "'Charité' cannot be the name of a site"),
        ({"federation": {"names": {"hospital-0": "hospital-1"}}}, "reads like the identity of a party"),
        ({"federation": {"names": {"hospital-0": "ukb", "hospital-1": "u-kb"}}}, "have names that look alike"),
        ([1], "not a mapping"),
    ],
)
def test_mistakes_are_named_in_one_line(values: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "f.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"federation": {"hospitals": 2}}, "set federation.quorum to 3"),
        ({"federation": {"hospitals": 5, "quorum": 2}}, "set federation.quorum to 3 or more"),
        ({"federation": {"hospitals": 8, "quorum": 4}}, "set federation.quorum to 5 or more"),
        (
            {"federation": {"hospitals": 5, "quorum": 3}, "privacy": {"colluders": 1}},
            "set federation.quorum to 4 or more",
        ),
        (
            {"federation": {"hospitals": 6, "quorum": 4}, "privacy": {"colluders": 2}},
            "set federation.quorum to 5 or more",
        ),
        ({"federation": {"addresses": {"aggregator": "a:1"}}}, "a party 'aggregator', and there is none"),
        (
            {"federation": {"dial_out_only": ["hospital-0", "hospital-1", "hospital-2"]}},
            "need a hospital that both can dial",
        ),
        ({"federation": {"dial_out_only": ["hospital-1"], "relay": ["hospital-1"]}}, "hospital-1 is a relay"),
        ({"federation": {"relay": []}}, "names a party twice, or none"),
        ({"federation": {"relay": ["hospital-0", "hospital-0"]}}, "names a party twice"),
        ({"federation": {"relay": "aggregator"}}, "a party 'aggregator', and there is none"),
        (
            {"federation": {"hospitals": 4, "founders": 3, "quorum": 3, "relay": "hospital-3"}},
            "names hospital-3, which joins later",
        ),
        (
            {"federation": {"dial_out_only": ["hospital-1"]}, "runtime": {"receive_timeout": 20}},
            "set runtime.receive_timeout to 35 or more",
        ),
        ({"federation": {"hospitals": 5, "founders": 3, "quorum": 4}}, "3 founders must be a quorum"),
        ({"federation": {"hospitals": 3, "founders": 4, "quorum": 3}}, "4 founders must be a quorum"),
        (
            {"federation": {"hospitals": 4, "founders": 3, "quorum": 3, "admission": ["hospital-1"]}},
            "names 'hospital-1', which does not join later; who does: hospital-3",
        ),
    ],
)
def test_what_a_run_without_a_coordinator_cannot_have_is_refused(values: dict[str, Any], message: str) -> None:
    values = {**values, "federation": {"coordinator": "none", **values.get("federation", {})}}
    with pytest.raises(ConfigError, match=message):
        parse_config(values, "f.yaml")
    others = {name: value for name, value in values["federation"].items() if name == "coordinator"}
    fine = parse_config({"federation": {**others, "hospitals": 5, "quorum": 3}}, "f.yaml")
    assert party_names(fine) == hospital_names(5)
    parse_config({"federation": {**others, "hospitals": 5, "quorum": 4}, "privacy": {"colluders": 2}}, "f.yaml")


def test_joining_and_leaving_are_for_runs_without_a_coordinator() -> None:
    for section, values in (
        ("federation", {"founders": 2}),
        ("federation", {"admission": "quorum"}),
        ("site", {"leave_after": 1}),
    ):
        with pytest.raises(ConfigError, match="without an aggregator"):
            parse_config({section: values}, "f.yaml")


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("training: {rounds: 2}\n")
    config = load_config(path, ["training.rounds=7", "privacy.delta=1e-6", "data.classes=[a, b]"])
    assert (config.training.rounds, config.privacy.delta, config.data.classes) == (7, 1e-6, ("a", "b"))
    for bad in ("training.rounds", "=3", "name.x=1"):
        with pytest.raises(ConfigError):
            load_config(path, ["name=x", bad])
    with pytest.raises(ConfigError, match="nearest known name is 'training.rounds'"):
        load_config(path, ["training.rouds=3"])


@pytest.mark.parametrize("text", [r"[A-Z]+(\d+)-", "[ab](c)", "{2}(x)", "(a) # 3", "(a): b", "*(a)", "(0012)", "&(a)"])
def test_a_text_is_set_as_it_stands(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("training: {rounds: 2}\n")
    assert load_config(path, [f"name={text}"]).name == text
    for quote in ("'", '"'):
        assert load_config(path, [f"name={quote}run 3{quote}"]).name == "run 3"
    pattern = f"data.patient_pattern={text}"
    if text[0] in "[(":
        assert load_config(path, [pattern]).data.patient_pattern == text
    for odd in ("a\x1bb", "a\udcffb"):  # as YAML has it: no such letters
        with pytest.raises(ConfigError, match="the value is not YAML"):
            load_config(path, [f"name={odd}"])
    for nothing in ("null", "~", ""):
        assert load_config(path, [pattern, f"data.patient_pattern={nothing}"]).data.patient_pattern is None


TEXTS = ("007", "0", "yes", "no", "off", "1e5", "0x1f", "1_000", "2026-11-27", ".inf", "True")


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_stays_what_it_looks_like_where_a_text_is_expected(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"name: {text}\ndata: {{classes: [{text}, other], table: {{patient_column: {text}}}}}\nsite: {{data: {text}}}\n"
    )
    config = load_config(path)
    assert (config.name, config.data.classes, config.data.table.patient_column) == (text, (text, "other"), text)
    assert str(config.site.data) == text
    config = load_config(
        path,
        [
            f"name=x{text}",
            f"federation.session={text}",
            f"data.classes=[first, {text}]",
            "data.table.patient_column=null",
        ],
    )
    assert (config.federation.session, config.data.classes) == (text, ("first", text))
    assert config.data.table.patient_column is None and config.seed == 0


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), st.integers())
def test_overrides_reach_any_depth(keys: list[str], value: int) -> None:
    node = apply_overrides({}, [f"{'.'.join(keys)}={value}"])
    for key in keys:
        node = node[key]
    assert node == value


def test_digest_covers_what_parties_share_and_nothing_local() -> None:
    config = parse_config({}, "x")
    assert config.with_values(site={"out": "/somewhere"}).digest() == config.digest()
    assert config.with_values(training={"rounds": 99}).digest() != config.digest()
    assert config.with_values(federation={"session": "other"}).digest() != config.digest()


@pytest.mark.parametrize("content", [b"a: [1", b"\xff\xfe\x00", b"- 1\n- 2\n"])
def test_unreadable_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "missing.yaml")
