"""The slices that a hospital has in a sum among peers: its own, those that it opens, and copies that it keeps for others.

Whatever comes is held against the hash that its sender signed, before anything is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mpc_fl.aggregation.signed_words import DEVIATES
from mpc_fl.aggregation.slices import Slices
from mpc_fl.aggregation.words import broadcast
from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.errors import ProtocolError
from mpc_fl.links.links import Links

Hashes = Mapping[str, str]  # that a hospital signed of its slices, by slice


@dataclass
class HeldSlices:
    """At hospital `me`, of the sum `why`: `own` are the slices of its summand, `held` those that it opens, by slice and sender, and
    `kept` the copies that it keeps, by slice, of what the hospital before it opens of its own summand; each (length,).
    """

    links: Links
    slices: Slices
    me: str
    why: str
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    held: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def send(self, others: Sequence[str], copy: bool) -> None:
        """To each its slice, and where summands are checked (`copy`) to one that of this hospital's own."""
        broadcast(others, lambda name: self.links.send_tensor(name, "slice", self.own[name]))
        if copy:
            keeper = self.slices.keeper(self.me, self.slices.hospitals)
            broadcast([keeper], lambda name: self.links.send_tensor(name, f"copy {self.me}", self.own[self.me]))
        self.held[self.me] = {self.me: self.own[self.me]}

    def take(self, name: str, hashes: Hashes, deadline: float, copy: bool) -> None:
        """What another hospital has sent so. Raises `PeerLostError`, and `ProtocolError` naming it for what it did not sign."""
        words = self._received(name, "slice", self.me, hashes, deadline)
        if copy and self.slices.keeper(name, self.slices.hospitals) == self.me:
            self._take_copy(name, name, hashes, deadline)
        self.held[self.me][name] = words

    def hand_on(self, admitted: Sequence[str], hashes: Mapping[str, Hashes], deadline: float) -> None:
        """What would be opened by hospitals that are not in V goes to who opens it instead: the same words of those in V."""
        handed_on = self.slices.handed_on(admitted)
        for piece, opener in handed_on.items():
            if opener != self.me:
                self.links.send_tensor(opener, f"slice {piece}", self.own[piece])
        for piece in [piece for piece, opener in handed_on.items() if opener == self.me]:
            self.held[piece] = {self.me: self.own[piece]}
            for name in self._others_of(admitted):
                self.held[piece][name] = self._received(name, f"slice {piece}", piece, hashes[name], deadline)
        self.held[self.me] = {name: self.held[self.me][name] for name in admitted}

    def hand_on_copies(self, admitted: Sequence[str], hashes: Mapping[str, Hashes], deadline: float) -> None:
        """Where summands are checked: copies of what each of V opens of its own go to the next one of V, if that has none yet."""
        slices, keepers = self.slices, {name: self.slices.keeper(name, admitted) for name in admitted}

        def has_it(name: str, piece: str) -> bool:
            return piece == name and slices.keeper(name, slices.hospitals) == keepers[name]

        for piece in slices.opened_by(self.me, admitted):
            if not has_it(self.me, piece):
                self.links.send_tensor(keepers[self.me], f"copy {piece}", self.own[piece])
        came, self.kept = self.kept, {}
        for name in [name for name in self._others_of(admitted) if keepers[name] == self.me]:
            for piece in slices.opened_by(name, admitted):
                if has_it(name, piece):
                    self.kept[piece] = came[piece]
                else:
                    self._take_copy(name, piece, hashes[name], deadline)

    def clear(self) -> None:
        """Forget them all."""
        self.own.clear()
        self.held.clear()
        self.kept.clear()

    def _others_of(self, admitted: Sequence[str]) -> list[str]:
        return [name for name in admitted if name != self.me]

    def _take_copy(self, name: str, piece: str, hashes: Hashes, deadline: float) -> None:
        self.kept[piece] = self._received(name, f"copy {piece}", piece, hashes, deadline)

    def _received(self, name: str, tag: str, piece: str, hashes: Hashes, deadline: float) -> torch.Tensor:
        words = self.links.receive_tensor(name, tag, self.own[piece].dtype, (self.slices.length(piece),), deadline)
        if tensor_digest(words) != hashes[piece]:
            raise ProtocolError(f"{name} sent another slice of '{self.why}' than it signed", DEVIATES, name)
        return words
