"""Steps 4 and 5 of a peer sum: the totals of all slices, told to all of V and found to be right before any key leaves.

What is computed, and why that is enough, is in `linear_check`; the order of messages in `peer_sum`. All that is told is signed
and repeated (`signed_words`), so that all of V judge the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mpc_fl.aggregation.linear_check import (
    MAP_SIZE,
    Evidence,
    LinearMap,
    as_numbers,
    fits,
    from_numbers,
    joint_coin,
    require_number,
    who_deviates,
)
from mpc_fl.aggregation.signed_words import DEVIATES, Signed, Subject, heard, repeated, require_one_version, say_signed
from mpc_fl.aggregation.slices import Slices
from mpc_fl.aggregation.words import Deadlines, broadcast, hear_all, names_in, say
from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.crypto.memory_layout import own_copy
from mpc_fl.errors import PeerLostError, ProtocolError, SumLostError
from mpc_fl.links.links import Links
from mpc_fl.sharing.opening import SecretDomain

FIRST_STEP = 2  # after slices are handed on and V is confirmed
_TOTALS, _COIN, _COMBINATIONS, _REPEATED, _SHOWN = range(FIRST_STEP, FIRST_STEP + 5)


@dataclass(frozen=True, repr=False)
class SaidOfSlices:
    """What a hospital said of its summand before it sent it: hashes of its slices by name, commitments to its keys (as they
    came) and to its part of the coin, its signature, and what it said for a check, if any.
    """

    hashes: Mapping[str, str]
    keys: object
    coin: str
    signed: Signed
    check: object = None


@dataclass(frozen=True, repr=False)
class FixedSlices:
    """What a hospital has when all of V, `admitted`, have confirmed what they hold; `bound` is the digest of that.

    `own` are the slices of its summand and `held` those that it opens, by slice and sender, its own with them, each (length,).
    `said` is what each of V said of its slices, under the `transcript` T; `number` its part of the coin. `peers` are the others
    of V, `deadlines` those of the sum, of which this takes the steps from `FIRST_STEP` on. `kept` are, where summands were checked,
    the copies that this hospital keeps of what the one before it opens of its own summand, by slice; else `None`.
    """

    domain: SecretDomain
    links: Links
    slices: Slices
    transcript: str
    bound: str
    admitted: tuple[str, ...]
    peers: tuple[str, ...]
    own: Mapping[str, torch.Tensor]
    held: Mapping[str, Mapping[str, torch.Tensor]]
    said: Mapping[str, SaidOfSlices]
    number: bytes
    deadlines: Deadlines
    kept: Mapping[str, torch.Tensor] | None = None

    def keeper(self, piece: str) -> str:
        """Who keeps a copy of a slice of the summand of who opens it."""
        return self.slices.keeper(self.slices.opener(piece, self.admitted), self.admitted)

    @property
    def why(self) -> str:
        """The step of the run that the sum is for."""
        return self.deadlines.why


def checked_totals(fixed: FixedSlices) -> dict[str, torch.Tensor]:
    """The totals over V of all slices, still masked, by name, each (length,).

    Raises `ProtocolError` naming who deviates, `PeerLostError`, and `SumLostError` where another hospital gave up.
    """
    told = _told_totals(fixed)
    totals = told.totals
    linear = LinearMap(_coin(fixed, told.signed))
    published, of_kept, said = _combinations(fixed, linear)
    failed = [
        piece
        for piece in fixed.slices.hospitals
        if not fits(linear, totals[piece], [published[name][piece] for name in fixed.admitted])
    ]
    # Before the others hear the last word without which they give no key: they may have been sent the right one.
    told.require_signed(failed, fixed)
    _require_same_failures(fixed, told, failed, _compare(fixed, said, failed))
    if failed:
        _blame(fixed, linear, failed, totals, published)
    for piece, numbers in of_kept.items():
        opener = fixed.slices.opener(piece, fixed.admitted)
        if not torch.equal(numbers, published[opener][piece]):
            _blame_for_copy(fixed, linear, piece, published[opener][piece])
    return totals


@dataclass(frozen=True, repr=False)
class _Told:
    """All totals by slice, the hash that its opener signed of each, and what each hospital signed."""

    totals: dict[str, torch.Tensor]
    hashes: dict[str, object]
    signed: dict[str, Signed]

    def require_signed(self, pieces: Collection[str], fixed: FixedSlices) -> None:
        """Raise `ProtocolError` naming an opener that sent another total of one of these slices than it signed.

        Of slices alone that do not fit, here or at another hospital: a total that fits is right, whatever was signed, and a hash
        takes as long as the check.
        """
        for piece in pieces:
            if tensor_digest(self.totals[piece]) != self.hashes[piece]:
                name = fixed.slices.opener(piece, fixed.admitted)
                what = f"{name} sent another total of a slice of '{fixed.why}' than it signed"
                raise ProtocolError(what, DEVIATES, name)


def _told_totals(fixed: FixedSlices) -> _Told:
    """Step 4."""
    domain, links, totals = fixed.domain, fixed.links, dict[str, torch.Tensor]()
    for piece, slices in fixed.held.items():
        first, *others = slices.values()
        totals[piece] = own_copy(first)
        for words in others:
            totals[piece] += words
    hashes: dict[str, object] = {piece: tensor_digest(words) for piece, words in totals.items()}
    subject = Subject(fixed.bound, "total")
    told = {links.name: say_signed(domain, links, fixed.peers, subject, {"hashes": hashes})}
    for piece, words in list(totals.items()):
        _send(fixed, f"total {piece}", words)

    def take(name: str, word: dict[str, Any]) -> None:
        told[name] = heard(domain, name, subject, word)
        opened, said = fixed.slices.opened_by(name, fixed.admitted), word.get("hashes")
        if not isinstance(said, dict) or set(said) != set(opened):
            raise ProtocolError(f"{name} opens other slices of '{fixed.why}' than its own", DEVIATES, name)
        for piece in opened:
            totals[piece], hashes[piece] = _receive(fixed, name, f"total {piece}", piece, _TOTALS), said[piece]

    hear_all(links, fixed.peers, "total", take, (fixed.deadlines, _TOTALS))
    return _Told(totals, hashes, told)


def _coin(fixed: FixedSlices, told: Mapping[str, Signed]) -> bytes:
    """Step 5: the coin, when all totals are here, the same everywhere. `told` is what was said of them."""
    subject, numbers = Subject(fixed.bound, "total"), {fixed.links.name: fixed.number}
    say(fixed.links, fixed.peers, "coin", number=fixed.number.hex(), repeated=repeated(told))

    def take(name: str, word: dict[str, Any]) -> None:
        require_one_version(fixed.domain, name, subject, told, word.get("repeated"))
        numbers[name] = require_number(fixed.transcript, name, fixed.said[name].coin, word.get("number"))

    hear_all(fixed.links, fixed.peers, "coin", take, (fixed.deadlines, _COIN))
    return joint_coin(fixed.bound, numbers)


def _combinations(
    fixed: FixedSlices, linear: LinearMap
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor], dict[str, Signed]]:
    """What each hospital of V tells of its slices, by hospital and slice; what keepers tell of their copies, by slice; and
    what each hospital signed of that."""
    domain, links, subject = fixed.domain, fixed.links, Subject(fixed.bound, "combinations")
    mine = {piece: linear.of(fixed.own[piece]) for piece in fixed.slices.hospitals}
    published, said = {links.name: mine}, dict[str, Signed]()
    of_kept = {} if fixed.kept is None else {piece: linear.of(words) for piece, words in fixed.kept.items()}
    values = {"of": {piece: as_numbers(words) for piece, words in mine.items()}}
    if fixed.kept is not None:
        values["kept"] = {piece: as_numbers(words) for piece, words in of_kept.items()}
    said[links.name] = say_signed(domain, links, fixed.peers, subject, values)

    def take(name: str, word: dict[str, Any]) -> None:
        said[name] = heard(domain, name, subject, word)
        kept = [piece for piece in mine if fixed.kept is not None and fixed.keeper(piece) == name]
        published[name] = _told(word.get("of"), name, mine)
        of_kept.update(_told(word.get("kept"), name, {piece: mine[piece] for piece in kept}))

    hear_all(links, fixed.peers, "combinations", take, (fixed.deadlines, _COMBINATIONS))
    return published, of_kept, said


def _compare(fixed: FixedSlices, said: Mapping[str, Signed], failed: Collection[str]) -> dict[str, str]:
    """All of V were told the same combinations. Returns the slices that do not fit at others, and one each at which."""
    subject, others = Subject(fixed.bound, "combinations"), dict[str, str]()
    say(fixed.links, fixed.peers, "repeated", repeated=repeated(said), failed=list(failed))

    def compare(name: str, word: dict[str, Any]) -> None:
        require_one_version(fixed.domain, name, subject, said, word.get("repeated"))
        others.update(dict.fromkeys(names_in(word, "failed", name), name))

    hear_all(fixed.links, fixed.peers, "repeated", compare, (fixed.deadlines, _REPEATED))
    return others


def _require_same_failures(fixed: FixedSlices, told: _Told, failed: Collection[str], others: Mapping[str, str]) -> None:
    """Raise `ProtocolError` where a slice fits here and not at another: its opener sent this hospital another total than it signed.

    If not, that other one says something false: it has the total that was signed, as this one, or has named the opener.
    """
    for piece, name in others.items():
        if piece in failed:
            continue
        if piece in told.totals:
            told.require_signed([piece], fixed)
        what = f"{name} says that a slice of '{fixed.why}' does not fit, which does"
        raise ProtocolError(what, DEVIATES, name)


def _told(given: object, name: str, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        piece: from_numbers(given.get(piece) if isinstance(given, dict) else None, name, MAP_SIZE, words.dtype)
        for piece, words in like.items()
    }


def _blame(
    fixed: FixedSlices,
    linear: LinearMap,
    failed: Collection[str],
    totals: Mapping[str, torch.Tensor],
    published: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    """Find who made slices fail, by what their openers show. Raises `ProtocolError` naming them."""
    for piece in failed:
        for name, words in fixed.held.get(piece, {}).items():
            _send(fixed, f"shown {piece} {name}", words)
    found, lost = list[str](), list[PeerLostError | SumLostError]()
    for piece in failed:
        opener = fixed.slices.opener(piece, fixed.admitted)
        try:
            shown = fixed.held.get(piece) or {
                name: _receive(fixed, opener, f"shown {piece} {name}", piece, _SHOWN) for name in fixed.admitted
            }
        except (PeerLostError, SumLostError) as error:  # what the others show may say more
            lost.append(error)
            continue
        hashes = {name: fixed.said[name].hashes[piece] for name in fixed.admitted}
        told = {name: published[name][piece] for name in fixed.admitted}
        found += who_deviates(linear, Evidence(opener, totals[piece], hashes, shown, told))
    if lost and not found:
        raise lost[-1]
    names = ", ".join(dict.fromkeys(found))
    by = found[0] if found else ""
    raise ProtocolError(f"a slice of '{fixed.why}' was not opened rightly, by {names}", DEVIATES, by)


def _blame_for_copy(fixed: FixedSlices, linear: LinearMap, piece: str, told: torch.Tensor) -> None:
    """Who opens a slice, and who keeps a copy of it, tell different things of the opener's own: the copy shows whose is false.

    Raises `ProtocolError` naming that one, `PeerLostError` where the copy is not shown.
    """
    opener, keeper = fixed.slices.opener(piece, fixed.admitted), fixed.keeper(piece)
    if keeper == fixed.links.name:
        assert fixed.kept is not None
        copy = fixed.kept[piece]
        _send(fixed, f"kept {piece}", copy)
    else:
        copy = _receive(fixed, keeper, f"kept {piece}", piece, _SHOWN)
    is_copy = tensor_digest(copy) == fixed.said[opener].hashes[piece]
    by = opener if is_copy and not torch.equal(linear.of(copy), told) else keeper
    raise ProtocolError(f"a slice of '{fixed.why}' was not what was checked, by {by}", DEVIATES, by)


def _send(fixed: FixedSlices, tag: str, words: torch.Tensor) -> None:
    broadcast(fixed.peers, lambda name: fixed.links.send_tensor(name, tag, words))


def _receive(fixed: FixedSlices, sender: str, tag: str, piece: str, step: int) -> torch.Tensor:
    words = fixed.own[piece]
    return fixed.links.receive_tensor(sender, tag, words.dtype, words.shape, fixed.deadlines.of(step))
