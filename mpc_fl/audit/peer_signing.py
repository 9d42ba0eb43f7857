"""Signing the reveal ledger without a leader: each party signs its own draft of a block, and all exchange their signatures.

After the openings of a round, each party with its own record of them (`PeerSigners.sign`):
  1. each party makes the block from what it recorded itself, signs it, writes down that it has, and tells all its signature and
     digests ("signed")
  2. each compares the digests of all; where they differ, it ends with the name of the party and the number of the opening. It
     checks every signature over its own draft. The block is complete then
  3. each tells all that it has the complete block ("complete"). Who has heard that from the quorum, itself among them, keeps it

Why step 3. Who keeps a block goes on from it, and may then be lost. The others must not sign another block of the same number:
so it is kept only when a quorum has it complete. Quorums are more than half of the hospitals, so whatever quorum goes on has
one that holds it, says so, and gives it to the others, which finish with step 3 before anything else is signed
(`federation.peer_attendance`). The argument is that of prepared certificates in Castro and Liskov (OSDI 1999), with signatures
of all in place of two thirds: here a block needs all its parties anyway. It holds while that one does not deny what it has.

A block counts as in `co_signing`: a quorum of hospitals among its parties, no opening left out that this party began.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from cryptography import x509

from mpc_fl.audit.co_signing import claim_of, disagreement
from mpc_fl.audit.ledger_audit import shortfalls
from mpc_fl.audit.ledger_file import RevealLedger, now
from mpc_fl.audit.opening_record import OPENINGS_FILE
from mpc_fl.audit.reveal_ledger import Block, Members, Signature, is_signed, sign_block, signature_from, to_json
from mpc_fl.errors import SAME_VERSION, PeerLostError, ProtocolError, SumLostError
from mpc_fl.links.links import Links

_COMPARE = f"nothing more is opened; compare {OPENINGS_FILE} at the parties"


@dataclass
class PeerSigners:
    """The parties that sign a block together, seen from one of them; all have them in the same order.

    `links` are those of a scope for this block, `certificates` those of all parties, checked. `drafted` is the block that this
    party has signed, `complete` the same with the signatures of all, whether it was kept or not.
    """

    ledger: RevealLedger
    links: Links
    parties: Sequence[str]
    quorum: int
    certificates: Mapping[str, x509.Certificate]
    drafted: Block | None = None
    complete: Block | None = None

    def sign(
        self, kind: str, about: str, values: Mapping[str, str] | None = None, members: Members | None = None
    ) -> Block:
        """Sign what was opened since the block before, and keep the block; arguments as `CoSigners.sign` has them.

        Raises `ProtocolError` naming the party whose record or signature differs, or for a block that would not count;
        `PeerLostError` when a party is lost or late, `SumLostError` when one gives up, which may be for another one's loss:
        then it may be `complete`, and is not kept.
        """
        links, others = self.links, [name for name in self.parties if name != self.links.name]
        draft = self.ledger.draft(kind, about, self.parties, values, members)
        for finding in shortfalls(self.ledger.chain, draft):
            raise ProtocolError(f"a block of the reveal ledger would not count: {finding.line}", "nothing was signed")
        own = sign_block(draft, self.ledger.identity, now())
        self.drafted = draft
        self.ledger.keep_unconfirmed(replace(draft, signatures=(own,)))
        self._say(others, "signed", {"claim": claim_of(draft), "signature": to_json(own)})
        received, deadline = dict[str, dict[str, Any]](), links.deadline()
        for name in others:
            received[name] = self.links.receive_object(name, "signed", deadline)
        claims = {links.name: claim_of(draft), **{name: said.get("claim") for name, said in received.items()}}
        difference = disagreement({name: claims[name] for name in self.parties})
        if difference is not None:
            others_say = [name for name in self.parties if claims[name] != claims[links.name]]
            raise ProtocolError(difference, _COMPARE, others_say[0] if len(others_say) == 1 else "")
        signatures = {links.name: own, **{name: self._checked(draft, name, said) for name, said in received.items()}}
        self.complete = replace(draft, signatures=tuple(signatures[name] for name in self.parties))
        return self.keep(self.complete, others)

    def keep(self, complete: Block, others: Sequence[str]) -> Block:
        """Step 3, with those `others` of its parties that are there: of a block that was completed now, or in an earlier attempt.

        Raises `PeerLostError` where fewer than the quorum say that they have it, `SumLostError` where nobody is known to be lost.
        """
        self.complete = complete
        self._say(others, "complete", {"signatures": [to_json(signature) for signature in complete.signatures]})
        self._await_complete(complete, others)
        self.ledger.add(complete, "those who signed it")
        return complete

    def _checked(self, draft: Block, name: str, said: Mapping[str, Any]) -> Signature:
        try:
            signature = signature_from(said.get("signature"))
        except ValueError:
            raise ProtocolError(f"{name} sent no signature of a block", SAME_VERSION, name) from None
        if not self._is_genuine(draft, name, signature):
            raise ProtocolError(f"{name} did not sign the block that it says it signed", _COMPARE, name)
        return signature

    def _is_genuine(self, draft: Block, name: str, signature: Signature) -> bool:
        certificate = self.certificates[name]
        return signature.party == name and is_signed(draft.content_digest(), signature, certificate, draft.version)

    def _await_complete(self, draft: Block, others: Sequence[str]) -> None:
        """Step 3. One that is lost here is missed only where the quorum is not there without it. Who gave up is not blamed."""
        have, deadline, missing = 1, self.links.deadline(), list[PeerLostError | SumLostError]()
        for name in others:
            try:
                said = self.links.receive_object(name, "complete", deadline)
            except (PeerLostError, SumLostError) as error:
                missing.append(error)
                continue
            self._require_same(draft, name, said)
            have += 1
        if have < self.quorum:
            few = SumLostError(
                f"fewer than {self.quorum} that signed '{draft.about}' are there", "see the logs of the others"
            )
            raise min([*missing, few], key=lambda error: isinstance(error, SumLostError))

    def _require_same(self, draft: Block, name: str, said: Mapping[str, Any]) -> None:
        """`name` has the same signatures. Raises `ProtocolError` naming who made two, or else who says what nobody signed."""
        assert self.complete is not None
        for mine, told in zip_longest(self.complete.signatures, _list(said.get("signatures"))[: len(self.parties)]):
            if told == to_json(mine):
                continue
            try:
                signature = signature_from(told)
            except ValueError:
                raise ProtocolError(f"{name} sent no signatures of a block", SAME_VERSION, name) from None
            if self._is_genuine(draft, mine.party, signature):
                who = f"{mine.party} gave one signature of a block to {self.links.name} and another to {name}"
                raise ProtocolError(who, _COMPARE)
            raise ProtocolError(f"{name} has another signature of a block than {mine.party} made", _COMPARE, name)

    def _say(self, names: Sequence[str], tag: str, value: dict[str, Any]) -> None:
        for name in names:
            with contextlib.suppress(PeerLostError):  # its loss is found where it is waited for
                self.links.send_object(name, tag, value)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
