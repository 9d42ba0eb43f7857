"""Sealed chunks and words: what two parties send each other through relays that must read nothing.

ChaCha20-Poly1305 (RFC 8439) under one key per direction. The nonce is a number that comes along in the clear: chunks of frames
are counted from 0, words about them (`sealed_stream`) from 2^63. Sender and receiver are authenticated with it. So a chunk may
come twice, late, or by another way, and is what it was; a changed one, or one of another link, does not open.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from mpc_fl.errors import ProtocolError

WORDS = 1 << 63  # the number of the first word
LONGEST_WORD = 512  # bytes, sealed
_NUMBER_BYTES, _NONCE_BYTES = 8, 12


class _Direction:
    """Key and context of one direction between two parties."""

    def __init__(self, key: bytes, sender: str, receiver: str) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._context = f"{sender}>{receiver}".encode()
        self._sender = sender


class Sealer(_Direction):
    """The sender's end. `chunks`: how many it has sealed."""

    def __init__(self, key: bytes, sender: str, receiver: str) -> None:
        super().__init__(key, sender, receiver)
        self.chunks = self._words = 0

    def seal(self, chunk: bytes) -> bytes:
        """Encrypt and authenticate the next chunk; 24 bytes longer than it."""
        self.chunks += 1
        return self._sealed(self.chunks - 1, chunk)

    def seal_word(self, word: bytes) -> bytes:
        """The same for the next word."""
        self._words += 1
        return self._sealed(WORDS + self._words - 1, word)

    def _sealed(self, number: int, text: bytes) -> bytes:
        head = number.to_bytes(_NUMBER_BYTES, "little")
        return head + self._cipher.encrypt(head.ljust(_NONCE_BYTES, b"\0"), text, self._context)


class Unsealer(_Direction):
    """The receiver's end."""

    def number_of(self, sealed: bytes) -> int:
        """The number that a chunk or word comes with; it counts once that is unsealed."""
        return int.from_bytes(sealed[:_NUMBER_BYTES], "little")

    def begins(self, sealed: bytes) -> bool:
        """Whether it is a word of this link, or its first chunk: one of these comes first."""
        number = self.number_of(sealed)
        if number and not (number >= WORDS and len(sealed) <= LONGEST_WORD):
            return False
        try:
            self.unseal(sealed)
        except ProtocolError:
            return False
        return True

    def unseal(self, sealed: bytes) -> bytes:
        """The chunk or word. Raises `ProtocolError` when it was changed on the way, or is none of this link."""
        head, text = sealed[:_NUMBER_BYTES], sealed[_NUMBER_BYTES:]
        try:
            return self._cipher.decrypt(head.ljust(_NONCE_BYTES, b"\0"), text, self._context)
        except InvalidTag:
            raise ProtocolError(f"a sealed chunk of {self._sender} was changed", "check the relay") from None
