"""The correlated randomness a computation will ask for, from shapes alone and before any data moves.

CrypTen's own code runs, on shares that have a shape and no elements (torch's meta device), with a communicator that sends
nothing and a provider that writes down what it is asked. So the sequence is the true one as long as the computation does
not branch on opened values; the run itself checks every tuple against it (`dealer_client`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mpc_fl.errors import SecrecyError
from mpc_fl.sharing.correlated_randomness import Request
from mpc_fl.sharing.crypten_communicator import ShapeCollectives
from mpc_fl.sharing.crypten_parts import Provider, crypten_with, mpc_tensor_from_share


def _without_elements(shape: Sequence[int]) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=torch.int64, device="meta")


def shape_share(shape: Sequence[int], fraction_bits: int) -> Any:
    """An `MPCTensor` of this shape whose share has no elements, to compute with inside `record_requests`."""
    return mpc_tensor_from_share(_without_elements(shape), fraction_bits)


class _Recorder:
    """Writes down requests; stands for the dealer and for every random draw."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def shares(self, request: Request) -> list[torch.Tensor]:
        self.requests.append(request)
        return [_without_elements(shape) for shape in (*request.shapes, request.corrected_shape)]

    def elements(self, shape: Sequence[int], bits: int) -> torch.Tensor:
        return _without_elements(shape)

    def zero_share(self, shape: Sequence[int], *, exclusive_or: bool = False) -> torch.Tensor:
        return _without_elements(shape)


# In place, element by element: the shape stays, so there is nothing to work out. torch's own rules for the meta device
# take most of the time of a dry run in these.
_IN_PLACE = frozenset({"__iand__", "__ixor__", "__ilshift__", "__irshift__", "add_", "sub_", "mul_", "div_"})


class _OnShapes(TorchFunctionMode):
    """Beside a share without elements, public tensors (masks, tables, windows) count by their shape too."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in _IN_PLACE and args[0].is_meta:
            return args[0]
        if any(isinstance(value, torch.Tensor) and value.is_meta for value in (*args, *kwargs.values())):
            args = [_on_meta(value) for value in args]
            kwargs = {name: _on_meta(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) and not value.is_meta else value


def _refuse_to_open(_tensor: Any, _dst: int | None, _decode: bool) -> Any:
    raise SecrecyError("a dry run has nothing to open")


def record_requests(computation: Callable[[], object], parties: int, fraction_bits: int) -> list[Request]:
    """The requests `computation` makes among `parties` computing parties, in order.

    It must build its inputs with `shape_share`; weights and images are not needed. Works inside an active
    `CrypTenRuntime`, whose parts it leaves alone, and without one. Raises what the computation raises.
    """
    recorder = _Recorder()
    provider = Provider(recorder, 0)
    with crypten_with(ShapeCollectives(parties), provider, recorder, _refuse_to_open, fraction_bits):
        with torch.no_grad(), _OnShapes():
            computation()
    return recorder.requests
