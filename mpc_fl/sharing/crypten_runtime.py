"""CrypTen on this project's links, dealer and stream cipher, with the one way out of the secret domain.

CrypTen is used unmodified; `CrypTenRuntime` replaces, while it is active, five things that are not safe to use as they
come: the communicator (gloo without encryption or identities, objects as pickle), the provider (a computing party that
knows all correlated randomness), every random draw (`torch.Generator` is no cipher), the ring of zero-shares between
neighbours (which becomes a complete graph of pairwise seeds, `zero_shares`), and `get_plain_text` and `reveal`, which
open values without a record. What is replaced belongs to CrypTen's modules, so a process has one runtime in
force at a time: a check of norms enters one of its own within that of the run, which comes back after it.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from mpc_fl.audit.opening_record import Record
from mpc_fl.crypto.ring import RingShare
from mpc_fl.crypto.secrecy import Shared
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SecrecyError
from mpc_fl.links.links import Links
from mpc_fl.sharing.crypten_communicator import Size
from mpc_fl.sharing.crypten_parts import LinksCommunicator, NoDealer, Opener, Provider, crypten_with, ring_share_of
from mpc_fl.sharing.dealer_client import AHEAD_BYTES, DealerClient
from mpc_fl.sharing.opening import SecretDomain, open_to
from mpc_fl.sharing.zero_shares import ZeroShares


class CrypTenRuntime:
    """One party's CrypTen, alive inside a `with` block.

    `world` lists the computing parties in rank order and includes this one. Without a dealer only linear operations
    work; with one, `dealer_client` is this party's side of it, and `ahead_bytes` bounds what the dealer sends ahead of
    need. CrypTen's own `get_plain_text` and `reveal` go through the `domain` made of the runtime, and are refused before
    there is one, so that there is no unrecorded way out.
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
        self.zero_shares = ZeroShares(links, world)
        self._opener: Opener | None = None
        self._local = Seed.from_system()
        self._draws = 0
        self._active = ExitStack()

    def __enter__(self) -> CrypTenRuntime:
        communicator = LinksCommunicator(self.links, self.world)
        provider = Provider(self.dealer_client or NoDealer(), self.rank)
        self._active.enter_context(crypten_with(communicator, provider, self, self._open, self.fraction_bits))
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        with self._active:
            if error is None and self.dealer_client is not None:
                self.dealer_client.finish()

    def domain(self, record: Record, signatory: Signatory | None = None) -> CrypTenDomain:
        """The secret domain of this runtime, whose openings `record` takes down, also those that CrypTen asks for."""
        domain = CrypTenDomain(self, record, signatory)
        self._opener = domain.open_for_crypten
        return domain

    def _open(self, tensor: Any, dst: int | None, decode: bool) -> Any:
        if self._opener is None:
            raise SecrecyError("CrypTen tried to open a tensor outside of open_to")
        return self._opener(tensor, dst, decode)

    # -- randomness, as `crypten_parts.Randomness` asks for it
    def elements(self, shape: Size, bits: int) -> torch.Tensor:
        """Uniform int64 elements of Z_2^bits that only this party knows."""
        self._draws += 1
        return self._local.stream("local", self._draws).ring_elements(tuple(shape), bits)

    def zero_share(self, shape: Size, *, exclusive_or: bool = False) -> torch.Tensor:
        """This party's int64 share of zero; see `ZeroShares.zero_share`."""
        return self.zero_shares.zero_share(shape, exclusive_or=exclusive_or)


class CrypTenDomain(SecretDomain):
    """The secret domain of a party that computes with CrypTen, made by `CrypTenRuntime.domain`.

    An `MPCTensor` is opened as `Shared(what, ring_share_of(tensor))`. Zero-shares of openings and of CrypTen are counted
    together.
    """

    def __init__(self, runtime: CrypTenRuntime, record: Record, signatory: Signatory | None = None) -> None:
        super().__init__(runtime.links, runtime.world, record, runtime.zero_shares, signatory)
        self.runtime = runtime

    def open_for_crypten(self, tensor: Any, destination: int | None, decode: bool) -> torch.Tensor | None:
        """What CrypTen's `get_plain_text` (decoded, float32) and `reveal` do: open to one rank, or to all for `None`."""
        who = self.world if destination is None else [self.world[destination]]
        share: Shared[RingShare] = Shared("a CrypTen tensor", ring_share_of(tensor))
        elements = open_to(self, share, list(who), "CrypTen get_plain_text", decode=False)
        fraction_bits = share.inside_protocol().fraction_bits
        if elements is None or not decode or fraction_bits == 0:
            return elements
        return (elements.double() / float(1 << fraction_bits)).float()
