"""Shares of zero: what makes a share look uniform to everybody who receives it, and cancels when all are added up.

Protocol, party i of a world of n, zero-share number c:
  1. once, when the object is made: i and every other party j expand a seed that only they know (`Links.pairwise_seed`)
  2. i expands for every j a key stream of the shape of the share under the label c, the same one that j expands. The
     party of lower rank adds it, the other one takes it away; shares by exclusive or take it in by exclusive or

Who learns what. Nobody anything: nothing is sent. 0 rounds, 0 bytes.

Security. Semi-honest parties. The seeds form a complete graph: to a coalition that lacks the seed of one pair, the
shares of these two are uniform given their sum (Bonawitz et al., CCS 2017, section 4, with all parties present), so n-2
parties together learn nothing about the other two but that sum. CrypTen's own zero-shares form a ring, where the two
neighbours of a party know its mask. Streams are AES-256 in counter mode, and no label is used twice: the counter only
grows, and `Links` gives the seed for one purpose once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpc_fl.links.links import Links


class ZeroShares:
    """This party's shares of zero among `world`, the parties in rank order, this one with them.

    All parties must ask for the same shares in the same order: the counter is the label. Raises `SecrecyError` when the
    seeds for zero-shares were given out before on these links, `LinkError` for a party that is not connected.
    """

    def __init__(self, links: Links, world: Sequence[str]) -> None:
        rank = world.index(links.name)
        # Whether this party adds the mask in common with the other one, or takes it away.
        self._seeds = [
            (links.pairwise_seed(name, "zero-shares"), rank < other_rank)
            for other_rank, name in enumerate(world)
            if name != links.name
        ]
        self._count = 0

    def zero_share(self, shape: Sequence[int], *, exclusive_or: bool = False) -> torch.Tensor:
        """This party's share of zero, int64 of `shape`, over Z_2^64 or by exclusive or; see `add_zero_share`."""
        share = torch.zeros(tuple(shape), dtype=torch.int64)
        self.add_zero_share(share, exclusive_or=exclusive_or)
        return share

    def add_zero_share(self, share: torch.Tensor, *, exclusive_or: bool = False) -> None:
        """Refresh a share, int64 or int32 of any shape, also a view, with this party's share of zero, in place.

        To whoever sees the result it is uniform given the sum (or exclusive or) of all parties' shares.
        """
        self._count += 1
        for seed, adds in self._seeds:
            mask = seed.stream("zero-share", self._count)
            if exclusive_or:
                mask.exclusive_or_into(share)
            elif adds:
                mask.add_to(share)
            else:
                mask.subtract_from(share)
