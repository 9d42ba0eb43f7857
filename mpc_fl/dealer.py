"""The dealer: correlated randomness for parties that compute on shares, from outside of them.

Security. The dealer is semi-honest and colludes with no computing party. It sees operations and shapes. Party p's
shares are the key stream of a seed that only p and the dealer know; the last party's product share is the correction
c - (sum of the others' shares), which is uniform given everything that party holds. Any n-1 computing parties without
the dealer therefore see uniform triples (Beaver 1991; CrypTen's trusted third party, Knott et al. 2021, section 4).

Bytes. One request message per party and tuple, one correction of 8 bytes per element to the last party. No rounds
between computing parties.
"""

from __future__ import annotations

from typing import Any

import torch

from mpc_fl.errors import ProtocolError
from mpc_fl.transport import Links

_OPERATIONS = {"mul", "matmul", "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"}
_MAX_ELEMENTS = 1 << 30


def count_wraps(shares: list[torch.Tensor]) -> torch.Tensor:
    """How often the signed sum of int64 shares wraps around 2^64: true sum = wrapped sum + 2^64 * count."""
    result = torch.zeros_like(shares[0])
    previous = shares[0]
    for share in shares[1:]:
        total = previous + share
        result -= ((previous < 0) & (share < 0) & (total >= 0)).long()
        result += ((previous > 0) & (share > 0) & (total < 0)).long()
        previous = total
    return result


def _product(request: dict[str, Any], sums: dict[str, torch.Tensor], shares: dict[str, list[torch.Tensor]]) -> Any:
    kind = request["kind"]
    if kind == "additive":
        operation = request.get("operation")
        if operation not in _OPERATIONS:
            raise ProtocolError("an unknown operation was asked of the dealer", "run the same version everywhere")
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in request.get("options", {}).items()}
        return getattr(torch, operation)(sums["a"], sums["b"], *request.get("arguments", []), **options)
    if kind == "square":
        return sums["r"] * sums["r"]
    if kind == "wraps":
        return count_wraps(shares["r"])
    raise ProtocolError("an unknown kind of tuple was asked of the dealer", "run the same version everywhere")


def _check(request: dict[str, Any]) -> None:
    shapes = request.get("shapes")
    if not isinstance(shapes, dict) or not shapes:
        raise ProtocolError("a request to the dealer has no shapes", "run the same version everywhere")
    for shape in shapes.values():
        size = 1
        for dimension in shape if isinstance(shape, list) else [-1]:
            if not isinstance(dimension, int) or dimension < 0:
                raise ProtocolError("a request to the dealer has a bad shape", "run the same version everywhere")
            size *= dimension
        if size > _MAX_ELEMENTS:
            raise ProtocolError("a request to the dealer is too large", "use a smaller batch")


class Dealer:
    """Serves tuples to the computing parties `world` until all of them say that they are finished."""

    def __init__(self, links: Links, world: list[str]) -> None:
        self._links, self._world = links, world
        self._seeds = {name: links.pairwise_seed(name, "correlated randomness") for name in world}
        self.served = 0
        self.elements = 0

    def serve_one(self) -> bool:
        """Answer the next request; return False when the parties are finished.

        Raises `ProtocolError` when the parties ask for different tuples: they do not run the same program.
        """
        requests = [self._links.receive_object(name, "request") for name in self._world]
        first = requests[0]
        if any(request != first for request in requests[1:]) or first.get("index") != self.served:
            raise ProtocolError("the computing parties asked the dealer for different tuples", "use one configuration")
        if first.get("kind") == "finish":
            return False
        _check(first)
        index, self.served = self.served, self.served + 1
        self._links.send_tensor(self._world[-1], "correction", self._correction(index, first))
        return True

    def _correction(self, index: int, request: dict[str, Any]) -> torch.Tensor:
        names = list(request["shapes"])
        shares: dict[str, list[torch.Tensor]] = {}
        for name in names[:-1]:
            bits = 1 if name == "bit" else 64
            shape = request["shapes"][name]
            shares[name] = [self._seeds[party].stream(index, name).ring_elements(shape, bits) for party in self._world]
        last, shape = names[-1], request["shapes"][names[-1]]
        others = [self._seeds[party].stream(index, last).ring_elements(shape) for party in self._world[:-1]]
        exclusive_or = request["kind"] in ("binary", "bit")
        totals = {name: _total(parts, exclusive_or) for name, parts in shares.items()}
        if request["kind"] == "binary":
            product, masked = totals["a"] & totals["b"], _total(others, True)
            correction = product ^ masked
        elif request["kind"] == "bit":
            correction = totals["bit"] - _total(others, False)
        else:
            correction = _product(request, totals, shares) - _total(others, False)
        if list(correction.shape) != list(shape):
            raise ProtocolError("a request to the dealer has inconsistent shapes", "run the same version everywhere")
        self.elements += correction.numel()
        return correction


def _total(parts: list[torch.Tensor], exclusive_or: bool) -> torch.Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        if exclusive_or:
            total ^= part
        else:
            total += part
    return total
