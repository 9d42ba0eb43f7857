"""The model of a round among peers (models/rounds.pml): its properties hold, and none does without the rule that carries it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from models.check import CHECKS, MODEL, PROPERTIES, Check, verify

SMALL = [check for check in CHECKS if check.is_small]
CODE = Path(__file__).parents[2] / "mpc_fl"

needs_spin = pytest.mark.skipif(
    shutil.which("spin") is None or shutil.which("gcc") is None,
    reason="Spin is not there: apt-get install spin gcc (.ci/run does)",
)


@needs_spin
@pytest.mark.slow
@pytest.mark.parametrize("check", SMALL, ids=lambda check: check.name)
def test_the_model(check: Check, tmp_path: Path) -> None:
    found = verify(check, tmp_path)
    assert found.is_as(check), found


def test_each_rule_is_taken_out_once() -> None:
    rules = set(re.findall(r"WITHOUT_RULE_(\w+)", MODEL.read_text()))
    assert rules == {
        check.name.removeprefix("without the rule ") for check in CHECKS if check.fails and "RULE" in check.made_with
    }


def test_each_property_fails_without_some_rule() -> None:
    assert set(PROPERTIES) == {check.fails for check in CHECKS if check.fails}


@pytest.mark.skipif(
    not (CODE / "federation" / "peer_attendance.py").exists(), reason="rounds among peers are not there yet"
)
def test_states_have_the_names_of_the_code() -> None:
    """But for those in which nothing more is done, which have the names of what is raised there."""
    listed = re.search(r"mtype = \{(.*?)\}", MODEL.read_text(), re.DOTALL)
    assert listed is not None
    states = [name.strip() for name in listed[1].split(",")]
    steps = states[: states.index("done")]
    code = "\n".join(
        path.read_text()
        for part in ("aggregation", "federation", "audit", "sharing")
        for path in (CODE / part).glob("*.py")
    )
    assert [name for name in steps if not re.search(rf"def _?{name}\b", code)] == []
