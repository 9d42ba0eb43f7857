"""What was begun before a plan among peers held, and comes to its end under it: a block that is complete, openings in no block.

All of U know from the proposal, signed by each, who has what: the seal of a block, the digest of the last opening. So whoever
has it sends it to those that lack it, and can send nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mpc_fl.aggregation.words import broadcast
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.reveal_ledger import Block, block_from, opening_from, to_json
from mpc_fl.errors import SAME_VERSION, PeerLostError, ProtocolError, SumLostError
from mpc_fl.federation.peer_proposal import DEVIATES, Presence
from mpc_fl.links.links import Links


@dataclass(frozen=True)
class Settling:
    """At a hospital of U: `present` is what each said of itself in the proposal, `links` are those of this plan alone."""

    links: Links
    present: Mapping[str, Presence]

    def completed(self, own: tuple[int, Block] | None) -> tuple[int, Block] | None:
        """The block that is to be finished, with its view: of those that are complete the one of the latest view; `None` for none.

        `own` is what this hospital holds. Raises `SumLostError` where who holds the block is lost, `ProtocolError` where it sends
        another one.
        """
        views = [one.complete_view for one in self.present.values() if one.complete]
        if not views:
            return None
        latest = max(views)
        held = {n: one.complete for n, one in self.present.items() if one.complete and one.complete_view == latest}
        holder, seal = next(iter(held.items()))
        if set(held.values()) != {seal}:
            raise ProtocolError(f"{' and '.join(held)} have two blocks of one view", "compare the reveal ledgers")
        block = None if own is None or self.links.name not in held else own[1]
        with self._ended("complete") as links:
            if block is None:
                try:
                    block = block_from(links.receive_object(holder, "block").get("block"))
                except ValueError:
                    raise ProtocolError(f"{holder} sent no block of the reveal ledger", SAME_VERSION) from None
            elif links.name == holder:
                value, lack = to_json(block), [name for name in self.present if name not in held]
                broadcast(lack, lambda name: links.send_object(name, "block", {"block": value}))
        if block.seal() != seal:
            raise ProtocolError(f"{holder} sent another block than it said it holds", DEVIATES)
        return latest, block

    def settle(self, ledger: RevealLedger) -> None:
        """All of U then have the same openings that no block holds yet.

        Raises `ProtocolError` where their records contradict each other, `SumLostError` where somebody is lost meanwhile.
        """
        longest = max(one.pending for one in self.present.values())
        holders = [name for name, one in self.present.items() if one.pending == longest]
        short = [name for name in self.present if name not in holders]
        if len({self.present[name].last for name in holders}) > 1:
            fix = "compare the openings.jsonl of both; nothing was signed"
            raise ProtocolError(f"{' and '.join(holders)} recorded different openings", fix)
        with self._ended("settle") as links:
            if links.name == holders[0]:
                pending = [to_json(opening) for opening in ledger.pending]
                broadcast(short, lambda name: links.send_object(name, "pending", {"pending": pending}))
            elif links.name in short:
                value = links.receive_object(holders[0], "pending").get("pending")
                try:
                    openings = [opening_from(item) for item in (value if isinstance(value, list) else [])]
                except ValueError:
                    openings = []
                if len(openings) != longest or openings[-1].digest != self.present[holders[0]].last:
                    raise ProtocolError(f"{holders[0]} sent other openings than it signed", DEVIATES)
                ledger.adopt(openings)

    @contextlib.contextmanager
    def _ended(self, what: str) -> Iterator[Links]:
        """Links of a scope that ends; a loss inside makes the plan void."""
        links = self.links.scoped(what)
        try:
            yield links
        except PeerLostError as error:
            raise SumLostError(error.what, error.fix, error.peer) from None
        finally:
            links.end_scope()
