"""Where hospitals that join a run among peers are reached: each announces it, signed, and others pass it on.

Founders have their addresses in the configuration, so a newcomer dials them. Of two newcomers the later one dials the other,
whose address it has from any member. One that can only dial out announces no address, but through which relays it is reached:
who has an address awaits it, others use those. An announcement holds the name, the address or the relays, since and until when it
counts, the certificate, and a signature for this session; so who passes it on can change nothing in it, and of two the newer
counts. A hospital renews its own when half of its time is over.

What an address cannot do: whoever is dialled there must show the certificate of that hospital, so a false one leads to nobody. What
goes through a relay is sealed for the holder of that certificate, too (`links.relayed_links`).
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mpc_fl.aggregation.transcript import digest_of
from mpc_fl.audit.ledger_file import now
from mpc_fl.config.config import Config, relays_of
from mpc_fl.config.deployment import is_address
from mpc_fl.crypto.certificates import CLOCK_SKEW, Identity, received_pem, verify_certificate
from mpc_fl.crypto.signatory import is_genuine, sign_statement, time_text
from mpc_fl.errors import IdentityError, PeerLostError, ProtocolError, printable
from mpc_fl.links.links import Links
from mpc_fl.links.party_links import joining_later

log = logging.getLogger(__name__)

_PURPOSE = "mpc-fl announcement of an address 2"
_TAG = "announcement"
_VALID = datetime.timedelta(days=1)
_APART = datetime.timedelta(seconds=10)  # of two announcements of one hospital: no start of one is so quick
_AT_ONCE = 16  # of one that speaks faster than it is heard
_LONGEST_ADDRESS, _LONGEST_THROUGH, _LONGEST_NAME = 260, 2000, 64


@dataclass(frozen=True)
class Announcement:
    """What a hospital says of where it is: its `address`, host:port, or "" and `through` which relays it is reached, with spaces
    between their names. Times are ISO 8601 in UTC, the certificate is PEM."""

    party: str
    address: str
    through: str
    since: str
    until: str
    certificate: str
    signature: str = ""

    def statement(self, session: str) -> bytes:
        """What is signed."""
        return digest_of([_PURPOSE, session, self.party, self.address, self.through, self.since, self.until]).encode(
            "ascii"
        )

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return f"at {self.address}" if self.address else f"through {', '.join(self.through.split())}"


@dataclass(frozen=True)
class Announced:
    """Whose announcements count in a run of this `session`: those of hospitals that join `later`, certified as `identity` is.

    They may be reached through these `relays`.
    """

    identity: Identity
    session: str
    later: Collection[str]
    relays: Collection[str] = ()

    def made(self, address: str, through: Sequence[str] = ()) -> Announcement:
        """This hospital's own, from now on."""
        certificate, moment = self.identity.certificate.decode("ascii"), now()
        until = time_text(moment + _VALID)
        own = Announcement(self.identity.name, address, " ".join(through), time_text(moment), until, certificate)
        signature = sign_statement(self.identity, _PURPOSE, own.statement(self.session))
        return Announcement(**{**asdict(own), "signature": signature})

    def checked(self, value: Mapping[str, Any], sender: str) -> Announcement:
        """An announcement that `sender` passed on. Raises `ProtocolError` naming it for one that does not count."""
        fields = {name: value.get(name) for name in Announcement.__dataclass_fields__}
        if not all(isinstance(field, str) for field in fields.values()):
            raise _refused(sender, "somebody", "it is none")
        said = Announcement(**fields)  # type: ignore[arg-type]
        party = printable(said.party, _LONGEST_NAME)
        if said.party not in self.later:
            raise _refused(sender, party, "that is no hospital that joins later")
        if not said.through and (
            len(said.address) > _LONGEST_ADDRESS or not said.address.isprintable() or not is_address(said.address)
        ):
            raise _refused(sender, party, "its address is not host:port")
        through = said.through[:_LONGEST_THROUGH].split()
        if said.through and (said.address or " ".join(through) != said.through or not {*through} <= {*self.relays}):
            raise _refused(sender, party, "it is not reached through relays of this run")
        try:
            certificate = verify_certificate(received_pem(said.certificate, said.party), said.party, self.identity)
        except IdentityError as error:
            raise _refused(sender, party, error.what) from None
        if not is_genuine(certificate, _PURPOSE, said.statement(self.session), said.signature):
            raise _refused(sender, party, "it did not sign that for this run")
        try:
            since, until = (datetime.datetime.fromisoformat(text) for text in (said.since, said.until))
            counts = since - CLOCK_SKEW <= now() < until <= since + _VALID
        except (ValueError, TypeError):  # no time, or one without a zone
            counts = False
        if not counts:
            raise _refused(sender, party, "it is not of now")
        return said


class Announcements:
    """Those that a hospital knows by name, its own among them where it announces an `address`, or `through` which relays it is."""

    def __init__(self, links: Links, announced: Announced, address: str | None, through: Sequence[str] = ()) -> None:
        self._links, self._announced, self._address, self._through = links, announced, address, through
        self._told: dict[
            tuple[str, str], tuple[str, str]
        ] = {}  # whom of whom: which start of it, and since when that counts
        self.known: dict[str, Announcement] = {}

    def exchange(self) -> None:
        """Take what has come, and tell all that are linked what they were not told yet."""
        self._renew()
        for name in self._links.peers:
            for _ in range(_AT_ONCE):
                if not self._links.waiting(name, _TAG):
                    break
                try:
                    self._take(self._announced.checked(self._links.receive_object(name, _TAG), name))
                except ProtocolError as error:
                    log.warning("%s", error)
        for name in self._links.peers:
            if self._links.alive(name):
                self._tell(name)

    def _renew(self) -> None:
        own = self.known.get(self._links.name)
        if (self._address is None and not self._through) or (
            own is not None and now() < datetime.datetime.fromisoformat(own.since) + _VALID / 2
        ):
            return
        self.known[self._links.name] = self._announced.made(self._address or "", self._through)

    def _take(self, said: Announcement) -> None:
        before = self.known.get(said.party)
        if said.party == self._links.name or (before is not None and not _is_newer(said, before)):
            return
        self.known[said.party] = said
        log.info("%s announces that it is reached %s", said.party, said.place)
        if said.address:
            self._links.learn_address(said.party, said.address)
        else:
            self._links.learn_relays(said.party, said.through.split())

    def _tell(self, name: str) -> None:
        for party, said in self.known.items():
            told = self._links.key_fingerprint(name), said.since
            if party == name or self._told.get((name, party)) == told:
                continue
            self._told[name, party] = told
            try:
                self._links.send_object(name, _TAG, asdict(said))
            except PeerLostError as error:
                log.warning("%s", error)


def _is_newer(said: Announcement, before: Announcement) -> bool:
    """By enough that one which announces without end does not keep all others busy passing that on."""
    since, known = (datetime.datetime.fromisoformat(each.since) for each in (said, before))
    return since - known >= _APART


def own_announcements(config: Config, links: Links, identity: Identity) -> Announcements:
    """Those of a run, with what this hospital says of itself where no configuration of the others does."""
    later = joining_later(config)
    announced = Announced(identity, config.federation.session, later, relays_of(config))
    if links.name not in later or links.name in (*config.federation.addresses, *config.federation.dial_out_only):
        return Announcements(links, announced, None)
    return Announcements(links, announced, config.site.address, config.site.reached_through)


def _refused(sender: str, party: str, why: str) -> ProtocolError:
    return ProtocolError(
        f"{sender} passed on an announcement of {party} that does not count: {why}", f"see the log of {sender}"
    )
