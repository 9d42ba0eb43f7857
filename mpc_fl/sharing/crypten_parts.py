"""What takes the place of CrypTen's own communicator, provider and randomness. The only module that imports CrypTen.

`crypten_with` exchanges them, `crypten_runtime` and `dry_run` say by what. `mpc_tensor_from_share` and `ring_share_of`
lead from this project's shares to CrypTen's tensors and back; both are local. Others take `crypten` itself from here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch

from mpc_fl import compatibility
from mpc_fl.crypto.memory_layout import own_copy
from mpc_fl.crypto.ring import RingShare
from mpc_fl.errors import ProtocolError, SecrecyError
from mpc_fl.sharing.correlated_randomness import Request, ordered_options
from mpc_fl.sharing.crypten_communicator import LinksCollectives, Size

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
    from crypten.nn.privacy.dp_split import DPSplitModel

# Opens an MPCTensor to all ranks or one, decoded or not.
Opener = Callable[[Any, "int | None", bool], Any]


class LinksCommunicator(LinksCollectives, Communicator):
    """CrypTen's `Communicator` over `Links`."""


class TupleSource(Protocol):
    """Where a provider takes this party's shares of a tuple from: the dealer, or a dry run's shapes."""

    def shares(self, request: Request) -> list[torch.Tensor]:
        """int64 shares of the parts of the tuple, in the order of `correlated_randomness`."""


class Provider:
    """CrypTen's provider interface (`TupleProvider`) on a `TupleSource`.

    CrypTen's own cache of tuples, kept in pickled files, is refused: programs of the dealer take its place.
    """

    NAME = "dealer"

    def __init__(self, source: TupleSource, rank: int) -> None:
        self.rank = rank
        self._source = source

    def generate_additive_triple(
        self, size0: Size, size1: Size, op: str, device: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        if args:
            raise ProtocolError(f"{op} was called with options by position", "name its options")
        request = Request("additive", (tuple(size0), tuple(size1)), op, ordered_options(kwargs))
        a, b, c = (_arithmetic(share, device) for share in self._source.shares(request))
        return a, b, c

    def square(self, size: Size, device: Any = None) -> tuple[Any, Any]:
        r, r2 = self._source.shares(Request("square", (tuple(size),)))
        return _arithmetic(r, device), _arithmetic(r2, device)

    def generate_binary_triple(self, size0: Size, size1: Size, device: Any = None) -> tuple[Any, Any, Any]:
        shares = self._source.shares(Request("binary", (tuple(size0), tuple(size1))))
        a, b, c = (BinarySharedTensor.from_shares(share, device=device) for share in shares)
        return a, b, c

    def wrap_rng(self, size: Size, device: Any = None) -> tuple[Any, Any]:
        r, theta = self._source.shares(Request("wraps", (tuple(size),)))
        return _arithmetic(r, device), _arithmetic(theta, device)

    def B2A_rng(self, size: Size, device: Any = None) -> tuple[Any, Any]:  # noqa: N802 - CrypTen's name
        bit, integer = self._source.shares(Request("B2A", (tuple(size),)))
        return _arithmetic(integer, device), BinarySharedTensor.from_shares(bit, device=device)

    def _refuse_cache(self, *_: Any, **__: Any) -> Any:
        raise SecrecyError("tuples are neither traced nor kept in files: use DealerClient.program")

    trace = trace_once = fill_cache = save_cache = load_cache = _refuse_cache


def _arithmetic(share: torch.Tensor, device: Any) -> Any:
    return ArithmeticSharedTensor.from_shares(share, precision=0, device=device)


class NoDealer:
    """Stands where a computation has no dealer, so that CrypTen cannot fall back to its trusted first party."""

    def shares(self, request: Request) -> list[torch.Tensor]:
        raise SecrecyError("this computation has no dealer, so it cannot multiply shares")


class Randomness(Protocol):
    """Where CrypTen's random draws come from."""

    def elements(self, shape: Size, bits: int) -> torch.Tensor:
        """Uniform int64 elements of Z_2^bits that only this party knows."""

    def zero_share(self, shape: Size, *, exclusive_or: bool = False) -> torch.Tensor:
        """This party's int64 share of zero, by sum or exclusive or."""


class _PublicGenerators(dict[Any, torch.Generator]):
    """CrypTen's generators for public randomness (dropout masks), in step at all ranks: rank 0 draws their seed."""

    def __init__(self, communicator: Any, randomness: Randomness) -> None:
        super().__init__()
        self._communicator, self._randomness = communicator, randomness

    def __missing__(self, device: Any) -> torch.Generator:
        seed = self._communicator.broadcast(self._randomness.elements((1,), 62), 0)
        self[device] = torch.Generator(device).manual_seed(int(seed))
        return self[device]


class _Draws:
    """CrypTen's drawing functions, with their signatures, on a `Randomness`; its generators are not asked."""

    def __init__(self, randomness: Randomness) -> None:
        self._randomness = randomness

    def ring_elements(
        self, size: Size, ring_size: int = 2**64, generator: Any = None, device: Any = None
    ) -> torch.Tensor:
        """`generate_random_ring_element`: uniform in [-ring_size / 2, ring_size / 2)."""
        bits = ring_size.bit_length() - 1
        elements = self._randomness.elements(tuple(size), bits).to(device)
        return elements if bits == 64 else elements - ring_size // 2

    def bits(self, size: Size, bitlength: int | None = None, generator: Any = None, device: Any = None) -> torch.Tensor:
        """`generate_kbit_random_tensor`."""
        return self._randomness.elements(tuple(size), bitlength or 64).to(device)

    def arithmetic_zero(self, *size: Any, device: Any = None) -> Any:
        """`ArithmeticSharedTensor.PRZS`."""
        return ArithmeticSharedTensor.from_shares(self._randomness.zero_share(_size(size)), device=device)

    def binary_zero(self, *size: Any, device: Any = None) -> Any:
        """`BinarySharedTensor.PRZS`."""
        share = self._randomness.zero_share(_size(size), exclusive_or=True)
        return BinarySharedTensor.from_shares(share, device=device)


def _size(size: tuple[Any, ...]) -> Size:
    """A size that was given as one sequence or as its numbers."""
    return size[0] if len(size) == 1 and not isinstance(size[0], int) else size


def _refuse_to_open(*_: Any, **__: Any) -> Any:
    raise SecrecyError("CrypTen tried to open a share outside of open_to")


def _refuse_torch_randomness(*_: Any, **__: Any) -> Any:
    raise SecrecyError("this part of CrypTen draws secrets from torch.Generator; it is not available here")


def _hidden(tensor: Any) -> str:
    return f"{type(tensor).__name__}(secret)"


def _draws_and_refusals(draws: _Draws) -> list[tuple[Any, str, Any]]:
    """(module or class, name, what takes its place) for everything in CrypTen that draws, opens or shows a secret."""
    return [
        *((module, "generate_random_ring_element", draws.ring_elements) for module in (crypten.common.rng, arithmetic)),
        *((module, "generate_kbit_random_tensor", draws.bits) for module in (crypten.common.rng, binary)),
        (ArithmeticSharedTensor, "PRZS", staticmethod(draws.arithmetic_zero)),
        (BinarySharedTensor, "PRZS", staticmethod(draws.binary_zero)),
        # Their `reveal` stays: Beaver's protocol opens masked values with it.
        (ArithmeticSharedTensor, "get_plain_text", _refuse_to_open),
        (BinarySharedTensor, "get_plain_text", _refuse_to_open),
        (crypten, "manual_seed", _refuse_torch_randomness),
        (DPSplitModel, "__init__", _refuse_torch_randomness),  # noise and label flips
        *((shared, "__repr__", _hidden) for shared in (ArithmeticSharedTensor, BinarySharedTensor, MPCTensor)),
    ]


@contextmanager
def crypten_with(
    communicator: Any, provider: Provider, randomness: Randomness, opener: Opener, fraction_bits: int
) -> Iterator[None]:
    """Let CrypTen use these parts instead of its own inside a `with` block; its own come back in the end.

    Raises `SecrecyError` when CrypTen is configured for another protocol than Beaver's.
    """
    if crypten.cfg.mpc.protocol != "beaver":
        raise SecrecyError("replicated secret sharing of CrypTen misses its zero masks: set mpc.protocol to beaver")
    parts = [
        (crypten.communicator, "get", lambda: communicator),
        (crypten.communicator, "is_initialized", lambda: True),
        (crypten.communicator, "uninit", lambda: None),
        (crypten.mpc, "get_default_provider", lambda: provider),
        (crypten, "generators", {"global": _PublicGenerators(communicator, randomness)}),
        (MPCTensor, "get_plain_text", lambda tensor, dst=None: opener(tensor, dst, True)),
        (MPCTensor, "reveal", lambda tensor, dst=None: opener(tensor, dst, False)),
    ]
    with ExitStack() as originals:
        for owner, name, part in [*parts, *_draws_and_refusals(_Draws(randomness))]:
            if name in owner.__dict__:
                originals.callback(setattr, owner, name, owner.__dict__[name])
            else:
                originals.callback(delattr, owner, name)
            setattr(owner, name, part)
        originals.callback(setattr, crypten.cfg.encoder, "precision_bits", crypten.cfg.encoder.precision_bits)
        crypten.cfg.encoder.precision_bits = fraction_bits
        yield


def mpc_tensor_from_share(share: torch.Tensor, fraction_bits: int) -> Any:
    """A CrypTen arithmetic tensor whose share at this party is a copy of `share`, int64: CrypTen computes in place."""
    return MPCTensor.from_shares(own_copy(share), precision=fraction_bits)


def ring_share_of(tensor: Any) -> RingShare:
    """This party's int64 share of an `MPCTensor`, to be opened; an arithmetic one adds up, a binary one by exclusive or.

    It is the tensor's own memory, of any layout; `open_to` leaves it as it is.
    """
    inner = tensor._tensor
    scale = inner.encoder.scale
    fraction_bits = 0 if scale == 1 else int(math.log2(scale))
    return RingShare(inner.share, fraction_bits, isinstance(inner, BinarySharedTensor))
