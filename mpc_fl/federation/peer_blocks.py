"""Blocks that hospitals of a run among peers give to those that lack them: each is signed by all its parties, so it needs no trust
in who gives it, only that it is a block, and of this run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpc_fl.aggregation.words import broadcast, say
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.reveal_ledger import Block, block_from, to_json
from mpc_fl.errors import SAME_VERSION, ProtocolError
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

    def take(self, name: str, word: Mapping[str, Any]) -> Block | None:
        """Add the block that another hospital gave; `None` where it is not the next one. Raises `ProtocolError`, as the ledger does
        for signatures."""
        block = block_in(name, word)
        if block.number != self.ledger.chain.blocks:
            return None
        add_given(self.ledger, block, name, self.about_run, self.quorum)
        return block


def block_in(sender: str, word: Mapping[str, Any]) -> Block:
    """The block in a message. Raises `ProtocolError` naming who sent none."""
    try:
        return block_from(word.get("block"))
    except ValueError:
        raise ProtocolError(f"{sender} sent no block of the reveal ledger", SAME_VERSION) from None


def add_given(ledger: RevealLedger, block: Block, sender: str, about_run: tuple[str, str], quorum: int) -> None:
    """Add a block that another hospital gave. Raises `ProtocolError` where it is of another run, or not signed by all."""
    require_of_this_run(block, sender, about_run, quorum)
    ledger.add(block, sender)
