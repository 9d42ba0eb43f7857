"""Blocks that hospitals of a run among peers give to those that lack them: each is signed by all its parties, and of this run.

That is not enough to go on from one. A party that takes all signatures and gives its own to nobody has the block complete alone,
and others make another one in its place under the next view. So a block that somebody gives is believed when a quorum says, each
signed, that it has kept it; or when too few are there to make another one without this hospital.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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


def add_given(ledger: RevealLedger, blocks: Sequence[Block], sender: str, seal: str) -> None:
    """Add all blocks that another hospital gave, if they end with the one of this `seal`; else none of them.

    Raises `ProtocolError` where they do not, or one is not signed by all.
    """
    if (blocks[-1].seal() if blocks else ledger.chain.seal) != seal:
        raise ProtocolError(f"{sender} gave another ledger than a quorum has", SAME_VERSION)
    chain, blocks = ledger.chain, [block for block in blocks if block.number >= ledger.chain.blocks]
    for block in blocks:
        chain, findings = extend(chain, block, ledger.authority, ledger.earlier)
        if findings:
            raise ProtocolError(f"{sender} gave a block that does not count: {findings[0].line}", SAME_VERSION)
    for block in blocks:
        ledger.add(block, sender)
