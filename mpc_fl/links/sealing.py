"""Sealed chunks: what two parties send each other through a relay that must read nothing.

ChaCha20-Poly1305 (RFC 8439) under one key per direction, the nonce is the number of the chunk, sender and receiver are
authenticated with it. A relay can drop, delay or count chunks; a changed, replayed or reordered one ends the link.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from mpc_fl.errors import ProtocolError


class _Direction:
    """Key and chunk counter of one direction between two parties."""

    def __init__(self, key: bytes, sender: str, receiver: str) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._context = f"{sender}>{receiver}".encode()
        self._sender = sender
        self._count = 0

    def _nonce(self) -> bytes:
        nonce = self._count.to_bytes(12, "little")
        self._count += 1
        return nonce


class Sealer(_Direction):
    """The sender's end."""

    def seal(self, chunk: bytes) -> bytes:
        """Encrypt and authenticate the next chunk; 16 bytes longer than it."""
        return self._cipher.encrypt(self._nonce(), chunk, self._context)


class Unsealer(_Direction):
    """The receiver's end."""

    def unseal(self, sealed: bytes) -> bytes:
        """The chunk. Raises `ProtocolError` when it was changed, replayed, lost or reordered on the way."""
        try:
            return self._cipher.decrypt(self._nonce(), sealed, self._context)
        except InvalidTag:
            raise ProtocolError(
                f"a sealed chunk of {self._sender} was changed, replayed or reordered", "check the relay"
            ) from None
