"""CrypTen on this project's links, dealer and stream cipher.
CrypTen is used unmodified; `CrypTenRuntime` replaces, while it is active, the four things DESIGN.md section 2 finds
unsafe: the communicator (gloo, pickle), the provider (a computing party as dealer), every random draw
(`torch.Generator`), and the neighbour ring of zero-shares, which becomes a complete graph of pairwise seeds so that any
n-2 parties learn nothing about the other two but their sum. What is replaced belongs to CrypTen's modules, so a process
has one runtime at a time.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SecrecyError
from mpc_fl.links.links import Links
from mpc_fl.sharing.crypten_parts import LinksCommunicator, Opener, Provider, Size, _NoDealer, crypten_with
from mpc_fl.sharing.dealer_client import AHEAD_BYTES, DealerClient


class CrypTenRuntime:
    """One party's CrypTen, alive inside a `with` block.

    `world` lists the computing parties in rank order and includes this one. Without a dealer only linear operations
    work; with one, `dealer_client` is this party's side of it, and `ahead_bytes` bounds what the dealer sends ahead of
    need. While active, CrypTen's own `get_plain_text` and `reveal` go through `opener` (set by `opening`), so that
    there is no unrecorded way out.
    """

    def __init__(
        self, links: Links, world: list[str], dealer: str | None, fraction_bits: int, ahead_bytes: int = AHEAD_BYTES
    ) -> None:
        self.links = links
        self.world = world
        self.rank = world.index(links.name)
        self.dealer = dealer
        self.dealer_client = None if dealer is None else DealerClient(links, world, dealer, ahead_bytes)
        self.fraction_bits = fraction_bits
        self.opener: Opener | None = None
        self._pairwise = {name: links.pairwise_seed(name, "zero-shares") for name in world if name != links.name}
        self._local = Seed.from_system()
        self._zero_shares = 0
        self._draws = 0
        self._active = ExitStack()

    def __enter__(self) -> CrypTenRuntime:
        communicator = LinksCommunicator(self.links, self.world)
        provider = Provider(self.dealer_client or _NoDealer(), self.rank)
        self._active.enter_context(crypten_with(communicator, provider, self, self._open, self.fraction_bits))
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        with self._active:
            if error is None and self.dealer_client is not None:
                self.dealer_client.finish()

    def _open(self, tensor: Any, dst: int | None, decode: bool) -> Any:
        if self.opener is None:
            raise SecrecyError("CrypTen tried to open a tensor outside of open_to")
        return self.opener(tensor, dst, decode)

    # -- randomness
    def elements(self, shape: Size, bits: int) -> torch.Tensor:
        """Uniform int64 elements of Z_2^bits that only this party knows."""
        self._draws += 1
        return self._local.stream("local", self._draws).ring_elements(tuple(shape), bits)

    def zero_share(self, shape: Size, *, exclusive_or: bool = False) -> torch.Tensor:
        """This party's share of zero (sum or exclusive or over all ranks), int64; see `add_zero_share`."""
        share = torch.zeros(tuple(shape), dtype=torch.int64)
        self.add_zero_share(share, exclusive_or=exclusive_or)
        return share

    def add_zero_share(self, share: torch.Tensor, *, exclusive_or: bool = False) -> None:
        """Refresh a share, int64 or int32, with this party's share of zero, in place.

        For each pair the lower rank adds and the higher subtracts a mask both expand from their pairwise seed. All
        parties must call this in the same order: the counter is the label.
        """
        self._zero_shares += 1
        for name, seed in self._pairwise.items():
            mask = seed.stream("zero-share", self._zero_shares)
            if exclusive_or:
                mask.exclusive_or_into(share)
            elif self.rank < self.world.index(name):
                mask.add_to(share)
            else:
                mask.subtract_from(share)
