"""The aggregator's words to the hospitals: small messages, in one order, under one tag.

`say` tells, `next_word` hears. Because all words to one hospital share a tag, a hospital that was late finds in them what
it has missed, in order. Words are public: names, numbers and what happens next, never anything secret.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from mpc_fl.errors import SAME_VERSION, PeerLostError, ProtocolError
from mpc_fl.links.links import Links

log = logging.getLogger(__name__)

_WORD = "word"


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
        raise ProtocolError(f"{aggregator} said {shown} instead of {' or '.join(sorted(expected))}", SAME_VERSION)
    return word


def names_in(word: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of names in a word. Raises `ProtocolError` when it is none."""
    names = word.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ProtocolError(f"the aggregator sent no list of {key}", SAME_VERSION)
    return tuple(names)
