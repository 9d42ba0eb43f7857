"""The keys of this start of a party: its own X25519 key, its peers' public keys, and the seeds that pairs share."""

from __future__ import annotations

import hashlib
import threading

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import LinkError, SecrecyError
from mpc_fl.links.handshake import Agreement, pairwise_key


class PairwiseKeys:
    """One fresh key pair and what follows from it with each peer's. Its lock is held for itself alone."""

    def __init__(self, name: str, agreement: Agreement) -> None:
        self.name = name
        self._agreement = agreement
        self._own = X25519PrivateKey.generate()
        self._lock = threading.Lock()
        self._peers: dict[str, bytes] = {}
        self._seeds_given: set[tuple[str, bytes, str]] = set()

    @property
    def public_key(self) -> bytes:
        """This party's X25519 public key, 32 bytes."""
        return self._own.public_key().public_bytes_raw()

    @property
    def session(self) -> str:
        """The session that these keys are for."""
        return self._agreement.session

    def learn(self, peer: str, public_key: bytes) -> None:
        """Keep a peer's public key, checked by the caller; one that came back has another."""
        with self._lock:
            self._peers[peer] = public_key

    def fingerprint(self, party: str) -> str:
        """SHA-256 of the public key of this party or of a peer, as hex; empty for a peer that was never connected."""
        with self._lock:
            key = self.public_key if party == self.name else self._peers.get(party)
        return "" if key is None else hashlib.sha256(key).hexdigest()

    def is_of(self, peer: str, public_key: bytes) -> bool:
        """Whether this is the key of the start of `peer` that was connected last."""
        with self._lock:
            return self._peers.get(peer) == public_key

    def sealing_key(self, peer: str, public_key: bytes, sender: str, receiver: str, greetings: str) -> bytes:
        """32 secret bytes for the sealed chunks of one direction between this party and `peer`.

        `greetings` says which two made the link: a link made anew counts its chunks from zero, under a key of its own.
        """
        purpose = f"sealed {sender}>{receiver} {greetings}"
        return pairwise_key(self._own, public_key, (self.name, peer), self._agreement, purpose)

    def seed(self, peer: str, purpose: str) -> Seed:
        """A seed for `purpose` that only this party and `peer` know.

        Raises `LinkError` before the peer has been connected, `SecrecyError` when the seed was given before.
        """
        with self._lock:
            public_key = self._peers.get(peer)
            if public_key is None:
                raise LinkError(f"{peer} is not connected", "connect before deriving secrets")
            if (peer, public_key, purpose) in self._seeds_given:
                raise SecrecyError(f"the seed with {peer} for '{purpose}' was asked for twice: its values would repeat")
            self._seeds_given.add((peer, public_key, purpose))
        return Seed(pairwise_key(self._own, public_key, (self.name, peer), self._agreement, purpose))
