"""Plans of closed sums: which sets may be opened, and which keys that takes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpc_fl.errors import ProtocolError
from mpc_fl.roles import hospital_names
from mpc_fl.sharing.mask_circle import MaskCircle
from mpc_fl.sharing.sum_plan import SumPlan, require_admissible


def plan_of(count: int, closing: int) -> SumPlan:
    return SumPlan(tuple(hospital_names(count)), "aggregator", ("test",), closing, "seen alike")


@pytest.mark.parametrize(
    ("admitted", "smallest", "why"),
    [
        (["hospital-0", "hospital-1"], 3, "too few"),
        (["hospital-0"], 1, "too few"),
        (["hospital-1", "hospital-0", "hospital-2"], 2, "do not belong"),
        (["hospital-0", "hospital-9", "hospital-2"], 2, "do not belong"),
    ],
)
def test_what_may_not_be_opened(admitted: list[str], smallest: int, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        require_admissible(plan_of(4, 2), admitted, smallest)


def test_nobody_may_be_left_out_where_nothing_closes_the_sum() -> None:
    require_admissible(plan_of(3, 0), ["hospital-0", "hospital-1", "hospital-2"], 2)
    with pytest.raises(ProtocolError, match="left a hospital out"):
        require_admissible(plan_of(3, 0), ["hospital-0", "hospital-1"], 2)


def test_plans_that_cannot_be() -> None:
    names = ("hospital-0", "hospital-1", "hospital-0")
    with pytest.raises(ProtocolError, match="cannot be"):
        SumPlan(names, "aggregator", ("test",), 1, "seen alike")
    with pytest.raises(ProtocolError, match="cannot be"):
        plan_of(3, 3)
    circle = MaskCircle(tuple(hospital_names(5)), 1, 1)
    with pytest.raises(ProtocolError, match="this circle"):
        SumPlan(tuple(hospital_names(4)), "aggregator", ("test",), 1, "seen alike", circle)


@given(st.integers(2, 7), st.integers(1, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_the_keys_of_v_open_its_sum_and_no_other(count: int, closing: int, data: st.DataObject) -> None:
    plan = plan_of(count, min(closing, count - 1))
    chosen = data.draw(st.sets(st.sampled_from(plan.hospitals), min_size=2))
    admitted = [name for name in plan.hospitals if name in chosen]
    given_keys = {key for name in admitted for key in plan.keys_of(name, chosen)}
    assert set(plan.keys_needed(admitted)) <= given_keys
    assert not plan.keys_missing(admitted, admitted) and plan.keys_missing(admitted, [])
    # A summand that is left out stays closed, and nobody gives a key of it that only closes it.
    assert not any(kind == "closing" and owner not in chosen for kind, owner, _ in given_keys)
    # Whoever of V is left out as well would have to be asked again.
    for less in (admitted[1:], admitted[:-1]):
        if len(less) >= 2:
            assert not set(plan.keys_needed(less)) <= given_keys
    # Each key is known to its two holders alone.
    for kind, owner, partner in given_keys:
        twin = (kind, partner, owner) if kind == "zero" else (kind, owner, partner)
        knowing = [name for name in plan.hospitals if {(kind, owner, partner), twin} & set(plan.keys_known_to(name))]
        assert set(knowing) == {owner, partner}
