"""What computing parties ask of a dealer: kinds of tuples, their shapes, programs of requests. No I/O, no CrypTen.

A tuple is a few tensors of parts, all secret-shared among the parties. Every part but the last is *drawn*: each party
expands its share from the seed it has in common with the dealer. The last is *corrected*: it depends on the drawn ones,
so one party's share of it has to be sent.

| kind | drawn | corrected | used for |
| --- | --- | --- | --- |
| additive | a, b uniform in Z_2^64 | c = a * b for a product or convolution `*` | Beaver (CRYPTO 1991) |
| square | r | r * r | squares |
| binary | a, b, shared by exclusive or | c = a & b, also by exclusive or | AND |
| wraps | r | how often the shares of r wrap around 2^64 | truncation by more than two parties |
| B2A | a bit, shared by exclusive or | the same bit, shared by sum | bits to integers |

A *program* (`TupleProgram`) is a named sequence of requests that both sides know, so that its corrections need no request
and can be made ahead of need. Corrections travel in *blocks* (`CorrectionBlock`): consecutive ones, flattened and joined up
to `BLOCK_BYTES`.

Requests cross a link, so `Request.from_message` takes them as hostile: known kinds, operations and options of known
types, bounded sizes and work. `torch` is only called with what passed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, ProtocolError

Shape = tuple[int, ...]
Option = int | tuple[int, ...]

BYTES_PER_ELEMENT = 8
BLOCK_BYTES = 1 << 20
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 28  # of one part: 2 GiB, half of what a frame may carry
MAX_MULTIPLICATIONS = 1 << 40  # of one tuple: minutes of work
MAX_REQUESTS = 1 << 16  # of one program
_MAX_OPTION = 1 << 16

# Spatial dimensions of each bilinear operation (0: no convolution), and its options with their least values.
_DIMENSIONS = {"mul": 0, "matmul": 0, "conv1d": 1, "conv2d": 2, "conv_transpose1d": 1, "conv_transpose2d": 2}
_CONVOLUTION = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_OPTIONS: dict[str, dict[str, int]] = {
    operation: {} if not dimensions else _CONVOLUTION | ({"output_padding": 0} if "transpose" in operation else {})
    for operation, dimensions in _DIMENSIONS.items()
}
_OPERANDS = {"additive": 2, "square": 1, "binary": 2, "wraps": 1, "B2A": 1}
_DRAWN = {"additive": ("a", "b"), "square": ("r",), "binary": ("a", "b"), "wraps": ("r",), "B2A": ("bit",)}
_CORRECTED = {"additive": "c", "square": "r2", "binary": "c", "wraps": "theta", "B2A": "arithmetic"}


def _refuse(why: str) -> ProtocolError:
    return ProtocolError(f"a request for correlated randomness was refused: {why}", SAME_VERSION)


def multiply(operation: str, a: torch.Tensor, b: torch.Tensor, options: Mapping[str, Option]) -> torch.Tensor:
    """a * b in Z_2^64 for a named bilinear operation of torch. Raises `ProtocolError` if torch cannot compute it."""
    if operation not in _DIMENSIONS:
        raise _refuse("its operation is unknown")
    function: Any = getattr(torch, operation)
    try:
        return function(a, b, **options)
    except (RuntimeError, ValueError, IndexError, TypeError, ArithmeticError):
        raise _refuse(f"{operation} does not fit the shapes {tuple(a.shape)} and {tuple(b.shape)}") from None


@lru_cache(maxsize=1 << 12)
def output_shape(operation: str, size0: Shape, size1: Shape, options: tuple[tuple[str, Option], ...] = ()) -> Shape:
    """Shape of a bilinear operation on operands of these sizes, without running it. Raises `ProtocolError`."""
    left, right = torch.empty(size0, device="meta"), torch.empty(size1, device="meta")
    return tuple(multiply(operation, left, right, dict(options)).shape)


def _multiplications(operation: str, size0: Shape, size1: Shape, product: Shape) -> int:
    if operation == "mul":
        return math.prod(product)
    if operation == "matmul":
        return math.prod(product) * size0[-1]
    per_weight = math.prod(product) if "transpose" not in operation else math.prod(size0)
    return per_weight * math.prod(size1[1:])


@dataclass(frozen=True)
class Request:
    """One tuple: its kind, the shapes of its operands, and for `additive` the operation with its options in order.

    Raises `ProtocolError` when it names anything unknown, does not fit together or is beyond the limits.
    """

    kind: str
    shapes: tuple[Shape, ...]
    operation: str = ""
    options: tuple[tuple[str, Option], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in _OPERANDS or len(self.shapes) != _OPERANDS[self.kind]:
            raise _refuse("its kind is unknown")
        for shape in self.shapes:
            _check_shape(shape)
        if self.kind != "additive":
            if self.operation or self.options:
                raise _refuse("only products have an operation")
        else:
            self._check_operation()
        _check_shape(self.corrected_shape)

    def _check_operation(self) -> None:
        if self.operation not in _OPTIONS:
            raise _refuse("its operation is unknown")
        names = [name for name, _ in self.options]
        if names != sorted(set(names)):
            raise _refuse("its options are not in order")
        for name, value in self.options:
            least = _OPTIONS[self.operation].get(name)
            whole = value if isinstance(value, tuple) else (value,)
            lengths = (1,) if name == "groups" else (1, _DIMENSIONS[self.operation])
            if least is None or (name == "groups" and isinstance(value, tuple)) or len(whole) not in lengths:
                raise _refuse(f"{self.operation} has an option it does not know")
            if any(type(number) is not int or not least <= number <= _MAX_OPTION for number in whole):
                raise _refuse(f"{self.operation} has an option that is out of range")
        work = _multiplications(self.operation, self.shapes[0], self.shapes[1], self.corrected_shape)
        if work > MAX_MULTIPLICATIONS:
            raise _refuse("it is too much work; use a smaller batch")

    @property
    def corrected_shape(self) -> Shape:
        """Shape of the corrected part."""
        if self.kind == "additive":
            return output_shape(self.operation, self.shapes[0], self.shapes[1], self.options)
        if self.kind == "binary":
            try:
                return tuple(torch.broadcast_shapes(*self.shapes))
            except RuntimeError:
                raise _refuse("its shapes do not broadcast") from None
        return self.shapes[0]

    @property
    def elements(self) -> int:
        """Elements of the correction, 8 bytes each."""
        return math.prod(self.corrected_shape)

    def __str__(self) -> str:
        return f"{self.operation or self.kind} of {' and '.join(str(shape) for shape in self.shapes)}"

    def to_message(self) -> dict[str, Any]:
        """The request as JSON values: names and shapes, nothing else."""
        message: dict[str, Any] = {"kind": self.kind, "shapes": [list(shape) for shape in self.shapes]}
        if self.kind == "additive":
            options = {name: list(value) if isinstance(value, tuple) else value for name, value in self.options}
            message |= {"operation": self.operation, "options": options}
        return message

    @classmethod
    def from_message(cls, message: Any) -> Request:
        """Read what `to_message` wrote. Raises `ProtocolError` for anything else."""
        if not isinstance(message, dict) or not set(message) <= {"kind", "shapes", "operation", "options"}:
            raise _refuse("it is malformed")
        kind, shapes = message.get("kind"), message.get("shapes")
        operation, options = message.get("operation", ""), message.get("options", {})
        if not (isinstance(kind, str) and isinstance(operation, str) and isinstance(options, dict)):
            raise _refuse("it is malformed")
        if not isinstance(shapes, list) or not all(isinstance(shape, list) for shape in shapes):
            raise _refuse("it has no shapes")
        return cls(kind, tuple(tuple(shape) for shape in shapes), operation, ordered_options(options))

    def drawn_share(self, part: int, seed: Seed, position: int) -> torch.Tensor:
        """One party's share of drawn part number `part`: int64 of its shape (0 and 1 for a bit)."""
        stream = seed.stream(position, _DRAWN[self.kind][part])
        return stream.ring_elements(self.shapes[part], 1 if self.kind == "B2A" else 64)

    def corrected_share(self, seed: Seed, position: int) -> torch.Tensor:
        """The share of the corrected part at a party that gets no correction: int64 of its shape."""
        return seed.stream(position, _CORRECTED[self.kind]).ring_elements(self.corrected_shape)

    def correction(self, seeds: Sequence[Seed], position: int) -> torch.Tensor:
        """The corrected share of the last party, from the seeds of all parties in rank order. For the dealer.

        int64 of `corrected_shape`: the true value minus (or exclusive or) the other parties' shares, which makes it
        uniform to whoever lacks one of their seeds. Raises `ProtocolError` if torch cannot compute it.
        """
        if self.kind == "wraps":
            value = count_wraps([self.drawn_share(0, seed, position) for seed in seeds])
        else:
            drawn = [self._drawn_total(part, seeds, position) for part in range(len(self.shapes))]
            if self.kind == "additive":
                value = multiply(self.operation, drawn[0], drawn[1], dict(self.options))
            elif self.kind == "binary":
                value = drawn[0] & drawn[1]
            elif self.kind == "square":
                value = drawn[0] * drawn[0]
            else:
                value = drawn[0]
        value = value.contiguous()
        for seed in seeds[:-1]:
            stream = seed.stream(position, _CORRECTED[self.kind])
            if self.kind == "binary":
                stream.exclusive_or_into(value)
            else:
                stream.subtract_from(value)
        return value

    def _drawn_total(self, part: int, seeds: Sequence[Seed], position: int) -> torch.Tensor:
        total = self.drawn_share(part, seeds[0], position)
        for seed in seeds[1:]:
            if self.kind == "B2A":
                total ^= self.drawn_share(part, seed, position)
            elif self.kind == "binary":
                seed.stream(position, _DRAWN[self.kind][part]).exclusive_or_into(total)
            else:
                seed.stream(position, _DRAWN[self.kind][part]).add_to(total)
        return total


def _check_shape(shape: Any) -> None:
    if len(shape) > MAX_DIMENSIONS or any(type(size) is not int or size < 0 for size in shape):
        raise _refuse("it has a bad shape")
    # Also without the sizes that are zero, because torch multiplies strides.
    if math.prod(size for size in shape if size) > MAX_ELEMENTS:
        raise _refuse("it is too large; use a smaller batch")


def ordered_options(options: Mapping[str, Any]) -> tuple[tuple[str, Option], ...]:
    """Options of an operation in the one order that requests have; sequences become tuples, values are not checked."""
    pairs = [(name, tuple(value) if isinstance(value, (list, tuple)) else value) for name, value in options.items()]
    return tuple(sorted(pairs, key=lambda pair: pair[0]))


def count_wraps(shares: Sequence[torch.Tensor]) -> torch.Tensor:
    """How often the signed sum of int64 shares wraps around 2^64: true sum = wrapped sum + 2^64 * count."""
    result = torch.zeros_like(shares[0])
    previous = shares[0]
    for share in shares[1:]:
        total = previous + share
        result -= ((previous < 0) & (share < 0) & (total >= 0)).long()
        result += ((previous > 0) & (share > 0) & (total < 0)).long()
        previous = total
    return result


@dataclass(frozen=True)
class CorrectionBlock:
    """Requests `start` to `stop` (not included) of a program, whose corrections travel as one flat int64 tensor."""

    start: int
    stop: int
    elements: int

    @property
    def size(self) -> int:
        """Bytes of its corrections."""
        return BYTES_PER_ELEMENT * self.elements


@dataclass(frozen=True)
class TupleProgram:
    """A named, repeatable sequence of requests, cut into blocks alike at every party."""

    name: str
    requests: tuple[Request, ...]
    blocks: tuple[CorrectionBlock, ...]

    @classmethod
    def of(cls, name: str, requests: Sequence[Request]) -> TupleProgram:
        """Cut `requests` into blocks. Raises `ProtocolError` for none or more than `MAX_REQUESTS`."""
        if not 1 <= len(requests) <= MAX_REQUESTS:
            raise _refuse(f"a program has 1 to {MAX_REQUESTS} requests")
        blocks: list[CorrectionBlock] = []
        for position, request in enumerate(requests):
            last = blocks[-1] if blocks else CorrectionBlock(0, 0, 0)
            if blocks and BYTES_PER_ELEMENT * (last.elements + request.elements) <= BLOCK_BYTES:
                blocks[-1] = CorrectionBlock(last.start, position + 1, last.elements + request.elements)
            else:
                blocks.append(CorrectionBlock(position, position + 1, request.elements))
        return cls(name, tuple(requests), tuple(blocks))

    @property
    def digest(self) -> str:
        """SHA-256 over the requests in order, as hex."""
        return hashlib.sha256(repr(self.requests).encode()).hexdigest()


def block_tag(instance: int, block: int) -> str:
    """Tag of a block's frame. It names the run of the program and the block, so that no two can be taken for another."""
    return f"correction {instance} {block}"
