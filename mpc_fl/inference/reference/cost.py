"""Cost of an encrypted computation from shapes alone: run the same layers on tensors that count instead of compute.

A `ShapeTensor` offers the operations of CrypTen's MPCTensor that our layers use. What it counts follows CrypTen's
protocols (Knott et al., NeurIPS 2021) for n parties that open by sending a share of 8 bytes to each other:

- product of x and y, also convolutions: the masked x and y are opened at once, |x| + |y| elements, 1 round
- comparison x < 0: shares to bits by n - 1 binary additions in ceil(log2 n) steps, each an AND (2 elements opened) and
  6 levels of the parallel prefix circuit (4 each), 7 rounds; then one masked bit per element, 1 round
- truncation: local for two parties; for more, one element to rank 0, 1 round

Two-party runs of CrypTen with its own counter gave exactly these bytes and rounds.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_ELEMENT = 8
_PREFIX_LEVELS = 6  # log2 of 64 bits


@dataclass
class Tally:
    """Running totals of one pass for `parties` computing parties."""

    parties: int
    comparisons: int = 0
    multiplications: int = 0
    opened: int = 0
    opened_weights: int = 0
    rounds: int = 0
    truncations: int = 0
    truncation_messages: int = 0

    def open(self, elements: int) -> None:
        """Count masked elements that are opened to all parties at once."""
        self.opened += elements
        self.rounds += 1

    def truncate(self, elements: int) -> None:
        """Count elements that lose their second set of fractional bits."""
        self.truncations += elements
        if self.parties > 2:
            self.truncation_messages += elements
            self.rounds += 1

    def compare(self, elements: int) -> None:
        """Count comparisons with a public number."""
        self.comparisons += elements
        if self.parties < 2:
            return
        self.opened += (self.parties - 1) * (2 + 4 * _PREFIX_LEVELS) * elements
        self.rounds += math.ceil(math.log2(self.parties)) * (1 + _PREFIX_LEVELS)
        self.open(elements)

    def summary(self) -> dict[str, int]:
        """The totals under the names that `network.cost` states."""
        peers = self.parties - 1
        return {
            "comparisons": self.comparisons,
            "multiplications": self.multiplications,
            "bytes_per_party": _ELEMENT * (self.opened * peers + self.truncation_messages),
            "rounds": self.rounds,
            "truncations": self.truncations,
            "opened_weights": _ELEMENT * self.opened_weights * peers,
        }


class ShapeTensor:
    """Stands in for an MPCTensor of the same shape. `bit`: an integer, whose products need no truncation."""

    def __init__(self, meta: torch.Tensor, tally: Tally, bit: bool = False, weight: bool = False) -> None:
        self.meta, self.tally, self.bit, self.weight = meta, tally, bit, weight

    @property
    def encoder(self) -> None:
        """A stand-in has no encoder; giving it one says that it now has fractional bits."""

    @encoder.setter
    def encoder(self, _encoder: Any) -> None:
        self.bit = False

    def _like(self, meta: torch.Tensor, bit: bool = False) -> ShapeTensor:
        return ShapeTensor(meta, self.tally, bit)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Everything that only moves or sums elements: local, so only the shape changes."""
        if name not in _LOCAL:
            raise AttributeError(f"cost of '{name}' is not known")

        def local(*args: Any, **kwargs: Any) -> ShapeTensor:
            return ShapeTensor(getattr(self.meta, name)(*args, **kwargs), self.tally, self.bit, self.weight)

        return local

    def __getitem__(self, key: Any) -> ShapeTensor:
        return self._like(self.meta[key], self.bit)

    def size(self, *dim: int) -> Any:
        return self.meta.size(*dim)

    def dim(self) -> int:
        return self.meta.dim()

    @staticmethod
    def cat(tensors: Sequence[ShapeTensor], dim: int = 0) -> ShapeTensor:
        return tensors[0]._like(torch.cat([tensor.meta for tensor in tensors], dim), tensors[0].bit)

    # -- sums: local
    def add(self, other: Any) -> ShapeTensor:
        y = other.meta if isinstance(other, ShapeTensor) else other
        shape = self.meta + (y.to("meta") if isinstance(y, torch.Tensor) else y)
        return self._like(shape, self.bit and (not isinstance(other, ShapeTensor) or other.bit))

    def __neg__(self) -> ShapeTensor:
        return self._like(self.meta, self.bit)

    __add__ = __radd__ = __sub__ = __rsub__ = sub = add

    # -- products
    def mul(self, other: Any) -> ShapeTensor:
        if isinstance(other, ShapeTensor):
            return self._product(other, self.meta * other.meta, 1)
        if isinstance(other, torch.Tensor):
            whole = self.bit or not other.is_floating_point()
            result = self._like(self.meta * other.to("meta"), self.bit)
        else:
            whole = self.bit or isinstance(other, int)
            result = self._like(self.meta, self.bit)
        if not whole:
            self.tally.truncate(result.meta.numel())
        return result

    __mul__ = __rmul__ = mul

    def _product(self, other: ShapeTensor, shape: torch.Tensor, terms: int) -> ShapeTensor:
        self.tally.open(self.meta.numel() + other.meta.numel())
        self.tally.opened_weights += other.meta.numel() if other.weight else 0
        self.tally.multiplications += shape.numel() * terms
        if not (self.bit or other.bit):
            self.tally.truncate(shape.numel())
        return self._like(shape, self.bit and other.bit)

    def square(self) -> ShapeTensor:
        self.tally.open(self.meta.numel())
        self.tally.multiplications += self.meta.numel()
        self.tally.truncate(self.meta.numel())
        return self._like(self.meta)

    def matmul(self, other: ShapeTensor) -> ShapeTensor:
        return self._product(other, self.meta.matmul(other.meta), self.meta.size(-1))

    def conv2d(self, weight: ShapeTensor, **options: Any) -> ShapeTensor:
        terms = weight.meta[0].numel()
        return self._product(weight, torch.conv2d(self.meta, weight.meta, **options), terms)

    # -- truncated division by a public integer
    def div(self, divisor: Any) -> ShapeTensor:
        self.tally.truncate(self.meta.numel())
        return self._like(self.meta)

    def mean(self, dim: Any, keepdim: bool = False) -> ShapeTensor:
        return self._like(self.meta.mean(dim, keepdim)).div(0)

    def avg_pool2d(self, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool) -> ShapeTensor:
        pooled = torch.nn.functional.avg_pool2d(self.meta, kernel_size, stride, padding, ceil_mode)
        return self._like(pooled).div(0)

    # -- comparisons
    def ge(self, bound: Any) -> ShapeTensor:
        self.tally.compare(self.meta.numel())
        return self._like(self.meta, bit=True)

    def relu(self) -> ShapeTensor:
        return self * self.ge(0)

    def hardtanh(self, low: float, high: float) -> ShapeTensor:
        both = self._like(torch.stack([self.meta, self.meta])).relu()
        return both[0]


_LOCAL = frozenset({"flatten", "index_select", "permute", "reshape", "sum", "t", "unsqueeze"})


def module_with(module: Any, parameters: Mapping[str, Any]) -> Any:
    """A copy of a crypten.nn module that holds `parameters` instead of its own; the original keeps its own."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = OrderedDict(parameters)
    return twin


def on_shapes(module: Any, tally: Tally) -> Any:
    """A copy of a crypten.nn module with parameters that are shapes, so that it runs on `ShapeTensor`."""
    return module_with(
        module,
        {
            name: ShapeTensor(torch.empty(tuple(parameter.size()), device="meta"), tally, weight=True)
            for name, parameter in module.named_parameters()
        },
    )
