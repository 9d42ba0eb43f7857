"""CrypTen on this project's links, dealer and stream cipher. The only module that imports CrypTen.

CrypTen is used unmodified; `CrypTenRuntime` replaces, while it is active, the four things DESIGN.md section 2 finds
unsafe: the communicator (gloo, pickle), the provider (a computing party as dealer), every random draw
(`torch.Generator`), and the neighbour ring of zero-shares, which becomes a complete graph of pairwise seeds so that any
n-2 parties learn nothing about the other two but their sum.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mpc_fl import compatibility
from mpc_fl.errors import ProtocolError, SecrecyError
from mpc_fl.stream_cipher import Seed
from mpc_fl.transport import Links

compatibility.prepare()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import crypten
    import crypten.common.rng
    import crypten.communicator
    import crypten.mpc
    import crypten.mpc.primitives.arithmetic as arithmetic
    import crypten.mpc.primitives.binary as binary
    import crypten.nn
    from crypten.communicator.communicator import Communicator
    from crypten.mpc.mpc import MPCTensor
    from crypten.mpc.primitives import ArithmeticSharedTensor, BinarySharedTensor
    from torch.distributed import ReduceOp

log = logging.getLogger(__name__)

__all__ = ["ArithmeticSharedTensor", "CrypTenRuntime", "MPCTensor", "crypten"]

_TAG = "crypten"
Size = Sequence[int]


def output_shape(operation: str, size0: Size, size1: Size, *args: Any, **kwargs: Any) -> tuple[int, ...]:
    """Shape of a bilinear operation on operands of these sizes, without running it."""
    left, right = torch.empty(tuple(size0), device="meta"), torch.empty(tuple(size1), device="meta")
    function: Any = getattr(torch, operation)
    return tuple(function(left, right, *args, **kwargs).shape)


class _Request:
    """A finished or pending operation, as `torch.distributed` returns it."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action

    def wait(self) -> None:
        self._action()


class LinksCommunicator(Communicator):
    """CrypTen's `Communicator` over `Links`: a complete graph of authenticated, encrypted streams between ranks."""

    BYTES_PER_ELEMENT = 8

    def __init__(self, links: Links, world: list[str]) -> None:
        self._links = links
        self._world = world
        self._rank = world.index(links.name)
        self._others = [name for name in world if name != links.name]
        self._name = links.name
        self.reset_communication_stats()

    # -- identity
    def get_world_size(self) -> int:
        return len(self._world)

    def get_rank(self) -> int:
        return self._rank

    def get_ttp_rank(self) -> int:
        return len(self._world)

    def get_name(self) -> str:
        return self._name

    def set_name(self, name: str) -> None:
        self._name = name

    def get_distributed_backend(self) -> str:
        return "mpc-fl links"

    # -- point to point
    def send(self, tensor: torch.Tensor, dst: int) -> None:
        self._links.send_tensor(self._world[dst], _TAG, tensor)

    def recv(self, tensor: torch.Tensor, src: int | None = None) -> torch.Tensor:
        if src is None:
            raise ProtocolError("a receive must name its sender", "pass src")
        return self._links.receive_tensor(self._world[src], _TAG, tensor.dtype, tensor.shape)

    def isend(self, tensor: torch.Tensor, dst: int) -> _Request:
        self.send(tensor, dst)
        return _Request(lambda: None)

    def irecv(self, tensor: torch.Tensor, src: int | None = None) -> _Request:
        return _Request(lambda: tensor.copy_(self.recv(tensor, src)))

    # -- collectives
    def scatter(
        self, scatter_list: list[torch.Tensor], src: int, size: Size | None = None, device: Any = None
    ) -> torch.Tensor:
        if src == self._rank:
            for rank, name in enumerate(self._world):
                if rank != src:
                    self._links.send_tensor(name, _TAG, scatter_list[rank])
            return scatter_list[src]
        shape = size if size is not None else scatter_list[self._rank].shape
        return self._links.receive_tensor(self._world[src], _TAG, torch.int64, shape)

    def gather(self, tensor: torch.Tensor, dst: int) -> list[torch.Tensor] | list[None]:
        if dst != self._rank:
            self._links.send_tensor(self._world[dst], _TAG, tensor)
            return [None]
        return [
            tensor if name == self._links.name else self._links.receive_tensor(name, _TAG, tensor.dtype, tensor.shape)
            for name in self._world
        ]

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        for name in self._others:
            self._links.send_tensor(name, _TAG, tensor)
        return [
            tensor if name == self._links.name else self._links.receive_tensor(name, _TAG, tensor.dtype, tensor.shape)
            for name in self._world
        ]

    def all_reduce(self, input: Any, op: Any = ReduceOp.SUM, batched: bool = False) -> Any:
        if batched:
            return self._batched(input, lambda flat: self.all_reduce(flat, op))
        return _combine(self.all_gather(input.contiguous()), op)

    def reduce(self, input: Any, dst: int, op: Any = ReduceOp.SUM, batched: bool = False) -> Any:
        if batched:
            return self._batched(input, lambda flat: self.reduce(flat, dst, op))
        gathered = self.gather(input.contiguous(), dst)
        return None if dst != self._rank else _combine([part for part in gathered if part is not None], op)

    def broadcast(self, input: Any, src: int, group: Any = None, batched: bool = False) -> Any:
        if batched:
            return [self.broadcast(part, src) for part in input]
        if src == self._rank:
            for name in self._others:
                self._links.send_tensor(name, _TAG, input)
        else:
            input.copy_(self._links.receive_tensor(self._world[src], _TAG, input.dtype, input.shape))
        return input

    def _batched(self, tensors: list[torch.Tensor], reduce: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
        """One message for several tensors: fewer frames, the same bytes."""
        flat = reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        if flat is None:
            return None
        pieces = flat.split([tensor.numel() for tensor in tensors])
        return [piece.reshape(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]

    def barrier(self) -> None:
        self.all_gather(torch.zeros(1, dtype=torch.int64))

    # -- objects: JSON only, never pickle
    def send_obj(self, obj: Any, dst: int, group: Any = None) -> None:
        self._links.send_object(self._world[dst], _TAG, _to_json(obj))

    def recv_obj(self, src: int, group: Any = None) -> Any:
        return _from_json(self._links.receive_object(self._world[src], _TAG))

    def broadcast_obj(self, obj: Any, src: int, group: Any = None) -> Any:
        if src != self._rank:
            return self.recv_obj(src)
        for rank in range(len(self._world)):
            if rank != src:
                self.send_obj(obj, rank)
        return obj

    # -- statistics: the links count
    def reset_communication_stats(self) -> None:
        self.comm_rounds = self.comm_bytes = self.comm_time = 0

    def print_communication_stats(self) -> None:
        log.info("traffic: %s", self.get_communication_stats())

    def get_communication_stats(self) -> dict[str, float]:
        traffic = [count for phase in self._links.traffic.values() for count in phase.values()]
        return {
            "rounds": sum(count.waits for count in traffic),
            "bytes": sum(count.bytes_sent for count in traffic),
            "time": sum(count.seconds_waited for count in traffic),
        }


def _combine(parts: list[torch.Tensor], operation: Any) -> torch.Tensor:
    combine: Any = {
        ReduceOp.SUM: torch.add,
        ReduceOp.BXOR: torch.bitwise_xor,
        ReduceOp.BAND: torch.bitwise_and,
        ReduceOp.BOR: torch.bitwise_or,
        ReduceOp.PRODUCT: torch.mul,
        ReduceOp.MAX: torch.maximum,
        ReduceOp.MIN: torch.minimum,
    }.get(operation)
    if combine is None:
        raise ProtocolError(f"the reduction {operation} is not supported", "use SUM or BXOR")
    result = combine(parts[0], parts[1]) if len(parts) > 1 else parts[0].clone()
    for part in parts[2:]:
        result = combine(result, part)
    return result


def _to_json(obj: Any) -> dict[str, Any]:
    if isinstance(obj, torch.Size):
        return {"size": list(obj)}
    if obj is None or isinstance(obj, (bool, int, float, str)):
        return {"value": obj}
    if isinstance(obj, (list, tuple)) and all(isinstance(item, (bool, int, float, str)) for item in obj):
        return {"list" if isinstance(obj, list) else "tuple": list(obj)}
    raise ProtocolError(
        f"objects of type {type(obj).__name__} are not sent between parties", "send tensors or plain values"
    )


def _from_json(message: dict[str, Any]) -> Any:
    if "size" in message:
        return torch.Size(message["size"])
    if "tuple" in message:
        return tuple(message["tuple"])
    return message.get("list", message.get("value"))


class DealerProvider:
    """CrypTen's provider interface, served by a dealer outside of the computing parties.

    Party p expands its shares from a seed it shares with the dealer only; the last party's share of the product part is
    the correction the dealer sends. Every party announces each request so that the dealer can refuse parties that do
    not run the same program. The dealer sees operations and shapes, nothing else.
    """

    NAME = "dealer"

    def __init__(self, links: Links, world: list[str], dealer: str) -> None:
        self._links, self._dealer = links, dealer
        self._seed = links.pairwise_seed(dealer, "correlated randomness")
        self._takes_correction = links.name == world[-1]
        self._index = 0

    def _request(self, kind: str, shapes: dict[str, tuple[int, ...]], **details: Any) -> dict[str, torch.Tensor]:
        """This party's shares, by name; the last name of `shapes` is the part the dealer corrects."""
        index, self._index = self._index, self._index + 1
        message = {"index": index, "kind": kind, "shapes": {name: list(shape) for name, shape in shapes.items()}}
        self._links.send_object(self._dealer, "request", {**message, **details})
        names = list(shapes)
        shares: dict[str, torch.Tensor] = {}
        for name in names[:-1]:
            bits = 1 if name == "bit" else 64
            shares[name] = self._seed.stream(index, name).ring_elements(shapes[name], bits)
        last = names[-1]
        if self._takes_correction:
            shares[last] = self._links.receive_tensor(self._dealer, "correction", torch.int64, shapes[last])
        else:
            shares[last] = self._seed.stream(index, last).ring_elements(shapes[last])
        return shares

    def generate_additive_triple(
        self, size0: Size, size1: Size, op: str, device: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        product = output_shape(op, size0, size1, *args, **kwargs)
        shapes = {"a": tuple(size0), "b": tuple(size1), "c": product}
        options = {name: list(value) if isinstance(value, tuple) else value for name, value in kwargs.items()}
        shares = self._request("additive", shapes, operation=op, arguments=list(args), options=options)
        a, b, c = (ArithmeticSharedTensor.from_shares(shares[name], precision=0) for name in "abc")
        return a, b, c

    def square(self, size: Size, device: Any = None) -> tuple[Any, Any]:
        shares = self._request("square", {"r": tuple(size), "r2": tuple(size)})
        r, r2 = (ArithmeticSharedTensor.from_shares(shares[name], precision=0) for name in ("r", "r2"))
        return r, r2

    def generate_binary_triple(self, size0: Size, size1: Size, device: Any = None) -> tuple[Any, Any, Any]:
        product = tuple(torch.broadcast_shapes(tuple(size0), tuple(size1)))
        shares = self._request("binary", {"a": tuple(size0), "b": tuple(size1), "c": product})
        a, b, c = (BinarySharedTensor.from_shares(shares[name]) for name in "abc")
        return a, b, c

    def wrap_rng(self, size: Size, device: Any = None) -> tuple[Any, Any]:
        shares = self._request("wraps", {"r": tuple(size), "theta": tuple(size)})
        r, theta = (ArithmeticSharedTensor.from_shares(shares[name], precision=0) for name in ("r", "theta"))
        return r, theta

    def B2A_rng(self, size: Size, device: Any = None) -> tuple[Any, Any]:  # noqa: N802 - CrypTen's name
        shares = self._request("bit", {"bit": tuple(size), "arithmetic": tuple(size)})
        return (
            ArithmeticSharedTensor.from_shares(shares["arithmetic"], precision=0),
            BinarySharedTensor.from_shares(shares["bit"]),
        )

    def finish(self) -> None:
        """Tell the dealer that no request follows."""
        self._links.send_object(self._dealer, "request", {"index": self._index, "kind": "finish", "shapes": {}})


class _NoProvider:
    """Stands where a computation has no dealer, so that CrypTen cannot fall back to its trusted first party."""

    NAME = "none"

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise SecrecyError("this computation has no dealer, so it cannot multiply shares")

    generate_additive_triple = square = generate_binary_triple = wrap_rng = B2A_rng = _refuse


Opener = Callable[[Any, "int | None", bool], Any]


class CrypTenRuntime:
    """One party's CrypTen, alive inside a `with` block.

    `world` lists the computing parties in rank order and includes this one. Without a dealer only linear operations
    work. While active, CrypTen's own `get_plain_text` and `reveal` go through `opener` (set by `opening`), so that
    there is no unrecorded way out.
    """

    def __init__(self, links: Links, world: list[str], dealer: str | None, fraction_bits: int) -> None:
        self.links = links
        self.world = world
        self.rank = world.index(links.name)
        self.dealer = dealer
        self._fraction_bits = fraction_bits
        self._pairwise = {name: links.pairwise_seed(name, "zero-shares") for name in world if name != links.name}
        self._local = Seed.from_system()
        self._zero_shares = 0
        self._draws = 0
        self._restore: list[tuple[Any, str, Any]] = []
        self.opener: Opener | None = None

    def __enter__(self) -> CrypTenRuntime:
        communicator = LinksCommunicator(self.links, self.world)
        provider: Any = _NoProvider()
        if self.dealer is not None:
            provider = DealerProvider(self.links, self.world, self.dealer)
        self.provider = provider
        replace = self._replace
        replace(crypten.communicator, "get", lambda: communicator)
        replace(crypten.communicator, "is_initialized", lambda: True)
        replace(crypten.communicator, "uninit", lambda: None)
        replace(crypten.mpc, "get_default_provider", lambda: provider)
        for module in (crypten.common.rng, arithmetic):
            replace(module, "generate_random_ring_element", self._random_ring_element)
        for module in (crypten.common.rng, binary):
            replace(module, "generate_kbit_random_tensor", self._random_bits)
        replace(ArithmeticSharedTensor, "PRZS", staticmethod(self._arithmetic_zero))
        replace(BinarySharedTensor, "PRZS", staticmethod(self._binary_zero))
        replace(MPCTensor, "get_plain_text", lambda tensor, dst=None: self._open(tensor, dst, True))
        replace(MPCTensor, "reveal", lambda tensor, dst=None: self._open(tensor, dst, False))
        for shared in (ArithmeticSharedTensor, BinarySharedTensor, MPCTensor):
            replace(shared, "__repr__", lambda tensor: f"{type(tensor).__name__}(secret)")
        precision = crypten.cfg.encoder.precision_bits
        self._restore.append((crypten.cfg.encoder, "precision_bits", precision))
        crypten.cfg.encoder.precision_bits = self._fraction_bits
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if error is None and isinstance(self.provider, DealerProvider):
            self.provider.finish()
        for owner, name, value in reversed(self._restore):
            setattr(owner, name, value)
        self._restore.clear()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        original = owner.__dict__[name] if name in owner.__dict__ else getattr(owner, name)
        self._restore.append((owner, name, original))
        setattr(owner, name, value)

    def _open(self, tensor: Any, dst: int | None, decode: bool) -> Any:
        if self.opener is None:
            raise SecrecyError("CrypTen tried to open a tensor outside of open_to")
        return self.opener(tensor, dst, decode)

    # -- randomness
    def _random_ring_element(self, size: Size, ring_size: int = 2**64, generator: Any = None, **_: Any) -> torch.Tensor:
        self._draws += 1
        bits = ring_size.bit_length() - 1
        elements = self._local.stream("local", self._draws).ring_elements(tuple(size), bits)
        return elements if bits == 64 else elements - ring_size // 2

    def _random_bits(self, size: Size, bitlength: int | None = None, generator: Any = None, **_: Any) -> torch.Tensor:
        self._draws += 1
        return self._local.stream("local", self._draws).ring_elements(tuple(size), bitlength or 64)

    def zero_share(self, shape: Size, *, exclusive_or: bool = False) -> torch.Tensor:
        """This party's share of zero (sum or exclusive or over all ranks), int64.

        For each pair the lower rank adds and the higher subtracts a mask both expand from their pairwise seed. All
        parties must call this in the same order: the counter is the label.
        """
        self._zero_shares += 1
        share = torch.zeros(tuple(shape), dtype=torch.int64)
        for name, seed in self._pairwise.items():
            mask = seed.stream("zero-share", self._zero_shares).ring_elements(tuple(shape))
            if exclusive_or:
                share ^= mask
            elif self.rank < self.world.index(name):
                share += mask
            else:
                share -= mask
        return share

    def _arithmetic_zero(self, *size: Any, device: Any = None) -> Any:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return ArithmeticSharedTensor.from_shares(self.zero_share(shape))

    def _binary_zero(self, *size: Any, device: Any = None) -> Any:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return BinarySharedTensor.from_shares(self.zero_share(shape, exclusive_or=True))


def mpc_tensor_from_share(share: torch.Tensor, fraction_bits: int) -> Any:
    """A CrypTen arithmetic tensor whose share at this party is the int64 tensor `share`."""
    return MPCTensor.from_shares(share, precision=fraction_bits)


def share_of(tensor: Any) -> tuple[torch.Tensor, int, bool]:
    """This party's int64 share of an `MPCTensor`, its fraction bits, and whether shares combine by exclusive or."""
    inner = tensor._tensor
    scale = inner.encoder.scale
    return inner.share, 0 if scale == 1 else int(math.log2(scale)), isinstance(inner, BinarySharedTensor)
