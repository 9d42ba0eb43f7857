"""Certificates of the hospitals of a run among peers, each from its holder: told to every start of another one.

A hospital says its certificate before it says anything else, so what comes after it can be checked. Whoever links later, or comes
back, does the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography import x509

from mpc_fl.crypto.certificates import Identity, received_pem, verify_certificate
from mpc_fl.errors import IdentityError, PeerLostError, ProtocolError
from mpc_fl.federation.peer_announcements import Announcements
from mpc_fl.links.links import Links

log = logging.getLogger(__name__)

_TAG = "certificate"
_AT_ONCE = 16  # of one that speaks faster than it is heard


class Certificates:
    """`known` are those that this hospital has checked, by name, its own with them. Raises `IdentityError` for an unsound own."""

    def __init__(self, links: Links, identity: Identity, announcements: Announcements) -> None:
        self._links, self._identity, self._announcements = links, identity, announcements
        self._own = identity.certificate.decode("ascii")
        self._told: set[tuple[str, str]] = set()
        self._shown: dict[str, tuple[tuple[str, str], x509.Certificate]] = {}  # by name: which start showed which one
        self.known: dict[str, x509.Certificate] = {
            links.name: verify_certificate(identity.certificate, links.name, identity)
        }

    def exchange(self) -> None:
        """Tell those that are linked, and were not told yet, and take what has come. One that is not sound is no certificate.

        With certificates go announcements of where hospitals are.
        """
        for name in self._links.peers:
            start = name, self._links.key_fingerprint(name)
            if self._links.alive(name) and start not in self._told:
                self._told.add(start)
                try:
                    self._links.send_object(name, _TAG, {"certificate": self._own})
                except PeerLostError as error:
                    log.warning("%s", error)
            for _ in range(_AT_ONCE):
                if not self._links.waiting(name, _TAG):
                    break
                try:
                    self._take(start, self._links.receive_object(name, _TAG))
                except IdentityError as error:
                    log.warning("%s", error)
                except ProtocolError as error:
                    log.warning("%s", error)
        self._announcements.exchange()

    def has_told(self, name: str) -> bool:
        """Whether this start of a hospital was sent the certificate, so that it can check what it hears next."""
        return (name, self._links.key_fingerprint(name)) in self._told

    def _take(self, start: tuple[str, str], said: Mapping[str, Any]) -> None:
        """What a start of a hospital shows. It has one certificate: with another one its words would seem to be somebody else's
        to whoever has heard of the first. Raises `IdentityError` for one that is not sound."""
        name, _ = start
        shown = verify_certificate(received_pem(said.get("certificate"), name), name, self._identity)
        before = self._shown.get(name)
        if before is not None and before[0] == start and before[1] != shown:
            raise IdentityError(f"{name} shows another certificate than it began with, which does not count")
        self.known[name], self._shown[name] = shown, (start, shown)

    def await_those(self, names: Sequence[str], seconds: float) -> None:
        """Wait for those of these that are linked: what they say can be checked then. One that gives none is done without."""
        until = time.monotonic() + seconds
        while True:
            self.exchange()
            missing = [name for name in names if self._links.alive(name) and name not in self.known]
            if (
                not missing
                or time.monotonic() >= until
                or self._links.await_any(dict.fromkeys(missing, _TAG), until) is None
            ):
                break
        for name in missing:
            log.warning("%s gave no certificate that counts within %g s", name, seconds)
