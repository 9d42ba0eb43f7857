"""What was begun before a plan among peers held, and comes to its end under it: a block that is complete, openings in no block.

All of U know from the proposal, signed by each, who has what: the seal of a block, the digest of the last opening. So whoever
has it sends it to those that lack it, and can send nothing else. A block that one says it holds is believed when its signatures
have been checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cryptography import x509

from mpc_fl.aggregation.words import broadcast
from mpc_fl.audit.ledger_audit import extend
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.reveal_ledger import Block, block_from, is_signed, opening_from, to_json
from mpc_fl.errors import PeerLostError, ProtocolError, SumLostError
from mpc_fl.federation.peer_presence import Presence
from mpc_fl.federation.peer_proposal import DEVIATES
from mpc_fl.links.links import Links


@dataclass(frozen=True)
class Settling:
    """At a hospital of U: `present` is what each said of itself in the proposal, `links` are those of this plan alone.
    `certificates` are those of all hospitals, checked; a block has a `quorum` of them as parties."""

    links: Links
    present: Mapping[str, Presence]
    certificates: Mapping[str, x509.Certificate]
    quorum: int

    def completed(self, own: tuple[int, Block] | None, ledger: RevealLedger) -> tuple[int, Block] | None:
        """The block that is to be finished, with its view: of those that are complete the one of the latest view; `None` for none.

        `own` is what this hospital holds. Nothing follows from a block before all its signatures were checked. Its view is
        taken from who holds it. Raises `SumLostError` where who says that it holds the block is lost, or has none that
        counts after this `ledger`, and names it; `ProtocolError` for two blocks of one view that both count.
        """
        claims = {name: one for name, one in self.present.items() if one.complete}
        if not claims:
            return None
        for name, one in claims.items():
            if one.complete_view >= one.view:
                raise _false(name, "says that it holds a block of a view that is not over")
        latest = max(one.complete_view for one in claims.values())
        held = {name: one.complete for name, one in claims.items() if one.complete_view == latest}
        holders = {seal: name for name, seal in reversed(held.items())}  # of each block the first that holds it
        with self._ended("complete") as links:
            shown = {holder: self._shown(links, holder, held, own) for holder in holders.values()}
        for holder, block in shown.items():
            self._require_genuine(holder, block, ledger)
        if len(shown) > 1:
            raise ProtocolError(f"{' and '.join(shown)} have two blocks of one view", "compare the reveal ledgers")
        return latest, next(iter(shown.values()))

    def _shown(self, links: Links, holder: str, held: Mapping[str, str], own: tuple[int, Block] | None) -> Block:
        """The block that `holder` said it holds, of which `held` has the seals: from itself, or from here."""
        seal = held[holder]
        if own is not None and held.get(links.name) == seal:
            if links.name == holder:
                value, lack = to_json(own[1]), [name for name in self.present if held.get(name) != seal]
                broadcast(lack, lambda name: links.send_object(name, "block", {"block": value}))
            return own[1]
        try:
            block = block_from(links.receive_object(holder, "block").get("block"))
        except ValueError:
            raise _false(holder, "sent no block of the reveal ledger") from None
        if block.seal() != seal:
            raise _false(holder, "sent another block than it said it holds")
        return block

    def _require_genuine(self, holder: str, block: Block, ledger: RevealLedger) -> None:
        """All its parties, a quorum, have signed it, by the certificates that this hospital knows, and it follows the ledger."""
        known, content = {**ledger.chain.certificates, **self.certificates}, block.content_digest()
        _, findings = extend(ledger.chain, block, ledger.authority, ledger.earlier)
        signed = tuple(
            each.party
            for each in block.signatures
            if each.party in known and is_signed(content, each, known[each.party], block.version)
        )
        if findings or signed != block.parties or len(signed) < self.quorum:
            raise _false(holder, f"says that block {block.number} is complete, which is not so")

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


def _false(name: str, what: str) -> SumLostError:
    return SumLostError(f"{name} {what}", f"{name} does not follow the protocol; the others go on", name)
