"""Blocks that hospitals of a run among peers give to those that lack them: each is signed by all its parties, and of this run.

That is not enough to go on from one. A party that takes all signatures and gives its own to nobody has the block complete alone,
and others make another one in its place under the next view. So a block that somebody gives is believed when a quorum says, each
signed, that it has kept it; or when too few are there to make another one without this hospital.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mpc_fl.aggregation.words import broadcast, say
from mpc_fl.audit.ledger_audit import extend
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.reveal_ledger import Block, block_from, to_json
from mpc_fl.errors import SAME_VERSION, ProtocolError
from mpc_fl.federation.peer_presence import Presence
from mpc_fl.federation.peer_proposal import require_of_this_run
from mpc_fl.links.links import Links

GIVEN = 2  # blocks that others lack and are given unasked


@dataclass
class PassingOn:
    """At a hospital: the last blocks of `ledger` go, unasked, over the `links` of the attendance to others that lack them, and
    come from others. `about_run`: session and digest of the configuration; `quorum`: hospitals.
    """

    links: Links
    ledger: RevealLedger
    about_run: tuple[str, str]
    quorum: int
    _given: set[tuple[str, str, int]] = field(default_factory=set)
    _offered: dict[tuple[str, int], tuple[Block, str]] = field(
        default_factory=dict
    )  # by who gave it and number; its seal

    def give(self, name: str, has: int) -> None:
        """Give a hospital that `has` so many blocks those that it lacks, if few, each once for each of its starts."""
        if not 0 < self.ledger.chain.blocks - has <= GIVEN:
            return
        for block in self.ledger.blocks[has:]:
            self._give(name, block)

    def _give(self, name: str, block: Block) -> None:
        key = name, self.links.key_fingerprint(name), block.number
        if key not in self._given:
            self._given.add(key)
            broadcast([name], lambda to: say(self.links, [to], "block", block=to_json(block)))

    def take(self, name: str, word: Mapping[str, Any]) -> None:
        """Note a block that another hospital gave, if it is one of the next ones. Raises `ProtocolError`."""
        block = block_in(name, word)
        if 0 <= block.number - self.ledger.chain.blocks < GIVEN:
            require_of_this_run(block, name, self.about_run, self.quorum)
            self._offered[name, block.number] = block, block.seal()

    def believed(self, said: Mapping[str, Presence], members: Collection[str]) -> tuple[str, Block] | None:
        """Who gave the next block and the block, added to the ledger where that is believed by what others `said` last of
        themselves; `None` for none. Raises `ProtocolError`, as the ledger does for signatures."""
        number = self.ledger.chain.blocks
        self._offered = {key: value for key, value in self._offered.items() if key[1] >= number}
        for name, (block, seal) in [(key[0], value) for key, value in self._offered.items() if key[1] == number]:
            later = {own for (_, at), (each, own) in self._offered.items() if (at, each.previous) == (number + 1, seal)}
            kept = {each for each, one in said.items() if self._has_kept(one, number, seal, later)}
            others = {each for each, one in said.items() if each in members and (one.recalls or one.blocks > number)}
            if len(kept) >= self.quorum or len(kept | others) < self.quorum:
                del self._offered[name, number]
                self.ledger.add(block, name)
                return name, block
        return None

    @staticmethod
    def _has_kept(said: Presence, number: int, seal: str, later: Collection[str]) -> bool:
        """Whether a hospital says that it stands after the block of this number and seal, or after one of those that follow it."""
        return (said.blocks, said.seal) == (number + 1, seal) or (said.blocks == number + 2 and said.seal in later)


def block_in(sender: str, word: Mapping[str, Any]) -> Block:
    """The block in a message. Raises `ProtocolError` naming who sent none."""
    try:
        return block_from(word.get("block"))
    except ValueError:
        raise ProtocolError(f"{sender} sent no block of the reveal ledger", SAME_VERSION) from None


class GivenBlocks:
    """The blocks that `sender` gives to one that asks for them, from where its ledger ends: each checked when it comes, and kept
    together, or none of them."""

    def __init__(self, ledger: RevealLedger, sender: str) -> None:
        self._ledger, self._sender = ledger, sender
        self._chain, self._blocks = ledger.chain, list[Block]()

    def take(self, block: Block) -> None:
        """The next one. Raises `ProtocolError` where it does not count, or is not signed by all."""
        self._chain, findings = extend(self._chain, block, self._ledger.authority, self._ledger.earlier)
        if findings:
            raise ProtocolError(f"{self._sender} gave a block that does not count: {findings[0].line}", SAME_VERSION)
        self._blocks.append(block)

    def end_with(self, seal: str) -> bool:
        """Whether the last one ends the run, and has this seal."""
        return self._chain.ended and self._chain.seal == seal

    def keep(self, seal: str) -> None:
        """Keep them. Raises `ProtocolError` where the last one has another seal than this, which a quorum says."""
        if self._chain.seal != seal:
            raise ProtocolError(f"{self._sender} gave another ledger than a quorum has", SAME_VERSION)
        for block in self._blocks:
            if block.number >= self._ledger.chain.blocks:  # else it came meanwhile
                self._ledger.add(block, self._sender)
