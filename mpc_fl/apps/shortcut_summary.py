"""What an audit of shortcuts says about itself when it is over: the content of shortcuts.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mpc_fl.apps.typed_json import typed
from mpc_fl.evidence.shortcuts_tested import Changed, Estimate

SHORTCUTS_FILE = "shortcuts.json"
FEDERATION, ALONE = "federation", "alone"
CORNERS = "corners replaced"  # the change that takes marks of side away


@dataclass(frozen=True)
class ChangeFound:
    """What one change of films did to a diagnosis (`evidence.shortcuts_tested.Changed`), and the `finding`: shortcut, contrast
    or none."""

    name: str
    kind: str
    accuracy: Estimate
    accuracy_change: Estimate
    area: Estimate
    area_change: Estimate
    log_odds_change: Estimate
    beyond_seams: Estimate | None
    kept: float
    p_value: float
    p_holm: float
    finding: str

    @classmethod
    def of(cls, changed: Changed) -> ChangeFound:
        """The same for a file."""
        return cls(**vars(changed), finding=changed.finding)


@dataclass(frozen=True)
class ModelStudied:
    """A `model`, the federation's or that of the hospital `site` alone, on the test films of `site`; of all where that is None."""

    model: str
    site: str | None
    patients: int
    records: int
    accuracy: Estimate
    area: Estimate
    changes: list[ChangeFound]

    @property
    def shortcuts(self) -> list[str]:
        """Changes that show a shortcut."""
        return [change.name for change in self.changes if change.finding == "shortcut"]


@dataclass(frozen=True)
class ProbeFound:
    """Whether the site can be told from the image: a probe trained as the run was, in so many `steps`, with sites for labels.

    `chance` is how often who sees no image is right, `by_diagnosis` who knows the diagnosis. `gain` is over the better of both.
    `epsilon`: what its training would cost each patient if hospitals released it; None without noise. Nothing was charged.
    """

    sites: int
    records: int
    steps: int
    mechanism: str
    epsilon: float | None
    accuracy: Estimate
    area: Estimate
    chance: float
    by_diagnosis: float
    gain: Estimate
    told: bool


@dataclass(frozen=True)
class SiteLeftOut:
    """Accuracy on the test films of `site`: of the run's model, of one trained without the site, and of the site's own.

    `own_elsewhere` is that of the site's own on all other films.
    """

    site: str
    patients: int
    federation: Estimate
    without: Estimate | None
    own: Estimate
    own_elsewhere: Estimate


@dataclass(frozen=True)
class FilmShown:
    """A film for the report, in no file: its class by number, uint8 images (channels, side, side) by what was done to them,
    untouched first, and the model's probability of that class of each."""

    label: int
    images: dict[str, np.ndarray]
    probabilities: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ShortcutSummary:
    """Of `mpc-fl audit shortcuts`. `lungs` says where they were taken to lie, `films_of` which hospital's films alone were there,
    None for those of all. What was not asked for is None or empty."""

    name: str
    run: str
    synthetic: bool
    command: str
    versions: dict[str, str]
    classes: list[str]
    hospitals: int
    films_of: str | None
    lungs: str
    mark: str | None
    models: list[ModelStudied]
    probe: ProbeFound | None
    left_out: list[SiteLeftOut]
    seconds: float

    def of_model(self, model: str) -> Iterator[ModelStudied]:
        """What was studied of one kind of model, at single sites."""
        return (studied for studied in self.models if studied.model == model and studied.site is not None)

    @property
    def shortcuts(self) -> list[str]:
        """By what the run's own model shows a shortcut, on the films of all hospitals."""
        return [name for studied in self.models if studied.site is None for name in studied.shortcuts]

    def to_json(self) -> dict[str, Any]:
        """The content of shortcuts.json."""
        return {**asdict(self), "shortcuts": self.shortcuts}

    @classmethod
    def from_json(cls, value: object, where: str = SHORTCUTS_FILE) -> ShortcutSummary:
        """Raises `DataError` when `value` is not the content of such a file; `where` names it."""
        return typed(cls, value, where)
