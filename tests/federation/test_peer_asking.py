"""Asking to take part: whom a newcomer asks, and who answers."""

from __future__ import annotations

from pathlib import Path

from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.federation.peer_admission import Admission, Membership
from mpc_fl.federation.peer_announcements import Announced, Announcements
from mpc_fl.federation.peer_asking import Asking
from mpc_fl.federation.peer_certificates import Certificates
from mpc_fl.federation.peer_proposal import Proposals
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.in_memory import InMemoryNetwork
from mpc_fl.links.settings import Timeouts, Tolerance
from mpc_fl.roles import hospital_names
from mpc_fl.sharing.opening import SecretDomain
from tests.support.peer_sums import rules_of

NAMES = hospital_names(4)
FIRST, SECOND, THIRD, NEWCOMER = NAMES
MEMBERSHIP = Membership(tuple(NAMES[:3]), frozenset(NAMES[:3]))


def hospitals(directory: Path) -> dict[str, Asking]:
    """All linked, in this thread."""
    make_local_identities(NAMES, {name: directory / name for name in NAMES})
    network = InMemoryNetwork(NAMES, Agreement("test", "digest", "train"), Timeouts(60.0, 60.0))
    made = {name: network.links(name, Tolerance(frozenset(NAMES))) for name in NAMES}
    for links in made.values():
        links._open()
    found = dict[str, Asking]()
    for name, links in made.items():
        links._mailboxes.await_all_connected()
        identity = load_identity(directory / name, name)
        certificates = Certificates(
            links, identity, Announcements(links, Announced(identity, "test", [NEWCOMER]), None)
        )
        record = OpeningRecord(directory / f"{name}.jsonl", name)
        domain = SecretDomain(links, NAMES, record, signatory=Signatory(identity, certificates.known.get))
        rules, about_run = rules_of(FIRST, tuple(NAMES), 3), ("test", "digest")
        admission = Admission(domain, rules, about_run, "all", lambda certificate: True)
        subject = Proposals(domain, rules, about_run, admission).subject("asks", (-1, -1))
        found[name] = Asking(links.scoped("attendance"), subject, admission, certificates, lambda *_: None)
    return found


def exchange(of: dict[str, Asking]) -> None:
    for each in (*of.values(), *of.values()):  # all tell theirs, then all take what has come
        each.certificates.exchange()


def hear(of: dict[str, Asking], name: str, sender: str) -> None:
    """Take the next word of `sender` at `name`."""
    word = of[name].links.receive_object(sender, "word")
    of[name].take(sender, word, MEMBERSHIP)


def test_one_that_links_later_is_asked_too_and_once(tmp_path: Path) -> None:
    of = hospitals(tmp_path)
    exchange(of)
    newcomer = of[NEWCOMER]
    newcomer.ask([FIRST, SECOND], 0)
    for linked in ([FIRST, SECOND], [FIRST, SECOND, THIRD], [FIRST, SECOND, THIRD]):
        newcomer.ask_those_that_linked(linked, 0)
    for name in (FIRST, SECOND, THIRD):
        assert not newcomer.answered(MEMBERSHIP, MEMBERSHIP.members)
        hear(of, name, NEWCOMER)
        assert not of[name].links.waiting(NEWCOMER, "word")
        hear(of, NEWCOMER, name)
    assert newcomer.answered(MEMBERSHIP, MEMBERSHIP.members) and set(newcomer.votes) == set(MEMBERSHIP.members)
