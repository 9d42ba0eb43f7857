"""Closed sums in one process: exact over whoever is in them, closed to everybody else, opened once."""

from __future__ import annotations

import secrets
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mpc_fl.crypto.ring import FixedPoint, MeanHeadroom
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import HeadroomError, ProtocolError, SecrecyError
from mpc_fl.sharing.closed_sum import ClosedSum, SummandMasks
from mpc_fl.sharing.mask_circle import joint_seed
from mpc_fl.sharing.sum_plan import SumPlan

FALSE_ALARM = 1e-7


def parties(
    count: int, closing: int, shape: tuple[int, ...] = (3,), label: str = "test", apart: bool = False
) -> dict[str, SummandMasks]:
    """The masks of all hospitals of one sum, each pair with a seed of its own."""
    names = tuple(f"hospital-{rank}" for rank in range(count))
    keys = {frozenset(pair): secrets.token_bytes(32) for pair in combinations(names, 2)}
    plan = SumPlan(names, "aggregator", (label,), closing, "seen alike", apart=apart)
    return {
        name: SummandMasks(plan, name, shape, lambda other, name=name: Seed(keys[frozenset((name, other))]))  # type: ignore[misc]
        for name in names
    }


def opened(masks: dict[str, SummandMasks], values: dict[str, torch.Tensor], admitted: list[str], lost: Any = ()) -> Any:
    """Everybody sends; V is `admitted`; those in `lost` give no keys."""
    plan = next(iter(masks.values())).plan
    closed = ClosedSum(plan, next(iter(values.values())).dtype, (3,), keep=len(admitted) < len(masks))
    for name in masks:
        closed.commitments.take(name, masks[name].commitments())
    for name in admitted:
        closed.take(name, masks[name].masked(Private("x", values[name])))
    keys = {name: masks[name].keys_for(admitted, 2) for name in admitted if name not in lost}
    assert not closed.keys_missing(admitted, list(keys)) or lost
    return closed.unmask(admitted, keys)


@given(
    st.integers(2, 6),
    st.integers(0, 5),
    st.sampled_from([torch.int32, torch.int64]),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_the_sum_over_those_admitted_is_exact(
    count: int, closing: int, dtype: torch.dtype, seed: int, apart: bool, data: st.DataObject
) -> None:
    closing = min(closing, count - 1)
    masks = parties(count, closing, apart=apart)
    names = list(masks)
    generator, bits = torch.Generator().manual_seed(seed), 31 if dtype == torch.int32 else 63
    values = {
        name: torch.randint(-(2**bits), 2**bits - 1, (3,), dtype=torch.int64, generator=generator).to(dtype)
        for name in names
    }
    left_out = data.draw(st.integers(0, count - 2)) if closing else 0
    chosen = data.draw(st.permutations(names))[left_out:]
    admitted = [name for name in names if name in chosen]
    total = opened(masks, {name: value.clone() for name, value in values.items()}, admitted)
    expected = values[admitted[0]].clone()
    for name in admitted[1:]:
        expected += values[name]  # wraps like the ring
    assert total.dtype == dtype and torch.equal(total, expected)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("lost", ["hospital-0", "hospital-1", "hospital-2", "hospital-3"])
def test_a_hospital_lost_after_it_sent_costs_nothing(lost: str, apart: bool) -> None:
    masks = parties(4, 2, apart=apart)
    values = {name: torch.full((3,), rank + 1, dtype=torch.int32) for rank, name in enumerate(masks)}
    assert opened(masks, values, list(masks), [lost]).tolist() == [10, 10, 10]


def test_the_keys_of_two_partners_lost_together_close_the_sum_for_ever() -> None:
    masks = parties(4, 1)
    values = {name: torch.ones(3, dtype=torch.int32) for name in masks}
    with pytest.raises(ProtocolError, match="lost with the parties that held them"):
        opened(masks, values, list(masks), ["hospital-0", "hospital-1"])


def test_all_closing_masks_of_a_summand_are_one_key_stream_unless_they_are_apart() -> None:
    """Which then nobody can fold for a check, because nobody else knows its key."""
    joint, apart = parties(4, 3), parties(4, 3, apart=True)
    assert [len(list(masks["hospital-1"].closing_masks())) for masks in (joint, apart)] == [1, 3]
    for told in ("shared_masks", "own_masks"):
        assert len(list(getattr(apart["hospital-1"], told)("hospital-2"))) == 2
        with pytest.raises(SecrecyError, match="only one other hospital"):
            list(getattr(joint["hospital-1"], told)("hospital-2"))


def test_one_key_that_stays_unknown_leaves_a_summand_masked() -> None:
    """Whoever has all others of the three keys of its closing mask."""
    masks = parties(4, 3, (20_000,))
    own, plan = masks["hospital-0"], masks["hospital-0"].plan
    words = own.masked(Private("x", torch.zeros(20_000, dtype=torch.int32)))
    for other in plan.neighbours("hospital-0"):
        own._seeds["zero", "hospital-0", other].again().stream("mask").subtract_from(words)
    known = [own._seeds["closing", "hospital-0", partner].again() for partner in plan.partners("hospital-0")]
    for guessed in (known[:2], known[1:], [*known[:2], Seed.from_system()]):
        tried = words.clone()
        joint_seed([seed.reveal_for_transport() for seed in guessed]).stream("mask").subtract_from(tried)
        assert _uniform(tried) > FALSE_ALARM
    for stream in own.closing_masks():
        stream.subtract_from(words)
    assert not words.any()


def test_masks_of_different_transcripts_do_not_cancel() -> None:
    """Two hospitals that were told different things: what the opener adds up is uniform, whatever it leaves out."""
    names = ("hospital-0", "hospital-1", "hospital-2")
    keys = {frozenset(pair): secrets.token_bytes(32) for pair in combinations(names, 2)}
    sent = {}
    for name in names:
        told = "another" if name == "hospital-2" else "one"
        plan = SumPlan(names, "aggregator", ("test",), 0, told)
        masks = SummandMasks(plan, name, (20_000,), lambda other, name=name: Seed(keys[frozenset((name, other))]))  # type: ignore[misc]
        sent[name] = masks.masked(Private("x", torch.zeros(20_000, dtype=torch.int32)))
    for size in (1, 2, 3):
        for chosen in combinations(sent, size):
            assert _uniform(sum(sent[name] for name in chosen)) > FALSE_ALARM, chosen  # type: ignore[arg-type]


def test_who_sends_another_key_than_it_committed_to_is_named() -> None:
    masks = parties(4, 1)
    plan, names = masks["hospital-0"].plan, list(masks)
    closed = ClosedSum(plan, torch.int32, (3,))
    for name in names:
        closed.commitments.take(name, masks[name].commitments())
        closed.take(name, masks[name].masked(Private("x", torch.ones(3, dtype=torch.int32))))
    keys = {name: masks[name].keys_for(names, 2) for name in names}
    keys["hospital-2"][0, 5] ^= 1
    with pytest.raises(ProtocolError, match="hospital-2 sent another key .* than it committed to"):
        closed.unmask(names, keys)


def test_two_hospitals_that_commit_to_different_keys_are_both_named() -> None:
    masks = parties(4, 1)
    closed = ClosedSum(masks["hospital-0"].plan, torch.int32, (3,))
    closed.commitments.take("hospital-0", masks["hospital-0"].commitments())
    lied = masks["hospital-1"].commitments()
    with pytest.raises(ProtocolError, match="hospital-1 and hospital-0 committed to different keys"):
        closed.commitments.take("hospital-1", ["0" * 64, *lied[1:]])
    for bad in (None, lied[:-1], [*lied[:-1], 5]):
        with pytest.raises(ProtocolError, match="hospital-1 did not commit"):
            closed.commitments.take("hospital-1", bad)


def test_a_sum_opens_over_one_set_only() -> None:
    masks = parties(4, 2)
    first = masks["hospital-0"]
    first.keys_for(list(masks), 2)
    with pytest.raises(SecrecyError, match="asked for twice"):
        first.keys_for(["hospital-0", "hospital-1", "hospital-2"], 2)


def test_no_keys_are_given_for_what_may_not_be_opened() -> None:
    masks = parties(4, 2)
    with pytest.raises(ProtocolError, match="too few"):
        masks["hospital-0"].keys_for(["hospital-0", "hospital-1"], 3)
    with pytest.raises(ProtocolError, match="hospital-3 is not in the sum"):
        masks["hospital-3"].keys_for(["hospital-0", "hospital-1", "hospital-2"], 3)
    assert masks["hospital-0"].keys_for(list(masks), 3).shape == (4, 32)  # nothing was given before


def _uniform(words: torch.Tensor) -> float:
    digits = np.bincount((words.numpy().view(np.uint32) >> 24).astype(np.int64), minlength=256)
    return float(stats.chisquare(digits).pvalue)


def test_no_subset_of_what_the_opener_holds_shows_anything_before_the_keys() -> None:
    """Any sum of the summands is uniform, the one over all of them too: without keys the sum is closed."""
    masks = parties(3, 1, (20_000,))
    sent = {name: m.masked(Private("x", torch.zeros(20_000, dtype=torch.int32))) for name, m in masks.items()}
    for size in (1, 2, 3):
        for chosen in combinations(sent, size):
            total = torch.zeros(20_000, dtype=torch.int32)
            for name in chosen:
                total += sent[name]
            assert _uniform(total) > FALSE_ALARM, chosen


def test_a_late_summand_stays_masked_when_the_others_are_opened() -> None:
    """The opener takes away all masks whose keys it was given; those that close the late summand are not among them."""
    masks = parties(4, 2, (20_000,))
    admitted = ["hospital-0", "hospital-1", "hospital-3"]
    late = masks["hospital-2"].masked(Private("x", torch.zeros(20_000, dtype=torch.int32)))
    for name in admitted:
        for key, row in zip(masks[name].plan.keys_of(name, admitted), masks[name].keys_for(admitted, 2), strict=True):
            if key[0] == "zero" and key[2] == "hospital-2":
                adds = masks[name].plan.adds("hospital-2", name)
                stream = Seed(row.numpy().tobytes()).stream("mask")
                (stream.subtract_from if adds else stream.add_to)(late)
            assert key[:2] != ("closing", "hospital-2")
    assert _uniform(late) > FALSE_ALARM


@given(st.integers(2, 64), st.integers(4, 24), st.floats(0.01, 64.0), st.data())
@settings(max_examples=60, deadline=None)
def test_a_mean_fits_the_ring_it_is_given(hospitals: int, bits: int, bound: float, data: st.DataObject) -> None:
    headroom = MeanHeadroom(FixedPoint(bits, bound), hospitals)
    counts = data.draw(st.lists(st.integers(1, 5000), min_size=hospitals, max_size=hospitals))
    total = 1 << (sum(counts) - 1).bit_length()
    largest = torch.full((2,), bound, dtype=torch.float64)
    largest[1] = -bound
    encoded = [headroom.encode(largest, count / total, "update").long() for count in counts]
    exact = torch.stack(encoded).sum(dim=0)
    assert int(exact.abs().max()) < 2 ** (headroom.ring_bits - 1)
    in_ring = torch.stack(encoded).to(headroom.dtype).sum(dim=0, dtype=headroom.dtype)
    assert torch.equal(in_ring.long(), exact)
    mean = headroom.decode(in_ring, total / sum(counts))
    assert float((mean - largest).abs().max()) <= total / sum(counts) * hospitals / 2 ** (bits + 1) + 1e-9


def test_what_a_mean_refuses() -> None:
    headroom = MeanHeadroom(FixedPoint(24, 1.0), 3)
    for bad in (float("nan"), float("inf"), -float("inf"), 1.01):
        with pytest.raises(HeadroomError):
            headroom.encode(torch.tensor([0.5, bad]), 0.5, "update")
    with pytest.raises(HeadroomError, match="63"):
        MeanHeadroom(FixedPoint(40, 2.0**24), 3).require()
    assert headroom.ring_bits == 32 and MeanHeadroom(FixedPoint(24, 128.0), 3).ring_bits == 64


def test_summands_may_come_added_up_unless_each_is_checked_by_itself() -> None:
    masks = parties(4, 1)
    values = {name: torch.tensor([rank, 10 * rank, -rank], dtype=torch.int32) for rank, name in enumerate(masks)}
    first, second, *others = masks
    words = {name: of.masked(Private("x", values[name])) for name, of in masks.items()}
    closed = ClosedSum(masks[first].plan, torch.int32, (3,))
    for name, of in masks.items():
        closed.commitments.take(name, of.commitments())
    for name in others:
        closed.take(name, words[name])
    closed.take_added([first, second], words[first] + words[second])
    assert closed.present == tuple(masks)
    keys = {name: of.keys_for(list(masks), 2) for name, of in masks.items()}
    assert closed.unmask(list(masks), keys).tolist() == [6, 60, -6]
    with pytest.raises(ProtocolError, match="checked one by one"):
        ClosedSum(masks[first].plan, torch.int32, (3,), keep=True).take_added([first], words[first])
