"""CrypTen's communicator on `Links`, and one that only counts parties for dry runs.

CrypTen asks `crypten.communicator.get()` for an object with these methods; nothing here needs CrypTen itself. Objects
travel as JSON, never as pickle, and only plain values.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed import ReduceOp

from mpc_fl.crypto.memory_layout import elements_overlap, own_copy
from mpc_fl.errors import ProtocolError
from mpc_fl.links.links import Links

log = logging.getLogger(__name__)

_TAG, _POINT_TO_POINT = "crypten", "crypten point to point"
Size = Sequence[int]


class _Request:
    """A finished or pending operation, as `torch.distributed` returns it."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action

    def wait(self) -> None:
        self._action()


class LinksCollectives:
    """The methods of CrypTen's `Communicator` over `Links`: a complete graph of encrypted streams between ranks.

    Tensors may be views of any layout, parameters, without elements or 0-d. What is given is sent in row order and stays
    as it is; what is returned is contiguous and no part of what was given. `broadcast` and `irecv` alone write into the
    tensor that they are given, as CrypTen means them to, and refuse one whose elements lie in one place.
    """

    BYTES_PER_ELEMENT = 8

    def __init__(self, links: Links, world: list[str]) -> None:
        self._links = links
        self._world = world
        self._rank = world.index(links.name)
        self._others = [name for name in world if name != links.name]
        self._name = links.name
        self._pending: dict[int, deque[tuple[_Request, torch.Tensor]]] = {rank: deque() for rank in range(len(world))}
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

    # -- point to point: between two ranks, in the order of the calls, whatever is waited for first
    def send(self, tensor: torch.Tensor, dst: int) -> None:
        self._links.send_tensor(self._world[dst], _POINT_TO_POINT, tensor)

    def recv(self, tensor: torch.Tensor, src: int | None = None) -> torch.Tensor:
        source = _named(src)
        self._complete(source)
        return self._links.receive_tensor(self._world[source], _POINT_TO_POINT, tensor.dtype, tensor.shape)

    def isend(self, tensor: torch.Tensor, dst: int) -> _Request:
        self.send(tensor, dst)
        return _Request(lambda: None)

    def irecv(self, tensor: torch.Tensor, src: int | None = None) -> _Request:
        source = _named(src)
        _require_places(tensor)
        request = _Request(lambda: self._complete(source, request))
        self._pending[source].append((request, tensor))
        return request

    def _complete(self, source: int, last: _Request | None = None) -> None:
        """Receive what `irecv` has asked `source` for and not received yet: up to the request `last`, or all."""
        pending = self._pending[source]
        while pending if last is None else any(request is last for request, _ in pending):
            _, tensor = pending.popleft()
            sender = self._world[source]
            _write(tensor, self._links.receive_tensor(sender, _POINT_TO_POINT, tensor.dtype, tensor.shape))

    # -- collectives
    def scatter(
        self, scatter_list: list[torch.Tensor], src: int, size: Size | None = None, device: Any = None
    ) -> torch.Tensor:
        if src == self._rank:
            for rank, name in enumerate(self._world):
                if rank != src:
                    self._links.send_tensor(name, _TAG, scatter_list[rank])
            return own_copy(scatter_list[src])
        shape = size if size is not None else scatter_list[self._rank].shape
        return self._links.receive_tensor(self._world[src], _TAG, torch.int64, shape)

    def gather(self, tensor: torch.Tensor, dst: int) -> list[torch.Tensor] | list[None]:
        if dst != self._rank:
            self._links.send_tensor(self._world[dst], _TAG, tensor)
            return [None]
        return self._beside_those_of_others(own_copy(tensor))

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._send_to_others(tensor)
        return self._beside_those_of_others(own_copy(tensor))

    def all_reduce(self, input: Any, op: Any = ReduceOp.SUM, batched: bool = False) -> Any:
        if batched:
            return self._batched(input, lambda flat: self.all_reduce(flat, op))
        self._send_to_others(input)
        return _combine(self._beside_those_of_others(input.detach().contiguous()), op)

    def reduce(self, input: Any, dst: int, op: Any = ReduceOp.SUM, batched: bool = False) -> Any:
        if batched:
            reduced = self._batched(input, lambda flat: self.reduce(flat, dst, op))
            return reduced if dst == self._rank else None
        if dst != self._rank:
            self._links.send_tensor(self._world[dst], _TAG, input)
            return None
        return _combine(self._beside_those_of_others(input.detach().contiguous()), op)

    def broadcast(self, input: Any, src: int, group: Any = None, batched: bool = False) -> Any:
        if batched:
            return [self.broadcast(part, src) for part in input]
        if src == self._rank:
            self._send_to_others(input)
        else:
            _require_places(input)
            _write(input, self._links.receive_tensor(self._world[src], _TAG, input.dtype, input.shape))
        return input

    def _send_to_others(self, tensor: torch.Tensor) -> None:
        for name in self._others:
            self._links.send_tensor(name, _TAG, tensor)

    def _beside_those_of_others(self, own: torch.Tensor) -> list[torch.Tensor]:
        """One tensor of each rank, in order: `own` as it is, and what the others send."""
        return [
            own if name == self._links.name else self._links.receive_tensor(name, _TAG, own.dtype, own.shape)
            for name in self._world
        ]

    def _batched(self, tensors: list[torch.Tensor], reduce: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
        """One message for several tensors of one dtype: fewer frames, the same bytes."""
        if len({tensor.dtype for tensor in tensors}) != 1:
            return [reduce(tensor) for tensor in tensors]
        flat = reduce(torch.cat([tensor.detach().reshape(-1) for tensor in tensors]))
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


def _named(src: int | None) -> int:
    if src is None:
        raise ProtocolError("a receive must name its sender", "pass src")
    return src


def _require_places(tensor: torch.Tensor) -> None:
    if elements_overlap(tensor):
        raise ProtocolError("a tensor whose elements lie in one place cannot take what is received", "clone it first")


def _write(tensor: torch.Tensor, received: torch.Tensor) -> None:
    """Overwrite the elements of a tensor, also of a parameter or a view of one, outside of autograd."""
    tensor.detach().copy_(received)


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


class ShapeCollectives:
    """Stands for a world of `parties` in a dry run: nothing is sent, every collective returns tensors of its shape.

    They are laid out as those of `LinksCollectives`, because what CrypTen may do with a view depends on its strides.
    """

    def __init__(self, parties: int) -> None:
        self._parties = parties

    def get_world_size(self) -> int:
        return self._parties

    def get_rank(self) -> int:
        return 0

    def gather(self, tensor: torch.Tensor, dst: int) -> list[torch.Tensor]:
        return [own_copy(tensor) for _ in range(self._parties)]

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [own_copy(tensor) for _ in range(self._parties)]

    def all_reduce(self, input: Any, op: Any = ReduceOp.SUM, batched: bool = False) -> Any:
        return [own_copy(part) for part in input] if batched else own_copy(input)

    def reduce(self, input: Any, dst: int, op: Any = ReduceOp.SUM, batched: bool = False) -> Any:
        return self.all_reduce(input, op, batched)

    def broadcast(self, input: Any, src: int, group: Any = None, batched: bool = False) -> Any:
        return input
