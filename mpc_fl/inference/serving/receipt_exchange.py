"""How both sides of a served session sign what it has come to, batch by batch, and the dealer its count.

Protocol. S is the model owner, C the hospital, D the dealer; r_k is the k-th `Receipt` of the session.
  0. S tells C what it reveals, the digest of its public network, its commitment to the weights, and its certificate; C answers
     with its own. C ends the session here when its configuration asks for something else, or the network that follows is another
  per batch, when it is ready and before anything about its images is sent (`fast.online`, steps 2 and 3):
  1. D signs how many batches it has made in this session and tells both, with its corrections; nothing for a pool's batch
  2. S makes r_k from r_(k-1): the images that it has charged, the openings so far, the time. It signs r_k and sends it before it
     says that the batch is ready
  3. C makes r_k itself, from what it asked and what was opened to it. Unless S's is the same and signed, C goes no further. It
     keeps r_k with both signatures, then signs it and sends its signature
  4. S serves C's next step, the evaluation of this batch too, only when it has that signature; then it keeps r_k as well
  and when C is done:
  5. steps 2 to 4 once more, for a closing receipt with all openings

Security. Against a side that deviates: nothing is opened about an image that is not on a receipt signed by both, and neither is
bound by what it did not count itself. Whoever refuses to sign is served no further, or asked nothing more, and named; that it
stops after step 3 shows it nothing. The closing receipt binds nobody to more, so its lack is only logged. What is on a receipt is
counts, digests of public descriptions, and the time of step 2, which is before the image is used: no message here depends on it.
S is not proven to evaluate the weights that it committed to.

Rounds and bytes. No waiting: messages go along with those of the session. About 1 kB from S and 0.2 kB from C per batch, 1.3 kB
from D to each. A session that asks nothing leaves no receipt.
"""

from __future__ import annotations

import datetime
import logging
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from mpc_fl.audit.opening_record import Opening, Record
from mpc_fl.audit.receipt_file import ReceiptFile
from mpc_fl.audit.receipts import (
    NOTHING,
    DealerCount,
    Receipt,
    count_from,
    fingerprint_of,
    is_signed,
    opened_with,
    receipt_from,
    sign_count,
    sign_receipt,
)
from mpc_fl.crypto.certificates import CLOCK_SKEW, Identity, received_pem, verify_certificate
from mpc_fl.crypto.signatory import time_text
from mpc_fl.errors import SAME_VERSION, MpcFlError, PeerLostError, ProtocolError, RefusedError
from mpc_fl.inference.fast.network import Reveal
from mpc_fl.links.links import Links
from mpc_fl.roles import DEALER, MODEL_OWNER

log = logging.getLogger(__name__)

TERMS, RECEIPT, COUNT = "terms", "receipt", "dealer count"  # tags of messages
_CLOSING = 10.0  # seconds that a party waits for the other's part of a closing receipt


@dataclass(frozen=True)
class ServedTerms:
    """What a model owner says when a session begins: what it reveals, digests of its public network and of its weights."""

    reveal: Reveal
    network: str
    commitment: str


class CountedRecord:
    """A record of openings that also has number and digest of those of one session, `opened`."""

    def __init__(self, record: Record) -> None:
        self._record, self.opened = record, (0, NOTHING)

    def append(self, opening: Opening) -> object:
        """Write it, and count it."""
        self.opened = opened_with(self.opened, opening)
        return self._record.append(opening)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _is_current(text: str) -> bool:
    return abs(datetime.datetime.fromisoformat(text) - _now()) <= CLOCK_SKEW


class _Side:
    """What both sides keep: the last receipt that both signed, certificates by name, and the dealer's count."""

    def __init__(self, links: Links, identity: Identity, file: ReceiptFile, record: Record) -> None:
        self._links, self._identity, self._file = links, identity, file
        self.record = CountedRecord(record)
        self._last: Receipt | None = None
        self._certificates = {identity.name: identity.certificate}
        self._count: DealerCount | None = None
        self._count_signature = ""

    @property
    def _so_far(self) -> Receipt:
        if self._last is None:
            raise ProtocolError("a session went on before its terms were told", SAME_VERSION)
        return self._last

    def _learn(self, name: str, message: dict[str, Any]) -> None:
        """The certificate that a party signs with. Raises `IdentityError` when it is not this party's."""
        text = received_pem(message.get("certificate"), name)
        verify_certificate(text, name, self._identity)
        self._certificates[name] = text

    def _begin(self, terms: ServedTerms, hospital: str) -> None:
        mine, owner = (fingerprint_of(self._certificates[name]) for name in (hospital, MODEL_OWNER))
        self._last = Receipt(self._links.session, 0, mine, owner, terms.reveal, terms.network, terms.commitment)

    def _signed_by(self, name: str, what: Receipt | DealerCount, signature: object) -> bool:
        certificate = verify_certificate(self._certificates[name], name, self._identity)
        return is_signed(what, signature, certificate)

    def _take_count(self, images: int) -> None:
        """Step 1: the dealer's word about one batch more, of `images` unless that is 0."""
        message = self._links.receive_object(DEALER, COUNT)
        if DEALER not in self._certificates:
            self._learn(DEALER, message)
        before = self._count or DealerCount(self._so_far.session, 0, 0, self._so_far.network, "", "")
        try:
            count = count_from(message.get("count"))
        except ValueError:
            raise ProtocolError("the dealer sent something else than its count of batches", SAME_VERSION) from None
        records = before.records + images if images else max(count.records, before.records + 1)
        certificate = fingerprint_of(self._certificates[DEALER])
        due = DealerCount(before.session, before.batches + 1, records, before.network, certificate, count.time)
        signature = message.get("signature")
        if count != due or not _is_current(count.time) or not self._signed_by(DEALER, count, signature):
            raise ProtocolError("the dealer did not sign how many batches it has made", "compare clocks and versions")
        self._count, self._count_signature = count, str(signature)

    def _keep(self, receipt: Receipt, signatures: dict[str, str]) -> None:
        if self._count is not None:
            signatures = {**signatures, DEALER: self._count_signature}
        self._file.keep(receipt, self._count, signatures, self._certificates)


class OwnerReceipts(_Side):
    """S's side. `record` is the session's record of openings; `meet` comes first, then what the gate of batches tells."""

    def __init__(self, links: Links, hospital: str, identity: Identity, file: ReceiptFile, record: Record) -> None:
        super().__init__(links, identity, file, record)
        self._hospital = hospital
        self._proposed: tuple[Receipt, str] | None = None

    def meet(self, terms: ServedTerms) -> None:
        """Step 0. Raises `IdentityError`, `PeerLostError`."""
        links, hospital = self._links, self._hospital
        links.send_object(hospital, TERMS, {**asdict(terms), "certificate": self._identity.certificate.decode("ascii")})
        self._learn(hospital, links.receive_object(hospital, TERMS))
        self._begin(terms, hospital)

    def ready(self, images: int, dealt: bool) -> None:
        """Steps 1 and 2 for a batch of `images` that the dealer made or not; 0 images: it was stored."""
        if dealt:
            if not self._links.waiting(DEALER, COUNT):  # it comes before the corrections, and these are here
                raise ProtocolError("the dealer did not sign how many batches it has made", SAME_VERSION)
            self._take_count(images)
        self._propose(self._so_far.after_batch(images, dealt, self.record.opened))

    def _propose(self, receipt: Receipt) -> None:
        receipt = replace(receipt, time=time_text(_now()))
        signature = sign_receipt(receipt, self._identity)
        self._proposed = receipt, signature
        self._links.send_object(self._hospital, RECEIPT, {"receipt": asdict(receipt), "signature": signature})

    def require_signed(self, deadline: float | None = None) -> None:
        """Step 4. Raises `RefusedError` when the hospital asks for more and did not sign; with a deadline it may still."""
        if self._proposed is None:
            return
        receipt, mine = self._proposed
        # Its signature comes before its next step, on one link: what is not here by now was not sent.
        here = deadline is not None or self._links.waiting(self._hospital, RECEIPT)
        theirs = self._links.receive_object(self._hospital, RECEIPT, deadline).get("signature") if here else None
        if not self._signed_by(self._hospital, receipt, theirs):
            raise RefusedError(
                f"{self._hospital} did not sign receipt {receipt.number} of this session, so it is served no further",
                SAME_VERSION,
            )
        self._proposed, self._last = None, receipt
        self._keep(receipt, {self._hospital: str(theirs), MODEL_OWNER: mine})

    def close(self) -> None:
        """Step 5, where something was asked."""
        self.require_signed()
        if self._so_far.number == 0:
            return
        try:
            self._propose(self._so_far.closed(self.record.opened))
            self.require_signed(time.monotonic() + _CLOSING)
        except (PeerLostError, RefusedError) as error:
            log.warning("the last receipt of a session stays without the openings of its end: %s", error)


class HospitalReceipts(_Side):
    """C's side. `record` is the session's record of openings; `meet` comes first, then `require_network`."""

    def meet(self, wanted: Reveal | None) -> Reveal:
        """Step 0: what the model owner reveals. Raises `RefusedError` where that is not what is `wanted` (None: any)."""
        links = self._links
        message = links.receive_object(MODEL_OWNER, TERMS)
        self._learn(MODEL_OWNER, message)
        links.send_object(MODEL_OWNER, TERMS, {"certificate": self._identity.certificate.decode("ascii")})
        said = [message.get(name) for name in ("reveal", "network", "commitment")]
        if said[0] not in ("label", "logits") or not all(
            isinstance(text, str) and len(text) == 64 for text in said[1:]
        ):
            raise ProtocolError(f"{MODEL_OWNER} did not say what it reveals, and of which network", SAME_VERSION)
        terms = ServedTerms(*cast("tuple[Reveal, str, str]", said))
        require_wanted(wanted, terms.reveal)
        self._begin(terms, links.name)
        return terms.reveal

    def require_network(self, digest: str) -> None:
        """Raises `ProtocolError` unless the public network is the one that receipts will name."""
        if self._so_far.network != digest:
            raise ProtocolError(f"{MODEL_OWNER} named another network than it sent", "ask its owner; do not go on")

    def ready(self, images: int, dealt: bool) -> None:
        """Steps 1 and 3 for a batch of `images`, made by the dealer or not; 0 images: it was stored.

        Raises `ProtocolError` when the model owner did not sign what this hospital counted: nothing more is sent then.
        """
        if dealt:
            self._take_count(images)
        if not self._links.waiting(MODEL_OWNER, RECEIPT):  # it comes before the word that the batch is ready
            raise self._refusal("did not sign", self._so_far.number + 1)
        self._sign(self._so_far.after_batch(images, dealt, self.record.opened), None)

    def finish(self) -> None:
        """Step 5, where something was asked."""
        if self._so_far.number == 0:
            return
        try:
            self._sign(self._so_far.closed(self.record.opened), time.monotonic() + _CLOSING)
        except (PeerLostError, ProtocolError) as error:
            log.warning("the last receipt of a session stays without the openings of its end: %s", error)

    def _sign(self, due: Receipt, deadline: float | None) -> None:
        message = self._links.receive_object(MODEL_OWNER, RECEIPT, deadline)
        try:
            receipt = receipt_from(message.get("receipt"))
        except ValueError:
            raise self._refusal("sent something else than", due.number) from None
        if receipt != replace(due, time=receipt.time):
            raise self._refusal("counts otherwise in", due.number)
        if not _is_current(receipt.time):
            raise self._refusal(f"gave a time far from this clock ({receipt.time}) in", due.number)
        signature = message.get("signature")
        if not self._signed_by(MODEL_OWNER, receipt, signature):
            raise self._refusal("did not sign", due.number)
        mine = sign_receipt(receipt, self._identity)
        self._keep(receipt, {self._links.name: mine, MODEL_OWNER: str(signature)})
        self._last = receipt
        self._links.send_object(MODEL_OWNER, RECEIPT, {"signature": mine})

    def _refusal(self, what: str, number: int) -> MpcFlError:
        return ProtocolError(
            f"{MODEL_OWNER} {what} receipt {number} of this session, so nothing more is sent to it", "ask its owner"
        )


def require_wanted(wanted: Reveal | None, offered: Reveal) -> None:
    """Raise `RefusedError` when a hospital is configured to ask for something else than a model owner reveals."""
    if wanted not in (None, offered):
        alone = "the label alone" if offered == "label" else "logits"
        raise RefusedError(
            f"{MODEL_OWNER} reveals {alone}, and inference.reveal={wanted} asks for something else",
            f"leave inference.reveal out, or set it to {offered}",
        )


class DealerReceipts:
    """D's side: it counts the batches of one session."""

    def __init__(self, links: Links, hospital: str, identity: Identity, file: ReceiptFile) -> None:
        self._links, self._identity, self._file = links, identity, file
        self._receivers, self._batches, self._records = (hospital, MODEL_OWNER), 0, 0

    def made(self, network: str, records: int) -> None:
        """Step 1, before the corrections of a batch of `records` leave."""
        self._batches, self._records = self._batches + 1, self._records + records
        certificate = self._identity.certificate
        count = DealerCount(
            self._links.session, self._batches, self._records, network, fingerprint_of(certificate), time_text(_now())
        )
        signature = sign_count(count, self._identity)
        self._file.keep(None, count, {DEALER: signature}, {DEALER: certificate})
        message = {"count": asdict(count), "signature": signature, "certificate": certificate.decode("ascii")}
        for name in self._receivers:
            self._links.send_object(name, COUNT, message)
