"""Views, odd strides, no elements and no dimensions in every collective, opening, sum and mask, without CrypTen.

What a protocol is given it takes for its elements in row order and leaves as it is; what it returns is contiguous and no
part of what it was given. The same for CrypTen's own tensors, in real processes, is in `test_crypten_views`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import ReduceOp

from mpc_fl.crypto.ring import RingShare
from mpc_fl.crypto.secrecy import Private, Shared
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ProtocolError
from mpc_fl.sharing.closed_sum import SummandMasks
from mpc_fl.sharing.crypten_communicator import LinksCollectives, ShapeCollectives
from mpc_fl.sharing.opening import SecretDomain, open_to
from mpc_fl.sharing.secure_sum import secure_sum
from mpc_fl.sharing.sum_plan import SumPlan
from tests.support.harness import run_parties_in_memory
from tests.support.views import LAYOUTS, WRITABLE_LAYOUTS, in_row_order, views

WORLD = ["party-0", "party-1", "party-2"]
Layout = Callable[[torch.Tensor], torch.Tensor]


def base_of(rank: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return (torch.arange(24).reshape(4, 6) * 7 + 100 * rank).to(dtype)


def require_own(results: Any, given_tensors: list[torch.Tensor]) -> None:
    """What was returned is contiguous, and writing to it changes nothing that was given."""
    returned = [result for result in (results if isinstance(results, list) else [results]) if result is not None]
    before = [tensor.clone() for tensor in given_tensors]
    for result in returned:
        assert result.is_contiguous() and not result.requires_grad
        result.detach().fill_(1)
    for tensor, elements in zip(given_tensors, before, strict=True):
        assert torch.equal(tensor, elements), "a tensor of the caller was handed out"


# ---- collectives -------------------------------------------------------------------------------------------------------


def gathering(links: Any, layout: Layout) -> None:
    """Every call that hands out tensors, with a view; each rank knows what the others have."""
    communicator, rank, base = LinksCollectives(links, WORLD), WORLD.index(links.name), base_of(WORLD.index(links.name))
    own, all_of = layout(base), [layout(base_of(other)) for other in range(len(WORLD))]

    def check(results: Any, expected: list[torch.Tensor]) -> None:
        results = results if isinstance(results, list) else [results]
        assert len(results) == len(expected)
        for result, value in zip(results, expected, strict=True):
            assert result.dtype == value.dtype and result.shape == value.shape and torch.equal(result, value)
        require_own(results, [base, own])
        assert torch.equal(base, base_of(rank)), "a tensor of the caller was changed"

    check(communicator.all_gather(own), all_of)
    for root in range(len(WORLD)):
        gathered = communicator.gather(own, root)
        if root == rank:
            check(gathered, all_of)
        else:
            assert gathered == [None]
        summands = [layout(base_of(10 * root + other)) for other in range(len(WORLD))]
        parts = summands if root == rank else []
        scattered = communicator.scatter(parts, root, size=own.shape)
        assert torch.equal(scattered, layout(base_of(10 * root + rank)))
        require_own(scattered, summands)
    combined = {
        ReduceOp.SUM: all_of[0] + all_of[1] + all_of[2],
        ReduceOp.BXOR: all_of[0] ^ all_of[1] ^ all_of[2],
        ReduceOp.PRODUCT: all_of[0] * all_of[1] * all_of[2],
        ReduceOp.MAX: all_of[2],
    }
    for operation, expected in combined.items():
        check(communicator.all_reduce(own, op=operation), [expected])
        reduced = communicator.reduce(own, 1, op=operation)
        if rank == 1:
            check(reduced, [expected])
        else:
            assert reduced is None
    total = combined[ReduceOp.SUM]
    check(communicator.all_reduce([own, base, own], batched=True), [total, base_of(0) * 3 + 300, total])
    reduced = communicator.reduce([own, base.float()], 2, batched=True)
    if rank == 2:
        check(reduced, [total, (base_of(0) * 3 + 300).float()])
    else:
        assert reduced is None
    assert communicator.all_reduce([], batched=True) == []
    communicator.send(own, (rank + 1) % 3)
    pending = communicator.isend(own, (rank + 1) % 3)
    check(communicator.recv(own, (rank - 1) % 3), [all_of[(rank - 1) % 3]])
    check(communicator.recv(own, (rank - 1) % 3), [all_of[(rank - 1) % 3]])
    pending.wait()


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_collectives_return_has_the_elements_of_views_and_memory_of_its_own(name: str) -> None:
    run_parties_in_memory(gathering, WORLD, LAYOUTS[name])


def writing(links: Any, layout: Layout) -> None:
    """The two calls that write into what they are given: there, and nowhere else."""
    communicator, rank = LinksCollectives(links, WORLD), WORLD.index(links.name)
    for dtype in (torch.int64, torch.float32, torch.bool):
        base = base_of(rank, dtype)
        into, expected = layout(base), base_of(rank, dtype)
        layout(expected).copy_(layout(base_of(1, dtype)))
        assert communicator.broadcast(into, 1) is into
        assert torch.equal(base, expected)
        base = base_of(rank, dtype)
        several = communicator.broadcast([layout(base), layout(base)], 1, batched=True)
        assert torch.equal(base, expected) and all(torch.equal(one, layout(expected)) for one in several)
    base, expected = base_of(rank), base_of(rank)
    layout(expected).copy_(layout(base_of((rank - 1) % 3)))
    request = communicator.irecv(layout(base), (rank - 1) % 3)
    communicator.send(layout(base_of(rank)), (rank + 1) % 3)
    request.wait()
    request.wait()  # done already
    assert torch.equal(base, expected)


@pytest.mark.parametrize("name", WRITABLE_LAYOUTS)
def test_what_is_received_goes_into_a_view_and_not_beside_it(name: str) -> None:
    run_parties_in_memory(writing, WORLD, WRITABLE_LAYOUTS[name])


def broadcasting_parameters(links: Any) -> None:
    communicator, rank = LinksCollectives(links, WORLD), WORLD.index(links.name)
    linear = torch.nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.fill_(rank)
        linear.bias.fill_(rank + 5)
    for parameter in (linear.weight.t(), linear.bias):
        assert communicator.broadcast(parameter, 2) is parameter
    assert linear.weight.requires_grad and linear.bias.requires_grad
    assert linear.weight.eq(2).all() and linear.bias.eq(7).all()
    linear(torch.ones(1, 3)).sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad.eq(1).all()
    communicator.broadcast([linear.weight, linear.bias], 0, batched=True)
    assert linear.weight.eq(2).all()
    total = communicator.all_reduce(linear.weight)
    assert total.eq(6).all() and not total.requires_grad
    request = communicator.irecv(linear.weight, (rank - 1) % 3)
    communicator.send(torch.full((2, 3), float(rank)), (rank + 1) % 3)
    request.wait()
    assert linear.weight.eq((rank - 1) % 3).all()


def test_parameters_are_sent_and_received_into() -> None:
    run_parties_in_memory(broadcasting_parameters, WORLD)


def waiting_out_of_order(links: Any) -> None:
    """Receives that were asked for first get what was sent first, and collectives in between are none of them."""
    communicator, rank = LinksCollectives(links, WORLD), WORLD.index(links.name)
    after, before = (rank + 1) % 3, (rank - 1) % 3
    into = [torch.zeros(2, dtype=torch.int64) for _ in range(3)]
    requests = [communicator.irecv(tensor, before) for tensor in into]
    for number in range(4):
        communicator.send(torch.tensor([rank, number]), after)
    assert communicator.all_reduce(torch.tensor([1, 2])).tolist() == [3, 6]
    requests[1].wait()
    assert [tensor.tolist() for tensor in into] == [[before, 0], [before, 1], [0, 0]]
    assert communicator.recv(torch.zeros(2, dtype=torch.int64), before).tolist() == [before, 3]
    assert into[2].tolist() == [before, 2]
    for request in requests:
        request.wait()


def test_receives_keep_the_order_in_which_they_were_asked_for() -> None:
    run_parties_in_memory(waiting_out_of_order, WORLD)


def refused(links: Any, layout: Layout) -> None:
    communicator = LinksCollectives(links, WORLD)
    tensor = layout(base_of(0))
    before = tensor.clone()
    with pytest.raises(ProtocolError, match="in one place cannot take"):
        communicator.irecv(tensor, (communicator.get_rank() + 1) % 3)
    with pytest.raises(ProtocolError, match="in one place cannot take"):
        communicator.broadcast(tensor, (communicator.get_rank() + 1) % 3)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - set(WRITABLE_LAYOUTS)))
def test_nothing_is_received_into_elements_that_lie_in_one_place(name: str) -> None:
    run_parties_in_memory(refused, WORLD, LAYOUTS[name])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_dry_run_lays_results_out_like_the_run(name: str) -> None:
    communicator, base = ShapeCollectives(3), base_of(0)
    view = LAYOUTS[name](base)
    results = [*communicator.gather(view, 0), *communicator.all_gather(view), communicator.all_reduce(view)]
    results += [*communicator.all_reduce([view, base], batched=True), communicator.reduce(view, 0)]
    assert all(result.shape in (view.shape, base.shape) for result in results)
    require_own(results, [base])


# ---- openings and sums -------------------------------------------------------------------------------------------------


class _NoRecord:
    """A record of openings in memory."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def append(self, opening: Any) -> None:
        self.shapes.append(tuple(opening.shape))


def opening(links: Any) -> None:
    """Shares of every layout, by sum and by exclusive or, in both rings, to all parties and to one."""
    record = _NoRecord()
    domain, rank = SecretDomain(links, WORLD, record), WORLD.index(links.name)  # type: ignore[arg-type]
    for name, layout in LAYOUTS.items():
        for dtype in (torch.int64, torch.int32):
            base, all_of = base_of(rank, dtype), [layout(base_of(other, dtype)) for other in range(3)]
            for exclusive_or in (False, True):
                for who in (WORLD, ["party-1"]):
                    share: Shared[RingShare] = Shared("a value", RingShare(layout(base), 0, exclusive_or))
                    value = open_to(domain, share, list(who), "test", decode=False)
                    assert torch.equal(base, base_of(rank, dtype)), f"{name}: the share of the caller was changed"
                    if links.name not in who:
                        assert value is None
                        continue
                    first, second, third = all_of
                    assert value is not None and value.dtype == dtype and value.shape == first.shape, name
                    assert torch.equal(value, first ^ second ^ third if exclusive_or else first + second + third), name
                    require_own(value, [base])
                    assert record.shapes[-1] == tuple(first.shape)


def test_shares_of_every_layout_are_opened_and_stay_as_they_are() -> None:
    run_parties_in_memory(opening, WORLD)


def opening_one(links: Any, of_all: list[torch.Tensor]) -> Any:
    domain = SecretDomain(links, WORLD[:2], _NoRecord())  # type: ignore[arg-type]
    share: Shared[RingShare] = Shared("a value", RingShare(of_all[WORLD.index(links.name)], 0))
    return open_to(domain, share, WORLD[:2], "test", decode=False)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_parties_whose_shares_lie_differently_in_memory_open_the_same(data: st.DataObject) -> None:
    view = data.draw(views(overlapping=True))
    elements = in_row_order(view)
    results = run_parties_in_memory(opening_one, WORLD[:2], [view, elements])
    for value in results.values():
        assert torch.equal(value, elements + elements)


def summing(links: Any) -> None:
    domain, rank = SecretDomain(links, WORLD, _NoRecord()), WORLD.index(links.name)  # type: ignore[arg-type]
    for name, layout in LAYOUTS.items():
        for dtype in (torch.int64, torch.int32):
            base = base_of(rank, dtype)
            share = secure_sum(domain, Private("a value", layout(base)), 0)
            require_own(share.inside_protocol().elements.clone(), [base])
            kept = share.inside_protocol().elements.clone()
            base += 1  # what the caller does with its tensor afterwards is not the share's
            assert torch.equal(share.inside_protocol().elements, kept), name
            value = open_to(domain, share, WORLD, "test", decode=False)
            expected = sum((layout(base_of(other, dtype)) for other in range(3)), torch.zeros((), dtype=dtype))
            assert value is not None and torch.equal(value, expected), name


def test_a_secure_sum_takes_views_and_shares_no_memory_with_them() -> None:
    run_parties_in_memory(summing, WORLD)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_masks_of_a_closed_sum_go_into_views_in_row_order(name: str, in_place: bool) -> None:
    plan = SumPlan(("a", "b"), "aggregator", ("test", 1), 0, "transcript")
    pairs = {"a": Seed(bytes(32)), "b": Seed(bytes(32))}
    base = base_of(0, torch.int32)
    masked = []
    for me, other in (("a", "b"), ("b", "a")):
        view = LAYOUTS[name](base_of(0, torch.int32) if in_place else base)
        masks = SummandMasks(plan, me, view.shape, {other: pairs[me]}.__getitem__)
        masked.append(masks.masked(Private("an update", view), in_place))
    assert torch.equal(base, base_of(0, torch.int32))
    assert torch.equal(masked[0] + masked[1], 2 * LAYOUTS[name](base))
