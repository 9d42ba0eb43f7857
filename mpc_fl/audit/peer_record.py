"""What a block of a run among peers tells beside its openings: who proposed, under which view, who joined, who left.

Each of these stands among the values of the block, with the digest of what that hospital signed about it: all parties of the block
have checked that signature. Who is lost says nothing, so it is told by the parties of two blocks alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

from mpc_fl.audit.reveal_ledger import Block
from mpc_fl.roles import is_hospital

_PROPOSED, _JOINED, _LEFT = "proposal of ", "admission of ", "leave of "
_VIEW = re.compile(r" \((\d{1,4})\)$")


def values_of(proposed: tuple[str, str], joined: Mapping[str, str], left: Mapping[str, str]) -> dict[str, str]:
    """The values of a block: of who proposed, joined and left the name, and the digest (hex) of what it signed about that."""
    name, digest = proposed
    values = {f"{_PROPOSED}{name}": digest}
    values |= {f"{_JOINED}{each}": said for each, said in joined.items()}
    return values | {f"{_LEFT}{each}": said for each, said in left.items()}


def without_record(values: Mapping[str, str]) -> dict[str, str]:
    """The values of a block that are of the run itself: models and figures."""
    return {name: value for name, value in values.items() if not name.startswith((_PROPOSED, _JOINED, _LEFT))}


def _named(block: Block, what: str) -> list[str]:
    return [name.removeprefix(what) for name in block.values if name.startswith(what)]


def lines_of(blocks: list[Block]) -> list[list[str]]:
    """For each block what it tells, in words; nothing for a block of a run with an aggregator."""
    told, left = [_said(block, [], set()) for block in blocks[:1]], set[str]()
    for before, block in pairwise(blocks):
        told.append(_said(block, [name for name in before.parties if name not in block.parties], left))
        left |= set(_named(block, _LEFT))
    return told


def _said(block: Block, missing: list[str], left_before: set[str]) -> list[str]:
    proposers = _named(block, _PROPOSED)
    if not proposers:
        return []
    view = _VIEW.search(block.about)
    lines = [f"Proposed by {proposers[0]}" + (f", under view {view[1]}: {_before(view[1])}" if view else "")]
    joined, left = _named(block, _JOINED), _named(block, _LEFT)
    lost = [name for name in missing if is_hospital(name) and name not in left and name not in left_before]
    for names, what in ((joined, "Joined"), (left, "Left, as it said"), (lost, "Lost, or left out")):
        lines += [f"{what}: {', '.join(names)}"] if names else []
    return lines


def _before(view: str) -> str:
    return "the one before came to nothing" if view == "1" else f"the {view} before came to nothing"
