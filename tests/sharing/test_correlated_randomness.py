"""Correlated randomness: every kind of tuple against its defining equation, and requests as hostile input."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ProtocolError
from mpc_fl.sharing import correlated_randomness
from mpc_fl.sharing.correlated_randomness import BLOCK_BYTES, Request, TupleProgram
from tests.support.dealing import additive, check_tuple, wrapped


def deal(request: Request, parties: int, position: int = 0) -> list[list[torch.Tensor]]:
    """The shares of all parties, as dealer and parties compute them."""
    keys = [os.urandom(32) for _ in range(parties)]
    correction = request.correction([Seed(key) for key in keys], position)
    shares = []
    for rank, key in enumerate(keys):
        seed = Seed(key)
        drawn = [request.drawn_share(part, seed, position) for part in range(len(request.shapes))]
        shares.append([*drawn, correction if rank == parties - 1 else request.corrected_share(seed, position)])
    return shares


small = st.integers(1, 4)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def broadcast_pairs(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes that broadcast, of different length and with ones in different places."""
    full = draw(st.lists(st.integers(0, 4), max_size=4))
    first, second = [[1 if draw(st.booleans()) else size for size in full] for _ in range(2)]
    return tuple(first[draw(st.integers(0, len(full))) :]), tuple(second)


@st.composite
def convolutions(draw: Any) -> Request:
    """Convolutions that torch computes, of every kind, with every option, batches of zero images included."""
    operation = draw(st.sampled_from(["conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"]))
    dimensions = 1 if "1d" in operation else 2
    groups, per_input, per_output, batch = draw(st.integers(1, 3)), draw(small), draw(small), draw(st.integers(0, 2))
    kernel = [draw(st.integers(1, 3)) for _ in range(dimensions)]
    options: dict[str, Any] = {"groups": groups}
    for name, low, high in (("stride", 1, 3), ("dilation", 1, 2), ("padding", 0, 1)):
        if draw(st.booleans()):
            one = draw(st.integers(low, high))
            each = [draw(st.integers(low, high)) for _ in range(dimensions)]
            options[name] = draw(st.sampled_from([one, each]))
    image = [draw(st.integers(5, 7)) for _ in range(dimensions)]
    channels = groups * per_input
    if "transpose" in operation:
        return additive(operation, [batch, channels, *image], [channels, per_output, *kernel], **options)
    return additive(operation, [batch, channels, *image], [groups * per_output, per_input, *kernel], **options)


requests = st.one_of(
    st.builds(lambda pair: additive("mul", *pair), broadcast_pairs()),
    st.builds(lambda n, m, k: additive("matmul", (n, m), (m, k)), small, st.integers(0, 4), small),
    st.builds(lambda n, m, k: additive("matmul", (2, n, m), (m, k)), small, small, small),
    st.builds(lambda n: additive("matmul", (n,), (n,)), small),
    convolutions(),
    st.builds(lambda shape: Request("square", (shape,)), shapes),
    st.builds(lambda pair: Request("binary", pair), broadcast_pairs()),
    st.builds(lambda shape: Request("wraps", (shape,)), shapes),
    st.builds(lambda shape: Request("B2A", (shape,)), shapes),
)


@pytest.mark.parametrize("parties", [2, 3, 5])
@given(request=requests)
def test_opened_tuples_satisfy_their_equation(parties: int, request: Request) -> None:
    check_tuple(request, deal(request, parties))


@pytest.mark.parametrize("parties", [2, 3, 5])
def test_wraps_are_counted_for_shares_of_every_size(parties: int) -> None:
    """Uniform shares wrap often; the largest and smallest wrap most, and sums of exactly 2^63 and 2^64 are no exception."""
    extreme = torch.tensor([-(2**63), 2**63 - 1, 0, 1, -1, 2**62, -(2**62)])
    shares = list(torch.cartesian_prod(*[extreme] * parties).t())
    found = correlated_randomness.count_wraps(shares)
    columns = torch.stack(shares).t().tolist()
    assert found.tolist() == [(sum(column) - wrapped(sum(column))) // 2**64 for column in columns]
    assert len(found.unique()) >= parties


def test_corrections_are_uniform_to_the_party_that_gets_them() -> None:
    """For every kind the mean of each byte of 20,000 words lies within 5 standard errors of 127.5 (1 in 10^5 in all)."""
    for request in (
        additive("mul", (20000,), (20000,)),
        Request("square", ((20000,),)),
        Request("binary", ((20000,), (20000,))),
        Request("wraps", ((20000,),)),
        Request("B2A", ((20000,),)),
    ):
        correction = deal(request, 2)[1][-1]
        for shift in range(0, 64, 8):
            mean = float((correction >> shift & 0xFF).double().mean())
            assert abs(mean - 127.5) < 5 * 73.9 / math.sqrt(20000), (str(request), shift)


# -- hostile requests

HOSTILE: list[Any] = [
    None,
    "additive",
    {},
    {"kind": "square"},
    {"kind": "square", "shapes": []},
    {"kind": "square", "shapes": [[2], [2]]},
    {"kind": "square", "shapes": [2]},
    {"kind": "square", "shapes": [[-1]]},
    {"kind": "square", "shapes": [[2.0]]},
    {"kind": "square", "shapes": [[True]]},
    {"kind": "square", "shapes": [["2"]]},
    {"kind": "square", "shapes": [[1] * 9]},
    {"kind": "square", "shapes": [[1 << 29]]},
    {"kind": "square", "shapes": [[1 << 15, 1 << 15]]},
    {"kind": "square", "shapes": [[1 << 40, 0]]},
    {"kind": "square", "shapes": [[2]], "operation": "mul"},
    {"kind": "square", "shapes": [[2]], "values": [1]},
    {"kind": "cube", "shapes": [[2]]},
    {"kind": ["square"], "shapes": [[2]]},
    {"kind": "binary", "shapes": [[2], [3]]},
    {"kind": "binary", "shapes": [[1 << 20, 1], [1, 1 << 20]]},
    {"kind": "additive", "shapes": [[2], [2]]},
    {"kind": "additive", "shapes": [[2], [2]], "operation": "load"},
    {"kind": "additive", "shapes": [[2], [2]], "operation": "__class__"},
    {"kind": "additive", "shapes": [[2], [3]], "operation": "mul"},
    {"kind": "additive", "shapes": [[2], [2]], "operation": "mul", "options": {"out": 1}},
    {"kind": "additive", "shapes": [[2, 3], [2, 3]], "operation": "matmul"},
    {"kind": "additive", "shapes": [[1 << 14, 1 << 14], [1 << 14, 1 << 14]], "operation": "matmul"},
] + [
    {"kind": "additive", "shapes": [[1, 2, 8, 8], [2, 2, 3, 3]], "operation": "conv2d", "options": options}
    for options in (
        [],
        {"stride": 0},
        {"stride": -1},
        {"stride": 1.0},
        {"stride": True},
        {"stride": []},
        {"stride": [1, 1, 1]},
        {"stride": [[1], [1]]},
        {"stride": {"a": 1}},
        {"padding": "same"},
        {"padding": 60000},
        {"padding": 1 << 17},
        {"groups": 3},
        {"groups": [1]},
        {"output_padding": 1},
        {"bias": 1},
        {"dtype": 1},
        {"dilation": 8},
    )
]


@pytest.mark.parametrize("message", HOSTILE, ids=repr)
def test_hostile_request_is_refused(message: Any) -> None:
    with pytest.raises(ProtocolError, match="refused"):
        Request.from_message(message)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
near_messages = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from(["additive", "square", "binary", "wraps", "B2A"]) | json_values,
        "shapes": st.lists(st.lists(st.integers(-1, 9) | json_values, max_size=4), max_size=3) | json_values,
        "operation": st.sampled_from(["mul", "matmul", "conv1d", "conv2d", "conv_transpose2d"]) | json_values,
        "options": st.dictionaries(st.sampled_from(["stride", "padding", "groups", "x"]), json_values) | json_values,
    },
)


@given(message=near_messages | json_values)
def test_any_message_is_a_request_or_refused(message: Any) -> None:
    try:
        request = Request.from_message(message)
    except ProtocolError:
        return
    assert Request.from_message(request.to_message()) == request
    assert all(size >= 0 for size in request.corrected_shape)


@given(request=requests)
def test_requests_survive_the_link(request: Request) -> None:
    assert Request.from_message(request.to_message()) == request


@given(sizes=st.lists(st.integers(0, BLOCK_BYTES // 4), min_size=1, max_size=20))
def test_blocks_cover_a_program_in_order(sizes: list[int]) -> None:
    program = TupleProgram.of("p", [Request("square", ((size,),)) for size in sizes])
    assert [position for block in program.blocks for position in range(block.start, block.stop)] == list(
        range(len(sizes))
    )
    for block in program.blocks:
        assert block.size == 8 * sum(sizes[block.start : block.stop])
        assert block.size <= BLOCK_BYTES or block.stop == block.start + 1
