"""Words that every hospital says to all others, signed, so that whoever says two different things is known to all.

A hospital signs what it says (`say_signed`); each of the others checks that (`heard`) and repeats in its own next word what
it has heard from whom, digest and signature (`repeated`). Whoever compares this with what it heard itself
(`require_one_version`) finds one who said two things, by two signatures, or one who repeats what was never said.
All that is said is public: hashes, numbers and names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpc_fl.aggregation.transcript import digest_of, signatory_of
from mpc_fl.aggregation.words import say
from mpc_fl.errors import SAME_VERSION_AND_CONFIGURATION, ProtocolError
from mpc_fl.links.links import Links
from mpc_fl.sharing.opening import SecretDomain

_PURPOSE = "mpc-fl word to all 1"
_UNSIGNED = ("word", "signature")
DEVIATES = "it does not follow the protocol; nothing of this sum was opened"


@dataclass(frozen=True)
class Signed:
    """What a hospital said, as its digest (hex), and its signature (hex) over that."""

    digest: str
    signature: str


NOTHING_SAID = Signed("", "")


@dataclass(frozen=True)
class Subject:
    """What a word is about: `bound` is the digest of all that its signers agree on already, `word` the word, once for each."""

    bound: str
    word: str

    def statement(self, hospital: str, digest: str) -> bytes:
        """What a hospital signs that says this."""
        return digest_of([_PURPOSE, self.bound, self.word, hospital, digest]).encode("ascii")


def say_signed(
    domain: SecretDomain, links: Links, names: Sequence[str], subject: Subject, values: Mapping[str, Any]
) -> Signed:
    """Say `values` (of JSON's types) to all of `names`, signed; who is lost is told nothing."""
    digest = digest_of(values)
    signature = signatory_of(domain).sign(_PURPOSE, subject.statement(links.name, digest))
    say(links, names, subject.word, **values, signature=signature)
    return Signed(digest, signature)


def heard(domain: SecretDomain, hospital: str, subject: Subject, word: Mapping[str, Any]) -> Signed:
    """What a hospital said. Raises `ProtocolError` naming it when it has not signed this about the subject."""
    try:
        digest = digest_of({name: value for name, value in word.items() if name not in _UNSIGNED})
    except ValueError:  # a number that is none has no digest
        digest = ""
    signed = Signed(digest, str(word.get("signature")))
    if not digest or not _is_genuine(domain, hospital, subject, signed):
        raise ProtocolError(
            f"{hospital} did not sign what it said ('{subject.word}'), or of another sum than {domain.links.name} is in: its "
            "hospitals, keys, model, weights or rules differ",
            SAME_VERSION_AND_CONFIGURATION,
            hospital,
        )
    return signed


def has_said(
    domain: SecretDomain, hospital: str, subject: Subject, values: Mapping[str, Any], signature: object
) -> bool:
    """Whether a hospital said these values about the subject, to whomever, and signed it so (hex)."""
    return _is_genuine(domain, hospital, subject, Signed(digest_of(values), str(signature)))


def repeated(said: Mapping[str, Signed]) -> dict[str, list[str]]:
    """What this hospital has heard, for its next word."""
    return {name: [signed.digest, signed.signature] for name, signed in said.items()}


def require_one_version(
    domain: SecretDomain, hospital: str, subject: Subject, mine: Mapping[str, Signed], told: object
) -> None:
    """`told` is what `hospital` repeats, `mine` what this one has heard. Raises `ProtocolError` naming who deviates.

    That is whoever signed two versions; or `hospital`, when it repeats what nobody signed, or not all.
    """
    for name, signed in mine.items():
        entry = told.get(name) if isinstance(told, dict) else None
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise ProtocolError(f"{hospital} does not repeat what {name} said ('{subject.word}')", DEVIATES, hospital)
        if entry[0] == signed.digest:
            continue
        if not _is_genuine(domain, name, subject, Signed(entry[0], entry[1])):
            raise ProtocolError(f"{hospital} repeats what {name} never signed ('{subject.word}')", DEVIATES, hospital)
        raise ProtocolError(
            f"{name} said one thing to {domain.links.name} and another to {hospital}, and signed both ('{subject.word}')",
            DEVIATES,
            name,
        )


def _is_genuine(domain: SecretDomain, hospital: str, subject: Subject, signed: Signed) -> bool:
    statement = subject.statement(hospital, signed.digest)
    return signatory_of(domain).is_genuine(hospital, _PURPOSE, statement, signed.signature)
