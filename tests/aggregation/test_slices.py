"""Slices of masked summands: nothing is lost or opened twice, whoever is left; and V, of which each has a slice of each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.aggregation.slices import Slices, who_has_all
from mpc_fl.errors import ProtocolError
from tests.support.peer_sums import hospitals_of

counts = st.integers(1, 9)


@given(counts, st.integers(0, 100))
def test_slices_are_even_and_make_up_the_vector(count: int, elements: int) -> None:
    slices, words = Slices(hospitals_of(count), elements), torch.arange(elements, dtype=torch.int32)
    cut = slices.cut(words)
    assert tuple(cut) == slices.hospitals
    assert {name: len(piece) for name, piece in cut.items()} == {name: slices.length(name) for name in cut}
    assert max(map(len, cut.values())) - min(map(len, cut.values())) <= 1
    assert torch.equal(slices.joined(cut), words)


def test_a_summand_of_any_shape_is_cut_in_row_order() -> None:
    words = torch.arange(12).reshape(3, 4)
    cut = Slices(hospitals_of(2), 12).cut(words.t())
    assert cut["hospital-0"].tolist() == [0, 4, 8, 1, 5, 9]


@given(counts, st.data())
def test_every_slice_is_opened_by_one_of_those_left_and_by_its_own_hospital_if_it_can(
    count: int, data: st.DataObject
) -> None:
    hospitals = hospitals_of(count)
    slices = Slices(hospitals, 30)
    chosen = data.draw(st.sets(st.sampled_from(hospitals), min_size=1))
    admitted = tuple(name for name in hospitals if name in chosen)
    opened = [piece for hospital in admitted for piece in slices.opened_by(hospital, admitted)]
    assert sorted(opened) == sorted(hospitals)
    assert all(slices.opener(name, admitted) == name for name in admitted)
    handed_on = slices.handed_on(admitted)
    assert set(handed_on) == set(hospitals) - set(admitted) and set(handed_on.values()) <= set(admitted)
    for name, opener in handed_on.items():  # to the next one: nobody of V lies between
        at = hospitals.index(name)
        after = (*hospitals[at + 1 :], *hospitals[:at])
        assert next(other for other in after if other in admitted) == opener


def test_nobody_opens_a_slice_when_nobody_is_left() -> None:
    with pytest.raises(ProtocolError, match="nobody is left"):
        Slices(hospitals_of(2), 4).opener("hospital-0", ())


@given(st.integers(2, 7), st.data())
def test_of_those_in_the_sum_each_has_a_slice_of_each(count: int, data: st.DataObject) -> None:
    hospitals = hospitals_of(count)
    some = st.sets(st.sampled_from([*hospitals, "nobody"]))
    came = {name: data.draw(some) | {name} for name in data.draw(st.sets(st.sampled_from(hospitals)))}
    came["hospital-1"] = came.get("hospital-1", set()) | {"hospital-1"}
    admitted = who_has_all(hospitals, "hospital-1", came)
    assert "hospital-1" in admitted and set(admitted) <= set(came)
    assert list(admitted) == [name for name in hospitals if name in admitted]
    assert all(other in came[name] for name in admitted for other in admitted)
    if all(set(came) <= came[name] for name in came):
        assert set(admitted) == set(came)


def test_whoever_lacks_most_is_left_out_and_of_two_that_disagree_one() -> None:
    hospitals = hospitals_of(4)
    everybody = {name: set(hospitals) for name in hospitals}
    assert who_has_all(hospitals, "hospital-3", {**everybody, "hospital-0": {"hospital-0"}}) == hospitals[1:]
    lacks_one = {**everybody, "hospital-1": {"hospital-0", "hospital-1", "hospital-3"}}
    assert who_has_all(hospitals, "hospital-0", lacks_one) == ("hospital-0", "hospital-1", "hospital-3")
    # The proposer itself says that it has not got a slice: it does not leave itself out.
    assert who_has_all(hospitals, "hospital-2", {**everybody, "hospital-2": {"hospital-2"}}) == ("hospital-2",)


@given(st.sets(st.integers(0, 6), min_size=2))
def test_each_of_v_has_another_keeper_and_keeps_for_one(inside: set[int]) -> None:
    hospitals = hospitals_of(7)
    slices, admitted = Slices(hospitals, 70), tuple(hospitals[rank] for rank in sorted(inside))
    keepers = {name: slices.keeper(name, admitted) for name in admitted}
    assert sorted(keepers.values()) == sorted(admitted) and all(keepers[name] != name for name in admitted)
    first, last = admitted[0], admitted[-1]
    assert keepers[last] == first
    kept = [piece for name in admitted for piece in slices.opened_by(name, admitted)]
    assert sorted(kept) == sorted(hospitals)
