"""Groups of test patients are public, and what cannot be is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from mpc_fl.config.config import Config, parse_config
from mpc_fl.config.deadlines import deadlines_of
from mpc_fl.config.groups import age_band_names
from mpc_fl.errors import ConfigError

GROUPS = {"sex": ["female", "male"], "age_bands": [18, 65]}


def with_groups(groups: dict[str, Any], **sections: Any) -> Config:
    evaluation = {"groups": groups, **sections.pop("evaluation", {})}
    return parse_config({"evaluation": evaluation, **sections}, "test")


@pytest.mark.parametrize(
    ("groups", "sections", "words"),
    [
        ({"sex": ["female", "Female"]}, {}, "names a category twice"),
        ({"scanner": ["A", " "]}, {}, "without letters"),
        ({"sex": ["Unknown"]}, {}, "'unknown' anyway"),
        ({"scanner": ["a\nb"]}, {}, "cannot be printed"),
        ({"age_bands": [65, 18]}, {}, "age_bands must rise"),
        ({"age_bands": [18, 18]}, {}, "age_bands must rise"),
        ({"scanner": [f"scanner {number}" for number in range(32)]}, {}, "32 groups at most"),
        ({"site": True}, {}, "exact counts of each hospital"),
        (GROUPS, {"evaluation": {"test": False}, "data": {"validation_fraction": 0.2}}, "leave groups out"),
        (GROUPS, {"data": {"source": "npz"}}, "says no sex, age or scanner"),
    ],
)
def test_what_cannot_be_is_refused(groups: dict[str, Any], sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        with_groups(groups, **sections)


def test_groups_are_evaluated_after_the_last_round_alone() -> None:
    config = with_groups(GROUPS, training={"rounds": 3}, evaluation={"every": 1})
    assert [number for number in range(5) if config.evaluates_groups(number)] == [3]
    assert config.evaluation.groups.attributes == ("sex", "age")
    assert not Config().evaluates_groups(Config().last_round)
    noised = with_groups({"site": True}, data={"source": "npz"}, evaluation={"noise_multiplier": 4.0})
    assert noised.evaluation.groups.attributes == ("site",) and noised.evaluation.groups.recorded == ()


def test_bands_have_names_that_say_where_they_end() -> None:
    assert age_band_names((18, 40, 65)) == ("below 18", "18 to 39", "40 to 64", "65 and over")
    assert age_band_names((1,)) == ("below 1", "1 and over") and age_band_names(()) == ()


def test_a_hospital_waits_longer_where_there_are_more_sums() -> None:
    assert deadlines_of(with_groups(GROUPS)).plan > deadlines_of(Config()).plan
