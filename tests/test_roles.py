"""Names of parties: spelled and taken apart in one module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mpc_fl
import parties
from mpc_fl.errors import IdentityError
from mpc_fl.roles import (
    AGGREGATOR,
    DEALER,
    HOSPITAL,
    MODEL_OWNER,
    check_party_name,
    hospital_name,
    hospital_names,
    is_hospital,
    role_of,
    split_name,
)

_PACKAGES = [Path(str(package.__file__)).parent for package in (mpc_fl, parties)]
_SPELLED = (AGGREGATOR, MODEL_OWNER, HOSPITAL.rstrip("0123456789"))


def test_names_of_hospitals_go_to_a_rank_and_back() -> None:
    assert hospital_names(3) == ["hospital-0", "hospital-1", "hospital-2"]
    for rank in (0, 7, 63, 999):
        assert split_name(hospital_name(rank)) == ("hospital", rank)
        assert role_of(hospital_name(rank)) == "hospital"
        assert check_party_name(hospital_name(rank)) == hospital_name(rank)


@pytest.mark.parametrize("name", [AGGREGATOR, DEALER, MODEL_OWNER])
def test_the_name_of_a_server_is_its_role(name: str) -> None:
    assert not is_hospital(name)
    assert split_name(name) == (name, 0)
    assert check_party_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "hospital", "hospital-", "hospital-01", "hospital-1000", "hospital-1/..", "hospital-1\n", "hospital-x"]
)
def test_what_only_looks_like_a_hospital_is_none(name: str) -> None:
    assert not is_hospital(name)
    assert split_name(name) == (name, 0)
    with pytest.raises(IdentityError, match="is no party name"):
        check_party_name(name)


@pytest.mark.parametrize(
    "path",
    [path for package in _PACKAGES for path in sorted(package.rglob("*.py")) if path.name != "roles.py"],
    ids=lambda path: "/".join(path.parts[-3:]),
)
def test_no_other_module_spells_a_partys_name(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    spelled = [
        f"line {node.lineno}: {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _spells_a_name(node.value)
    ]
    assert spelled == []


def _spells_a_name(text: str) -> bool:
    """Whether a literal is a name or its beginning; sentences, which tell users about names, are none."""
    return text in _SPELLED or (text.startswith(_SPELLED[-1]) and " " not in text)
