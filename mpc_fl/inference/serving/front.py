"""One address for many sessions: a party that stays up admits a hospital's session, with links and a thread of its own.

A session's name begins with its hospital's: 'hospital-2/<32 hex digits>', or 'hospital-2/fill-<32 hex digits>' where it fills
the hospital's pool (`visits.Visit`); the digits are fresh. Whoever dials greets with it;
the greeting is checked (certificate, signature, name, version, what is agreed on) before anything is set up, then passed to the
session's links. So one port serves all, a session's keys are its own (fresh X25519 keys, bound to its name), and a session
that fails ends alone: its links have its hospital as peer and no other.

Threads, not processes: a process per session would load torch (2 s) and hold the network once more (ResNet18: 0.3 GB); the
arithmetic leaves Python's lock. What is lost is containment: a crash of the interpreter ends all sessions.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Protocol

from mpc_fl.crypto.certificates import Identity
from mpc_fl.errors import HandshakeError, MpcFlError, PeerLostError, RefusedError, StorageError
from mpc_fl.inference.serving.quota import SessionRate
from mpc_fl.inference.serving.visits import TASK, Visit
from mpc_fl.links.conversation import Conversation
from mpc_fl.links.frames import FrameReader
from mpc_fl.links.greetings import first_greeting
from mpc_fl.links.handshake import Agreement, check_greeting
from mpc_fl.links.links import Links
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.settings import LONGEST_GREETING
from mpc_fl.links.stream_server import StreamServer

log = logging.getLogger(__name__)

_STREAMS_PER_SESSION, _SPARE_STREAMS = 4, 16
_PURPOSES = 2


class Service(Protocol):
    """What a party does for the sessions that it admits."""

    def make_links(self, visit: Visit, agreement: Agreement) -> NetworkLinks:
        """The links of a new session, from what it is for and what its parties agree on; may raise `RefusedError`."""

    def serve(self, links: Links, visit: Visit) -> object:
        """The session itself, on its thread: with its links, for its hospital."""


@dataclass(frozen=True)
class StandingParty:
    """Who serves: its identity, the address it listens on, and the digest of what a hospital must agree with it on."""

    identity: Identity
    listen: str
    digest: str


@dataclass(frozen=True)
class Admission:
    """Who is admitted: hospitals, and `partners` that may greet in a hospital's session.

    At most `sessions` at once for diagnoses and as many to fill pools, one of each hospital, as often as `rate` allows.
    """

    partners: frozenset[str]
    sessions: int
    rate: SessionRate


@dataclass
class _Session:
    visit: Visit
    links: NetworkLinks
    thread: threading.Thread
    ended: bool = False


class ServiceFront:
    """Does `service` at the address of `party` while the block lasts; at its end sessions that go on are told, and ended.

    Raises `LinkError` when the address cannot be listened on.
    """

    def __init__(self, party: StandingParty, admission: Admission, service: Service) -> None:
        self._party, self._identity, self._admission, self._service = party, party.identity, admission, service
        self._sessions: dict[str, _Session] = {}
        self._guard, self._closing = threading.Lock(), False
        self._away: set[str] = set()  # parties that all sessions need and that the last one did without

    def __enter__(self) -> ServiceFront:
        streams = _STREAMS_PER_SESSION * _PURPOSES * self._admission.sessions + _SPARE_STREAMS
        self._server = StreamServer(self._identity, self._party.listen, self._admit, streams, LONGEST_GREETING)
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        shut_down = MpcFlError(f"{self._identity.name} is being shut down")
        self.close(2.5, error if isinstance(error, MpcFlError) else shut_down)

    def close(self, seconds: float, why: MpcFlError) -> None:
        """End all sessions within about `seconds`, their peers knowing why, and free the address."""
        with self._guard:
            self._closing = True
            sessions = list(self._sessions.values())
        for session in sessions:
            session.links.interrupt(why)
        deadline = time.monotonic() + seconds
        for session in sessions:
            session.thread.join(max(0.0, deadline - time.monotonic()))
        self._server.stop()

    def _admit(self, names: set[str], chunk: bytes) -> Conversation:
        greeting = first_greeting(FrameReader(greetings_only=True), names, chunk)
        name, visit = greeting["name"], Visit.of_session(str(greeting.get("session")))
        if visit is None:
            raise HandshakeError(f"{self._identity.name} serves: it takes no part in other runs")
        if name != visit.hospital and name not in self._admission.partners:
            raise HandshakeError(f"{name} takes no part in a session of {visit.hospital}")
        agreement = Agreement(greeting["session"], self._party.digest, TASK)
        check_greeting(greeting, name, self._identity, agreement)
        with self._guard:
            session = self._sessions.get(agreement.session) or self._begin(visit, agreement)
            if session.ended:
                raise HandshakeError("this session has ended")
        return session.links.admit(names, chunk)

    def _begin(self, visit: Visit, agreement: Agreement) -> _Session:
        if self._closing:
            raise RefusedError(f"{self._identity.name} is being shut down", "come back later")
        going_on = [session.visit for session in self._sessions.values() if not session.ended]
        alike = [other for other in going_on if other.purpose == visit.purpose]
        if visit in alike:
            raise RefusedError(f"a session of {visit} goes on already", "come back when it has ended")
        if len(alike) >= self._admission.sessions:
            raise RefusedError(f"{len(alike)} hospitals are being served", "come back in a minute")
        try:
            links = self._service.make_links(visit, agreement)
            self._admission.rate.begin(visit.hospital)  # what was refused before costs a greeting, no session
        except StorageError as error:
            log.error("no session of %s can begin: %s", visit, error)
            raise RefusedError(f"{self._identity.name}: {error.for_peers}", "come back later") from None
        thread = threading.Thread(target=self._run, args=(agreement.session,), name=agreement.session, daemon=True)
        self._sessions[agreement.session] = session = _Session(visit, links, thread)
        thread.start()
        return session

    def _run(self, name: str) -> None:
        with self._guard:  # whoever began it has then put it on the list
            session = self._sessions[name]
        log.info("a session of %s begins (%s)", session.visit, name)
        try:
            with session.links:
                self._all_there(session)
                try:
                    self._service.serve(session.links, session.visit)
                finally:
                    session.ended = True  # before taking leave: the hospital may come back as soon as it knows
            log.info("the session of %s has ended (%s)", session.visit, name)
        except MpcFlError as error:
            log.warning("the session of %s ended (%s): %s", session.visit, name, error)
            self._miss(session, error)
        except Exception as error:  # noqa: BLE001 - a defect in one session must not end others; its message could be secret
            log.error("the session of %s ended (%s): unexpected %s", session.visit, name, type(error).__name__)
        finally:
            with self._guard:
                session.ended = True
                del self._sessions[name]

    def _all_there(self, session: _Session) -> None:
        with self._guard:
            back = self._away.intersection(session.links.peers)
            self._away -= back
        for name in back:
            log.warning("%s is back", name)

    def _miss(self, session: _Session, error: MpcFlError) -> None:
        """Say it when what ended a session will end those to come, too: the party that none can do without is gone."""
        if not isinstance(error, PeerLostError):
            return
        away = error.peer
        if away == session.visit.hospital:
            # The hospital may have given up first whoever did not come; it is believed of one that has not come here, either.
            away = error.cause
            if away not in session.links.peers or session.links.came(away):
                return
        with self._guard:
            new = away not in self._away
            self._away.add(away)
        if new:
            log.error("%s is away: no session can be served until it is back (%s)", away, error.what)
