"""What tests of the dealer share: roles to play on links, and tuples opened by the test in its own process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpc_fl.sharing.correlated_randomness import Request, ordered_options

WORLD = ["party-0", "party-1"]
# Frames this process has received, where its links have `note_frame` as observer.
FRAMES: list[tuple[str, str, str, Any]] = []


def additive(operation: str, a: Sequence[int], b: Sequence[int], **options: Any) -> Request:
    return Request("additive", (tuple(a), tuple(b)), operation, ordered_options(options))


def wrapped(number: int) -> int:
    """The representative of `number` in -2^63 .. 2^63 - 1."""
    return (number + 2**63) % 2**64 - 2**63


def bilinear(operation: str, a: torch.Tensor, b: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """a * b in Z_2^64 in exact floating point: sixteen-bit digits, so that float64 holds every sum of products."""
    function = getattr(torch, operation)
    result = torch.zeros((), dtype=torch.int64)
    for i in range(4):
        for j in range(4 - i):
            left, right = (a >> 16 * i & 0xFFFF).double(), (b >> 16 * j & 0xFFFF).double()
            result = result + (function(left, right, **options).long() << 16 * (i + j))
    return result


def check_tuple(request: Request, shares: list[list[torch.Tensor]]) -> None:
    """`shares[p]` are party p's parts: opened together, they satisfy the equation of their kind."""
    parts = [torch.stack(of_all) for of_all in zip(*shares, strict=True)]
    for part, shape in zip(parts, [*request.shapes, request.corrected_shape], strict=True):
        assert part.dtype == torch.int64 and tuple(part.shape[1:]) == shape
    sums = [part.sum(0) for part in parts]
    by_bits = []
    for part in parts:
        total = part[0].clone()
        for share in part[1:]:
            total ^= share
        by_bits.append(total)
    if request.kind == "additive":
        expected = bilinear(request.operation, sums[0], sums[1], dict(request.options))
        assert torch.equal(sums[2], expected)
    elif request.kind == "square":
        assert torch.equal(sums[1], bilinear("mul", sums[0], sums[0], {}))
    elif request.kind == "binary":
        assert torch.equal(by_bits[2], by_bits[0] & by_bits[1])
    elif request.kind == "wraps":
        columns = parts[0].reshape(len(shares), -1).t().tolist()
        counts = [(sum(column) - wrapped(sum(column))) // 2**64 for column in columns]
        assert sums[1].reshape(-1).tolist() == counts
    else:
        assert set(by_bits[0].unique().tolist()) <= {0, 1} and torch.equal(by_bits[0], sums[1])


def note_frame(peer: str, frame: Any) -> None:
    """Observer of a party's links; FRAMES is this process's own."""
    payload = frame.payload if frame.kind.name != "TENSOR" else tuple(frame.payload.shape)
    FRAMES.append((peer, frame.kind.name, frame.tag, payload))


def client_of(links: Any, **options: Any) -> Any:
    from mpc_fl.sharing.dealer_client import DealerClient

    return DealerClient(links, [name for name in sorted([*links.peers, links.name]) if name != "dealer"],
                        "dealer", **options)  # fmt: skip


def deal_all(links: Any, **options: Any) -> Any:
    from mpc_fl.sharing.dealer import Dealer

    dealer = Dealer(links, sorted(links.peers), **options)
    dealer.serve()
    return dealer


def shares_of(client: Any, requests_in_order: list[Request]) -> list[list[Any]]:
    """Shares as arrays: tensors would cross to the test's process in shared memory that ends with their own."""
    return [[share.numpy() for share in client.shares(request)] for request in requests_in_order]


def run_of(results: dict[str, Any], *path: Any) -> list[Any]:
    """The values of all computing parties in rank order."""
    values = [results[name] for name in sorted(results) if name != "dealer"]
    for step in path:
        values = [value[step] for value in values]
    return values


def opened(results: dict[str, Any], *path: Any) -> list[list[torch.Tensor]]:
    """The shares of one tuple at all computing parties."""
    return [[torch.from_numpy(share) for share in shares] for shares in run_of(results, *path)]
