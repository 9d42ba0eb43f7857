"""The aggregator's words to the hospitals: small messages, in one order, under one tag.

`say` tells, `next_word` hears. Because all words to one hospital share a tag, a hospital that was late finds in them what
it has missed, in order. Among peers (`peer_sum`) each hospital says its words to all others so, and `hear_all` hears those
of all. Words are public: names, numbers and what happens next, never anything secret.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpc_fl.errors import SAME_VERSION, PeerLostError, ProtocolError, SumLostError, printable
from mpc_fl.links.links import Links

log = logging.getLogger(__name__)

_WORD = "word"
_LONGEST_REASON = 300


def say(links: Links, names: Sequence[str], word: str, **values: Any) -> None:
    """Tell each hospital the aggregator's next word; one that is lost is told nothing."""
    broadcast(names, lambda name: links.send_object(name, _WORD, {"word": word, **values}))


def broadcast(names: Sequence[str], send: Callable[[str], None]) -> None:
    """Call `send` for each hospital; a loss is logged and found again where it matters."""
    for name in names:
        try:
            send(name)
        except PeerLostError as error:
            log.warning("%s", error)


def next_word(
    links: Links, aggregator: str, expected: Collection[str], deadline: float | None = None
) -> dict[str, Any]:
    """The aggregator's next word to this hospital. Raises `ProtocolError` when it is none of the expected ones."""
    word = links.receive_object(aggregator, _WORD, deadline)
    said = word.get("word")
    if not isinstance(said, str) or said not in expected:
        shown = f"'{said[:40]}'" if isinstance(said, str) else "something else"
        raise ProtocolError(
            f"{aggregator} said {shown} instead of {' or '.join(sorted(expected))}", SAME_VERSION, aggregator
        )
    return word


def has_spoken(links: Links, name: str) -> bool:
    """Whether a word of this hospital has come."""
    return links.waiting(name, _WORD)


def first_to_speak(links: Links, names: Collection[str], deadline: float) -> str | None:
    """The first of these hospitals of which a word has come, or that is lost; `None` at the deadline."""
    return links.await_any(dict.fromkeys(names, _WORD), deadline)


@dataclass(frozen=True)
class Deadlines:
    """Of the steps of a sum among peers, `why`, which all begin at about the same time, `began` (of `time.monotonic`).

    Step by step they are `seconds` apart, so that a hospital which waits for another in vain in one step has given up, and said
    so, before the others take it for late in the next one.
    """

    why: str
    began: float
    seconds: float

    def of(self, step: int) -> float:
        """Until when (of `time.monotonic`) step 0, 1, ... may last."""
        return self.began + (step + 1) * self.seconds

    def after(self, steps: int) -> Deadlines:
        """Those of what follows so many steps."""
        return replace(self, began=self.began + steps * self.seconds)


def hear_all(
    links: Links,
    names: Sequence[str],
    word: str,
    take: Callable[[str, dict[str, Any]], None],
    until: tuple[Deadlines, int],
) -> None:
    """Among peers: `take` the next word of each, which is `word`, or "void" where somebody gives up the sum.

    `until`: the deadlines of the sum, and which step this is. What `take` finds comes before who gave up, here or all that the
    sum is part of, so that whoever deviates is named. Raises `SumLostError` for a sum that was given up, `PeerLostError` for a
    hospital that is lost or late.
    """
    deadlines, step = until
    given_up, why = "", deadlines.why
    for name in names:
        try:
            said = next_word(links, name, (word, "void"), deadlines.of(step))
        except SumLostError as error:
            given_up = given_up or f"'{why}' came to nothing: {error.what}"
            continue
        if said["word"] == "void":
            reason = printable(str(said.get("reason")), _LONGEST_REASON)
            given_up = given_up or f"'{why}' was given up by {name}: {reason}"
        else:
            take(name, said)
    if given_up:
        raise SumLostError(given_up, "its summands are made anew")


def names_in(word: Mapping[str, Any], key: str, sender: str = "the aggregator") -> tuple[str, ...]:
    """A list of names in a word. Raises `ProtocolError` naming who sent it when it is none."""
    names = word.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ProtocolError(f"{sender} sent no list of {key}", SAME_VERSION, sender)
    return tuple(names)
