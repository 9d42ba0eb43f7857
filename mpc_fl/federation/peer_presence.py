"""What a hospital says of itself before a round among peers, and why a view is over; checked for its form when it is heard."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mpc_fl.errors import SAME_VERSION, MpcFlError, PeerLostError, ProtocolError, SumLostError

LONGEST_REASON = 300
_LONGEST_SIGNATURE = 512
_MOST_VOTES = 64
_MOST = 1 << 31  # of rounds, views, blocks and openings
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Standing:
    """What a hospital has before a round, alike at all: its `number`, the digest of the `state` in common, the total of weights.
    `made`: the digest of the state that this round has given already, where only its signatures are missing; `among`: the hospitals
    whose exact sum it was made from, without privacy. Who `leaves` takes no part in this round or any later one. `recalls` and
    `votes` as in `Presence`.
    """

    number: int
    state: str
    weight_total: int
    made: str = ""
    among: tuple[str, ...] = ()
    leaves: bool = False
    recalls: bool = True
    votes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Presence:
    """What a hospital says of itself in step 1. `pending` openings are in no block yet, `last` is the digest of the last of
    them; `complete` the seal of a block that it holds and has not kept, of `complete_view`; `held` the fingerprints of keys by
    name; `why` the view before is over, and whom it was `lost` with; it `leaves` the run instead of taking part; it `recalls` all
    that it signed, also before it started; `votes` for it, where it joins, by who admits it."""

    number: int
    view: int
    state: str
    made: str
    blocks: int
    seal: str
    pending: int
    last: str
    complete: str
    complete_view: int
    held: Mapping[str, str]
    why: str
    lost: str
    leaves: bool
    recalls: bool
    votes: Mapping[str, str]

    @classmethod
    def from_word(cls, name: str, word: Mapping[str, Any]) -> Presence:
        """Raises `ProtocolError` for a word that is none. What is passed on in a proposal is bounded here, or one that says more
        than all others would keep every proposal from leaving."""
        numbers = {key: word.get(key) for key in ("number", "view", "blocks", "pending", "complete_view")}
        texts = {key: word.get(key) for key in ("state", "made", "seal", "last", "complete", "why", "lost")}
        held, votes = word.get("held"), word.get("votes")
        sound = set(word) - {"word", "signature"} == {each.name for each in fields(cls)} and isinstance(held, dict)
        sound = sound and all(type(value) is int and 0 <= value < _MOST for value in numbers.values())
        sound = sound and all(isinstance(value, str) for value in texts.values())
        digests = [texts[key] for key in ("state", "made", "seal", "last", "complete")]
        sound = sound and all(value == "" or _is_digest(value) for value in digests)
        sound = sound and bool(texts["last"]) == bool(numbers["pending"])
        sound = sound and all(len(str(texts[key])) <= LONGEST_REASON for key in ("why", "lost"))
        sound = sound and all(isinstance(word.get(key), bool) for key in ("leaves", "recalls"))
        sound = sound and isinstance(votes, dict) and len(votes) <= _MOST_VOTES
        sound = sound and all(isinstance(vote, str) and len(vote) <= _LONGEST_SIGNATURE for vote in votes.values())  # type: ignore[union-attr]
        if not sound or not all(_is_digest(value) for value in held.values()):  # type: ignore[union-attr]
            raise ProtocolError(f"{name} did not say how it is present", SAME_VERSION)
        return cls(**numbers, **texts, held=held, leaves=word["leaves"], recalls=word["recalls"], votes=votes)  # type: ignore[arg-type]

    @property
    def view_of(self) -> tuple[int, int]:
        """Round and view."""
        return self.number, self.view

    def leaves_in(self, number: int) -> bool:
        """Whether it leaves before this round."""
        return self.leaves and self.number == number

    @property
    def place(self) -> tuple[int, str, str]:
        """After which block it stands, and with which state."""
        return self.blocks, self.seal, self.state


@dataclass(frozen=True)
class Reason:
    """Why a view came to nothing, and with whom, where that is known."""

    why: str = ""
    lost: str = ""


def lost_with(error: MpcFlError) -> str:
    """Whom a view came to nothing with, lost or deviating; "" where that is not known."""
    if isinstance(error, PeerLostError):
        return error.peer
    if isinstance(error, SumLostError):
        return error.lost
    return error.by if isinstance(error, ProtocolError) else ""


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None
