"""What was begun before a plan among peers held, and comes to its end under it: a block that is complete, openings in no block.

All of U know from the proposal, signed by each, who has what: the seal of a block, the digest of the last opening. So whoever
has it sends it to those that lack it, and can send nothing else. A block that one says it holds is believed when its signatures
have been checked.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from cryptography import x509

from mpc_fl.aggregation.words import Deadlines, broadcast, hear_all, say
from mpc_fl.audit.ledger_audit import extend
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.opening_record import Opening
from mpc_fl.audit.reveal_ledger import Block, ChainedOpening, block_from, is_signed, opening_from, to_json
from mpc_fl.errors import PeerLostError, ProtocolError, SumLostError
from mpc_fl.federation.peer_presence import Presence
from mpc_fl.federation.peer_proposal import Complete, Proposals, require_of_this_run
from mpc_fl.links.links import Links


@dataclass(frozen=True)
class Settling:
    """At a hospital of U: `present` is what each said of itself in the proposal, `links` are those of this plan alone.
    `certificates` are those of all hospitals, checked; `proposals` say what a block of this run is. `confirmed` are the openings
    that this hospital has confirmed; `None` where some may be of a start before this one, which it does not know any more."""

    links: Links
    present: Mapping[str, Presence]
    certificates: Mapping[str, x509.Certificate]
    proposals: Proposals
    confirmed: Mapping[str, Opening] | None

    @property
    def _quorum(self) -> int:
        return self.proposals.rules.smallest

    def completed(self, own: Complete | None, ledger: RevealLedger) -> Block | None:
        """The block that is to be finished: of those that are complete the one of the latest view; `None` for none.

        `own` is what this hospital holds. Nothing follows from a block before all its signatures were checked, and those that
        say of which view it is. Raises `SumLostError` where who says that it holds the block is lost, or has none that
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
        for holder, complete in shown.items():
            self._require_genuine(holder, complete.block, ledger)
            if complete is not own and not self.proposals.is_of_its_view(self.present[holder].number, complete):
                raise _false(holder, f"says that it holds a block of view {latest}, which is of another one")
        if len(shown) > 1:
            raise ProtocolError(f"{' and '.join(shown)} have two blocks of one view", "compare the reveal ledgers")
        return next(iter(shown.values())).block

    def _shown(self, links: Links, holder: str, held: Mapping[str, str], own: Complete | None) -> Complete:
        """The block that `holder` said it holds, of which `held` has the seals: from itself, or from here."""
        seal = held[holder]
        if own is not None and held.get(links.name) == seal:
            if links.name == holder:
                value, lack = to_json(own.block), [name for name in self.present if held.get(name) != seal]
                shown = {"block": value, "signed": dict(own.signed)}
                broadcast(lack, lambda name: links.send_object(name, "block", shown))
            return own
        said = links.receive_object(holder, "block")
        signed = said.get("signed")
        try:
            block = block_from(said.get("block"))
        except ValueError:
            raise _false(holder, "sent no block of the reveal ledger") from None
        if block.seal() != seal:
            raise _false(holder, "sent another block than it said it holds")
        return Complete(self.present[holder].complete_view, block, signed if isinstance(signed, dict) else {})

    def _require_genuine(self, holder: str, block: Block, ledger: RevealLedger) -> None:
        """All its parties, a quorum, have signed it, by the certificates that this hospital knows, and it follows the ledger."""
        try:
            require_of_this_run(block, holder, self.proposals.about_run, self._quorum)
        except ProtocolError:
            raise _false(holder, "has a block that begins the ledger of another run") from None
        known, content = {**ledger.chain.certificates, **self.certificates}, block.content_digest()
        _, findings = extend(ledger.chain, block, ledger.authority, ledger.earlier)
        signed = tuple(
            each.party
            for each in block.signatures
            if each.party in known and is_signed(content, each, known[each.party], block.version)
        )
        if findings or signed != block.parties or len(signed) < self._quorum:
            raise _false(holder, f"says that block {block.number} is complete, which is not so")

    def settle(self, ledger: RevealLedger) -> None:
        """All of U then have the same openings that no block holds yet.

        Raises `SumLostError` naming who says what is not so, or is lost meanwhile; `ProtocolError` where records contradict each
        other and nobody can tell whose is false.
        """
        longest = max(one.pending for one in self.present.values())
        holders = self._alike([name for name, one in self.present.items() if one.pending == longest])
        if len(holders) == len(self.present):
            return
        others, now = [name for name in self.present if name != self.links.name], time.monotonic()
        with self._ended("settle") as links:
            try:
                openings = self._to_record(links, holders, ledger)
            except (PeerLostError, ProtocolError) as error:
                say(links, others, "void", reason=error.for_peers)
                raise
            # Recorded by all or by nobody: one that was not among those of an opening cannot tell that it was made up.
            say(links, others, "settled")
            deadlines = Deadlines("what was begun", now, 2 * (links.deadline() - now))
            hear_all(links, others, "settled", lambda *_: None, (deadlines, 0))
        ledger.adopt(openings)

    def _to_record(self, links: Links, holders: Sequence[str], ledger: RevealLedger) -> list[ChainedOpening]:
        """The longest record: of one of its `holders`, each view another one, checked where this hospital has not all of it."""
        openings, holder = list(ledger.pending), holders[self.present[holders[0]].view % len(holders)]
        short, mine = [name for name in self.present if name not in holders], len(ledger.pending)
        if links.name == holder:
            pending = [to_json(opening) for opening in openings]
            broadcast(short, lambda name: links.send_object(name, "pending", {"pending": pending}))
        elif links.name in short:
            openings = self._received(links, holder)
        self._require_no_other(holders, openings, holder)
        self._require_begun(holder, openings[mine:])
        if openings[:mine] != ledger.pending or not ledger.continues(openings):
            raise _false(holder, "recorded openings that do not follow the reveal ledger")
        return openings

    def _require_no_other(self, holders: Sequence[str], openings: Sequence[ChainedOpening], holder: str) -> None:
        """All records are beginnings of the longest one, as far as their last openings tell."""
        said = {name: one for name, one in self.present.items() if one.pending}
        odd = [name for name, one in said.items() if openings[one.pending - 1].digest != one.last]
        if 2 * len(odd) > len(self.present):
            raise _false(holder, "recorded other openings than most")
        if odd and 2 * len(holders) > len(self.present):
            raise _false(odd[0], "recorded other openings than most")
        if odd:
            raise _contradiction(holder, odd[0])

    def _alike(self, holders: Sequence[str]) -> Sequence[str]:
        """Those with the longest record, all with the same. Where more than half of U have it, who has another one says what is
        not so."""
        (most, count), *others = Counter(self.present[name].last for name in holders).most_common()
        odd = [name for name in holders if self.present[name].last != most]
        if others and 2 * count > len(self.present):
            raise _false(odd[0], "recorded other openings than most")
        if others:
            raise _contradiction(next(name for name in holders if name not in odd), odd[0])
        return holders

    def _received(self, links: Links, holder: str) -> list[ChainedOpening]:
        value = links.receive_object(holder, "pending").get("pending")
        try:
            openings = [opening_from(item) for item in (value if isinstance(value, list) else [])]
        except ValueError:
            openings = []
        if len(openings) != self.present[holder].pending or openings[-1].digest != self.present[holder].last:
            raise _false(holder, "sent other openings than it signed")
        return openings

    def _require_begun(self, holder: str, openings: Sequence[ChainedOpening]) -> None:
        """These may have been begun: each is of a sum among a quorum of the hospitals, and where this one is among them, it has
        confirmed that, or the keys could not have left."""
        for opening in openings:
            among = opening.among
            if opening.to != among or len(among) < self._quorum or not set(among) <= set(self.certificates):
                raise _false(holder, "recorded what is no opening among hospitals")
            if self.confirmed is None or self.links.name not in among:
                continue
            known = self.confirmed.get(opening.transcript or "")
            if known is None or any(getattr(opening, each.name) != getattr(known, each.name) for each in fields(known)):
                raise _false(holder, f"recorded an opening ({opening.why}) that {self.links.name} has not confirmed")

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


def _contradiction(one: str, other: str) -> ProtocolError:
    fix = "compare the openings.jsonl of both; nothing was signed"
    return ProtocolError(f"{one} and {other} recorded different openings", fix)


def _false(name: str, what: str) -> SumLostError:
    return SumLostError(f"{name} {what}", f"{name} does not follow the protocol; the others go on", name)
