"""An evaluation of groups of test patients as it stands in files of a run (`federation.group_evaluation`). Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from mpc_fl.apps.scores import Scores

SURE = 0.05  # a corrected probability below says that a gap is more than chance


@dataclass(frozen=True)
class GroupShare:
    """A share of `of` records, or of patients where counts are noised, with its 95 % interval; None where there are too few."""

    share: float | None
    low: float | None
    high: float | None
    of: int


@dataclass(frozen=True)
class GroupArea:
    """An AUC with its interval, and how far its bins may put it off."""

    area: float
    low: float
    high: float
    resolution: float


@dataclass(frozen=True)
class ClassOfGroup:
    """One class against the rest, in one group."""

    sensitivity: GroupShare
    specificity: GroupShare
    auc: GroupArea | None = None


@dataclass(frozen=True)
class GroupShown:
    """One group that is shown. `error_by_chance`: the calibration error that a perfectly calibrated model would show of so few."""

    attribute: str
    group: str
    scores: Scores
    classes: list[ClassOfGroup]
    error_by_chance: float | None = None


@dataclass(frozen=True)
class GroupGap:
    """Of one attribute, class and figure: the groups that fare worst and best, the gap with its interval, and how probable
    it is by chance that a group, `differs`, is as far from the others; None where none could be tested."""

    attribute: str
    class_number: int
    figure: str
    worst: str
    best: str
    gap: float
    low: float
    high: float
    chance: float | None = None
    differs: str | None = None

    @property
    def is_more_than_chance(self) -> bool:
        """At 95 % of all tests of the run together."""
        return self.chance is not None and self.chance < SURE

    def named(self, classes: list[str]) -> str:
        """Of what it is, with the name of the class."""
        known = self.class_number < len(classes)
        return f"{self.figure}, {classes[self.class_number] if known else f'class {self.class_number}'}"


@dataclass(frozen=True)
class GroupScores:
    """All of a run: groups that are shown, names of those that are withheld, and gaps. `fewest` patients a group must have."""

    fewest: int
    shown: list[GroupShown] = field(default_factory=list)
    withheld: dict[str, list[str]] = field(default_factory=dict)
    gaps: list[GroupGap] = field(default_factory=list)

    @property
    def largest(self) -> GroupGap | None:
        """The gap to tell of: the largest of those that are more than chance, else the largest; None without one."""
        return max(self.gaps, key=lambda gap: (gap.is_more_than_chance, gap.gap), default=None)

    def described(self) -> list[str]:
        """What is to be told of groups, in a few sentences."""
        told, largest = list[str](), self.largest
        if largest is not None:
            sure = "more than chance" if largest.is_more_than_chance else "not shown to be more than chance"
            told.append(
                f"Groups: the largest gap is {largest.gap:.1%}, by {largest.attribute}: {largest.worst} below {largest.best} in "
                f"{largest.figure} of class {largest.class_number} (from 0); {sure}."
            )
        withheld = "; ".join(f"{by} {', '.join(of)}" for by, of in self.withheld.items())
        if withheld:
            told.append(f"Withheld, not shown to have {self.fewest} patients: {withheld}.")
        return told

    @property
    def noise(self) -> float | None:
        """The deviation of each count, None where they are exact or nothing is shown."""
        return self.shown[0].scores.noise if self.shown else None
