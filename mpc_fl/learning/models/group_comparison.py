"""How groups of patients fare with one model, and whether they differ by more than chance: from counts of each group, pure.

Of each class against the rest: sensitivity, the share of its records that is found, and specificity, the share of the others
that is not taken for it. Neither depends on how many records of a group are of a class, as accuracy does, so groups can be compared
by them. Of each attribute and figure: the worst group, the best one, and the gap between them with its interval. Each group
is tested against all others of its attribute together (of two groups there is one test), and all tests of a run are corrected
as one family (`shares.holm`). The gap's interval is that of the two groups as they are, though they were picked as the farthest
apart: among equal groups the largest gap is never zero, and the test, not the interval, says what is more than chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mpc_fl.learning.models.shares import (
    NoisedShare,
    difference_interval,
    fisher_exact,
    holm,
    is_lost,
    noised_difference,
    noised_interval,
    wilson_interval,
)

FigureName = Literal["sensitivity", "specificity"]
FIGURES: tuple[FigureName, ...] = ("sensitivity", "specificity")
_DIGITS = 5


@dataclass(frozen=True)
class GroupCounts:
    """The confusion matrix of one group, float64 or int64 (classes, classes), rows are true classes; `noise` is the deviation of
    each count, None where they are exact."""

    attribute: str
    group: str
    confusion: torch.Tensor
    noise: float | None = None


@dataclass(frozen=True)
class Share:
    """A share `hits` of `of`, which may be noised, with its 95 % interval; None where there is nobody to count, or where noise
    hides how many there are."""

    hits: float
    of: float
    value: float | None
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; of whom it is one is rounded where it is noised."""
        rounded = [None if value is None else round(value, _DIGITS) for value in (self.value, self.low, self.high)]
        return dict(zip(("share", "low", "high"), rounded, strict=True)) | {"of": max(0, round(self.of))}


@dataclass(frozen=True)
class Gap:
    """Of one attribute and figure: the groups that fare worst and best, how far apart, and the smallest corrected probability of
    a group to be as far from the others by chance, with that group; None where none could be tested."""

    attribute: str
    class_number: int
    figure: FigureName
    worst: str
    best: str
    gap: float
    low: float
    high: float
    chance: float | None
    differs: str | None

    def to_json(self) -> dict[str, Any]:
        """Its fields, shares and probabilities rounded."""
        rounded = {name: round(getattr(self, name), _DIGITS) for name in ("gap", "low", "high")}
        chance = None if self.chance is None else float(f"{self.chance:.3g}")
        return {**vars(self), **rounded, "chance": chance}


def _numbers(confusion: torch.Tensor, label: int, figure: FigureName) -> NoisedShare:
    """How many of how many, and how many counts make up the former and the rest."""
    hits, own = float(confusion[label, label]), float(confusion[label].sum())
    others = len(confusion) - 1
    if figure == "sensitivity":
        return hits, own, (1, others)
    total, named = float(confusion.sum()), float(confusion[:, label].sum())
    return total - own - named + hits, total - own, (others**2, others)


def share_of(counts: GroupCounts, label: int, figure: FigureName) -> Share:
    """One figure of one class, against the rest."""
    hits, of, cells = _numbers(counts.confusion, label, figure)
    if is_lost(of, counts.noise or 0.0, cells):
        return Share(hits, of, None, None, None)
    value = min(1.0, max(0.0, hits / of))
    exact = counts.noise is None
    low, high = wilson_interval(value, int(of)) if exact else noised_interval(value, of, counts.noise or 0.0, cells)
    return Share(hits, of, value, low, high)


def figures_compared(classes: int) -> list[tuple[int, FigureName]]:
    """Classes and their figures that say different things: of two classes the specificity of one is the other's sensitivity."""
    figures: tuple[FigureName, ...] = FIGURES[:1] if classes == 2 else FIGURES
    return [(label, figure) for label in range(classes) for figure in figures]


def gaps_between(groups: Sequence[GroupCounts]) -> list[Gap]:
    """The gap of every attribute with two groups or more, for every class and figure that two of them have."""
    by_attribute = dict[str, list[GroupCounts]]()
    for counts in groups:
        by_attribute.setdefault(counts.attribute, []).append(counts)
    found, chances = list[tuple[Gap, slice, list[str]]](), list[float]()
    for attribute, members in by_attribute.items():
        for label, figure in figures_compared(len(members[0].confusion)):
            shares = {counts.group: share_of(counts, label, figure) for counts in members}
            known = {name: share for name, share in shares.items() if share.value is not None}
            if len(known) < 2:
                continue
            tested = _chances([counts for counts in members if counts.group in known], label, figure)
            place = slice(len(chances), len(chances) + len(tested))
            chances += tested.values()
            found.append((_gap(attribute, (label, figure), known), place, list(tested)))
    corrected = holm(chances)
    return [_with_chance(gap, corrected[place], names) for gap, place, names in found]


def _gap(attribute: str, of: tuple[int, FigureName], shares: dict[str, Share]) -> Gap:
    spans = {name: (share.value or 0.0, share.low or 0.0, share.high or 0.0) for name, share in shares.items()}
    worst, best = min(spans, key=lambda name: spans[name][0]), max(spans, key=lambda name: spans[name][0])
    low, high = difference_interval(spans[best], spans[worst])
    return Gap(attribute, *of, worst, best, spans[best][0] - spans[worst][0], low, high, None, None)


def _with_chance(gap: Gap, corrected: Sequence[float], names: Sequence[str]) -> Gap:
    if not names:
        return gap
    chance, differs = min(zip(corrected, names, strict=True))
    return Gap(**{**vars(gap), "chance": chance, "differs": differs})


def _chances(members: Sequence[GroupCounts], label: int, figure: FigureName) -> dict[str, float]:
    """Of each group that can be tested against the others together: how probable so large a difference is by chance."""
    found = dict[str, float]()
    for place, counts in enumerate(members[: 1 if len(members) == 2 else None]):
        others = [other for other in members if other is not counts]
        together = torch.stack([other.confusion for other in others]).sum(dim=0)
        own, rest = _numbers(counts.confusion, label, figure), _numbers(together, label, figure)
        if counts.noise is None:
            chance: float | None = fisher_exact((int(own[0]), int(own[1])), (int(rest[0]), int(rest[1])))
        else:
            right, wrong = rest[2]
            cells = (right * len(others), wrong * len(others))
            chance = noised_difference(own, (rest[0], rest[1], cells), counts.noise)
        if chance is not None:
            found[members[place].group] = chance
    return found
