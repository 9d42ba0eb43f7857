"""A circle of masks: honest hospitals hang together whichever set is opened, and no two sets show more than one sum."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpc_fl.errors import ProtocolError
from mpc_fl.sharing.mask_circle import MaskCircle
from mpc_fl.sharing.sum_plan import SumPlan, require_admissible

NAMES = tuple(f"hospital-{rank}" for rank in range(11))
REACH, LEAST, CLOSING = 3, 2, 2
CIRCLE = MaskCircle(NAMES, REACH, LEAST)
PLAN = SumPlan(NAMES, "aggregator", ("test",), CLOSING, "seen alike", CIRCLE)


def parts(hospitals: Collection[str], joined: Mapping[str, Collection[str]]) -> Iterator[frozenset[str]]:
    """The connected parts of a graph."""
    left = set(hospitals)
    while left:
        part, reached = set[str](), {min(left)}
        while reached:
            part |= reached
            reached = {other for name in reached for other in joined[name] if other in left} - part
        left -= part
        yield frozenset(part)


@st.composite
def colluding(draw: st.DrawFn) -> frozenset[str]:
    """At most one of any three that follow each other, as the bounds of this circle allow, so none of two alone."""
    found = draw(st.sets(st.sampled_from(NAMES), max_size=3))
    places = sorted(NAMES.index(name) for name in found)
    steps = [(after - before) % len(NAMES) for before, after in zip(places, places[1:] + places[:1], strict=True)]
    assume(len(places) < 2 or min(steps) >= REACH)
    return frozenset(found)


@st.composite
def admissible(draw: st.DrawFn) -> tuple[str, ...]:
    """Any V that hospitals would sign."""
    out = draw(st.sets(st.sampled_from(NAMES), max_size=7))
    admitted = tuple(name for name in NAMES if name not in out)
    assume(len(admitted) >= 2 and not CIRCLE.followed_by_too_few(admitted))
    return admitted


def test_neighbours_are_mutual_and_partners_are_neighbours() -> None:
    for name in NAMES:
        neighbours = PLAN.neighbours(name)
        assert len(set(neighbours)) == 2 * REACH and name not in neighbours
        assert all(name in PLAN.neighbours(other) for other in neighbours)
        assert set(PLAN.partners(name)) | set(PLAN.closed_with(name)) <= set(neighbours)
        assert all(name in PLAN.partners(other) for other in PLAN.closed_with(name))


@pytest.mark.parametrize(
    ("order", "reach", "least"), [(NAMES, 6, 2), (NAMES, 3, 4), (NAMES, 3, 0), ((*NAMES, NAMES[0]), 3, 2)]
)
def test_what_is_no_circle(order: tuple[str, ...], reach: int, least: int) -> None:
    with pytest.raises(ProtocolError, match="cannot be"):
        MaskCircle(order, reach, least)


def test_a_plan_refuses_the_ring_of_other_hospitals() -> None:
    with pytest.raises(ProtocolError, match="cannot be masked by this circle"):
        SumPlan((*NAMES[:-1], "hospital-99"), "aggregator", ("test",), CLOSING, "seen alike", CIRCLE)


@given(st.sets(st.sampled_from(NAMES)))
def test_who_is_followed_by_too_few_is_found(admitted: set[str]) -> None:
    expected = {}
    for name in admitted:
        count = sum(other in admitted for other in CIRCLE.following(name, REACH))
        if count < LEAST:
            expected[name] = count
    assert CIRCLE.followed_by_too_few(admitted) == expected


def test_a_set_that_would_isolate_somebody_is_admissible_to_nobody() -> None:
    """All neighbours of hospital 5 but one that colludes are left out: its summand would be its own mask alone."""
    admitted = [name for name in NAMES if name not in PLAN.neighbours("hospital-5") or name == "hospital-6"]
    assert CIRCLE.followed_by_too_few(admitted)["hospital-5"] == 1
    with pytest.raises(ProtocolError, match="hospitals that follow hospital-0 in the circle of masks 1 are left"):
        require_admissible(PLAN, admitted, 2)


@given(colluding(), admissible())
@settings(max_examples=80, deadline=None)
def test_honest_hospitals_hang_together_whoever_chose_the_set(
    colluders: frozenset[str], admitted: tuple[str, ...]
) -> None:
    honest = [name for name in admitted if name not in colluders]
    joined = {name: PLAN.neighbours(name) for name in honest}
    assert len(list(parts(honest, joined))) == 1


def opened(colluders: Collection[str], told: Mapping[str, tuple[str, ...]]) -> list[frozenset[str]]:
    """Of which honest hospitals together a sum shows when each was told this set, or none, and what it saw confirmed is its rule.

    What the opener can add up without an unknown mask are the parts of the graph of unknown z_ij in which every closing
    mask is known.
    """
    gives = {
        name: admitted
        for name, admitted in told.items()
        if admitted
        and all(other in colluders or told[other] == admitted for other in PLAN.confirmed_by(name, admitted))
    }
    known = {key for name in colluders for key in PLAN.keys_known_to(name)}
    known |= {key for name, admitted in gives.items() for key in PLAN.keys_of(name, admitted)}
    known |= {("zero", other, name) for kind, name, other in known if kind == "zero"}
    hidden = {
        name: [other for other in PLAN.neighbours(name) if ("zero", name, other) not in known and other in told]
        for name in told
    }
    return [
        part
        for part in parts(told, hidden)
        if all(("closing", name, partner) in known for name in part for partner in PLAN.partners(name))
    ]


@given(colluding(), st.lists(admissible(), min_size=1, max_size=3), st.data())
@settings(max_examples=120, deadline=None)
def test_whatever_sets_are_told_what_opens_is_a_sum_over_all_honest_of_one_set(
    colluders: frozenset[str], sets: list[tuple[str, ...]], data: st.DataObject
) -> None:
    """Each hospital is told any set, and sees the confirmations of its neighbours alone: is that enough?"""
    honest = [name for name in NAMES if name not in colluders]
    told = {name: data.draw(st.sampled_from([(), *(each for each in sets if name in each)]), name) for name in honest}
    for part in opened(colluders, told):
        admitted = told[min(part)]
        assert part == set(admitted) - colluders
        assert all(told[name] == admitted for name in part)


@pytest.mark.parametrize(
    ("colluders", "missing", "of_the_first"),
    [((4, 9), (5, 10), (10, 0, 1, 2, 3)), ((0, 5), (10, 6), (1, 2, 3, 4, 6))],
    ids=["those before", "those after"],
)
def test_what_neighbours_to_both_sides_confirmed_must_be_seen(
    colluders: tuple[int, int], missing: tuple[int, int], of_the_first: tuple[int, ...]
) -> None:
    """Two sets, each told to a part of the circle, that meet where a colluder makes up for who is missing.

    Whoever did not see what those before it confirmed, or those after it, would give its keys: all summands would be open, those
    of a set that nobody confirmed.
    """
    first, second = (tuple(name for name in NAMES if name != NAMES[place]) for place in missing)
    assert not CIRCLE.followed_by_too_few(first) and not CIRCLE.followed_by_too_few(second)
    honest = [place for place in range(len(NAMES)) if place not in colluders]
    told = {NAMES[place]: first if place in of_the_first else second for place in honest}
    pooled = {NAMES[place] for place in colluders}
    assert opened(pooled, told) == []
    assert opened(pooled, dict.fromkeys(told, NAMES)) == [frozenset(told)]


def test_a_set_that_all_confirm_opens() -> None:
    admitted = NAMES[:4] + NAMES[5:]
    needed = {("closing", name, partner) for name in admitted for partner in PLAN.partners(name)}
    needed |= {("zero", name, "hospital-4") for name in PLAN.neighbours("hospital-4")}
    assert needed == {key for name in admitted for key in PLAN.keys_of(name, admitted)}
