"""What is clear before the first round: who a sum hides its summands from."""

from __future__ import annotations

import pytest

from mpc_fl.config.config import parse_config
from mpc_fl.errors import ConfigError
from mpc_fl.federation.planning import sum_rules


@pytest.mark.parametrize(
    ("quorum", "colluders", "fits"), [(None, 1, True), (2, 1, False), (2, 0, True), (2, None, True)]
)
def test_a_quorum_hides_a_summand_from_all_but_two_of_its_hospitals(
    quorum: int | None, colluders: int | None, fits: bool
) -> None:
    config = parse_config({"federation": {"quorum": quorum}, "privacy": {"colluders": colluders}}, "test")
    if fits:
        rules = sum_rules(config)
        # A summand that is left out stays closed against the aggregator and at least one hospital.
        assert rules.closing == (0 if quorum is None else 2)
        assert rules.hospitals == ("hospital-0", "hospital-1", "hospital-2")
    else:
        with pytest.raises(ConfigError, match="a quorum of 2 hides it from the aggregator with 0 hospitals"):
            sum_rules(config)


@pytest.mark.parametrize(
    ("hospitals", "colluders", "neighbours", "expected"),
    [(16, None, "auto", None), (20, None, "auto", 4), (20, 7, "auto", 7), (20, None, "all", None)],
)
def test_beyond_sixteen_hospitals_masks_form_a_graph(
    hospitals: int, colluders: int | None, neighbours: str, expected: int | None
) -> None:
    values = {
        "federation": {"hospitals": hospitals, "quorum": hospitals - 1},
        "privacy": {"colluders": colluders},
        "aggregation": {"mask_neighbours": neighbours},
    }
    rules = sum_rules(parse_config(values, "test"))
    assert rules.colluders == expected
    assert (rules.bounds(hospitals) is None) == (expected is None)


def test_masks_between_all_are_not_asked_for_where_there_are_no_others() -> None:
    values = {"federation": {"hospitals": 16}, "aggregation": {"mask_neighbours": "all"}}
    with pytest.raises(ConfigError, match="up to 16 hospitals share masks with all others anyway"):
        parse_config(values, "test")
