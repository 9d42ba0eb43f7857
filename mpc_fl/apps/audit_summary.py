"""What an audit of privacy says about itself when it is over: the content of audit.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mpc_fl.apps.typed_json import typed

AUDIT_FILE = "audit.json"


@dataclass(frozen=True)
class BoundFound:
    """A lower bound on epsilon from what was `seen` up to a round, beside the accountant's upper bound, None where there is none.

    Of the `guesses` so many were `right`.
    """

    seen: str
    round: int
    lower: float
    upper: float | None
    guesses: int
    right: int

    @property
    def contradicts(self) -> bool:
        """Whether patients were shown to lose more than the accountant says."""
        return self.upper is not None and self.lower > self.upper


@dataclass(frozen=True)
class MembershipFound:
    """How well the patients of a run are told from others by its final model alone: so many `models` were trained and attacked.

    `area` is that below the curve. `rates` and `curve`: pairs of a rate of mistakes and that of members recognised.
    """

    models: int
    patients: int
    area: float
    rates: list[tuple[float, float]]
    curve: list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class AuditSummary:
    """Of `mpc-fl audit privacy`. All lower bounds hold together with this `confidence`, at this `delta`.

    `upper` is what the accountant says after each round, empty without noise. `epsilon_of_run` is what the audited run says
    that its patients spent, with all else that it opened. `unit`: a patient with several records, or a record.
    """

    name: str
    run: str
    synthetic: bool
    command: str
    versions: dict[str, str]
    mechanism: str
    unit: str
    hospitals: int
    honest: int
    rounds: int
    local_steps: int
    sample_rate: float | None
    noise_multiplier: float | None
    delta: float
    confidence: float
    canaries: int
    repetitions: int
    bounds: list[BoundFound]
    upper: list[float]
    epsilon_of_run: float | None
    seconds: float
    membership: MembershipFound | None = None

    @property
    def holds(self) -> bool:
        """Whether no lower bound exceeds the accountant's."""
        return not any(bound.contradicts for bound in self.bounds)

    def to_json(self) -> dict[str, Any]:
        """The content of audit.json."""
        return {**asdict(self), "holds": self.holds}

    @classmethod
    def from_json(cls, value: object, where: str = AUDIT_FILE) -> AuditSummary:
        """Raises `DataError` when `value` is not the content of such a file; `where` names it."""
        return typed(cls, value, where)
