"""What a block of a run among peers tells beside its openings: who proposed, under which view, who joined, who left, and whose
update was not shown to be within the norm bound.

Each of these stands among the values of the block, with the digest of what that hospital signed about it: all parties of the
block have checked that signature; of one that was refused, with the transcript of the sum that all others left it out of. Who
is lost says nothing, so it is told by the parties of two blocks alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mpc_fl.audit.reveal_ledger import Block
from mpc_fl.roles import is_hospital

_PROPOSED, _JOINED, _LEFT, _REFUSED = "proposal of ", "admission of ", "leave of ", "refusal of "
_VIEW = re.compile(r" \((\d{1,4})\)$")


def values_of(proposed: tuple[str, str], joined: Mapping[str, str], left: Mapping[str, str]) -> dict[str, str]:
    """The values of a block: of who proposed, joined and left the name, and the digest (hex) of what it signed about that."""
    name, digest = proposed
    values = {f"{_PROPOSED}{name}": digest}
    values |= {f"{_JOINED}{each}": said for each, said in joined.items()}
    return values | {f"{_LEFT}{each}": said for each, said in left.items()}


def values_of_refused(refused: Mapping[str, str]) -> dict[str, str]:
    """The values of a block: of who did not pass a norm check the transcript (hex) of the sum that went on without it."""
    return {f"{_REFUSED}{name}": transcript for name, transcript in refused.items()}


def without_record(values: Mapping[str, str]) -> dict[str, str]:
    """The values of a block that are of the run itself: models and figures."""
    return {name: value for name, value in values.items() if not name.startswith((_PROPOSED, _JOINED, _LEFT, _REFUSED))}


def _named(block: Block, what: str) -> list[str]:
    return [name.removeprefix(what) for name in block.values if name.startswith(what)]


def lines_of(blocks: list[Block]) -> list[list[str]]:
    """For each block what it tells, in words; nothing for a block of a run with an aggregator."""
    told, before, gone = list[list[str]](), set[str](), set[str]()
    for previous, block in zip([None, *blocks], blocks, strict=False):
        missing = [name for name in ([] if previous is None else previous.parties) if name not in block.parties]
        told.append(_said(block, before, [name for name in missing if name not in gone]))
        before |= set(block.parties)
        gone |= set(_named(block, _LEFT))
    return told


def _said(block: Block, before: set[str], missing: list[str]) -> list[str]:
    proposers = _named(block, _PROPOSED)
    if not proposers:
        return []
    view = _VIEW.search(block.about)
    lines = [f"Proposed by {proposers[0]}" + (f", under view {view[1]}: {_before(view[1])}" if view else "")]
    joined, left, refused = _named(block, _JOINED), _named(block, _LEFT), _named(block, _REFUSED)
    of_whom = {
        "Joined": [name for name in joined if name not in before],
        "Came back": [name for name in joined if name in before],
        "Left, as it said": left,
        "Not shown to be within the norm bound": refused,
        "Lost, or left out": [name for name in missing if is_hospital(name) and name not in (*left, *refused)],
    }
    return lines + [f"{what}: {', '.join(whom)}" for what, whom in of_whom.items() if whom]


def _before(view: str) -> str:
    return "the one before came to nothing" if view == "1" else f"the {view} before came to nothing"
