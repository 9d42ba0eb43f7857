"""What an audit of views says about itself when it is over: the content of views.json, and of its pictures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mpc_fl.apps.typed_json import typed

VIEWS_FILE, PICTURES_FILE = "views.json", "pictures.safetensors"


@dataclass(frozen=True)
class Received:
    """What one party received of another, of one kind: so many messages and bytes. `form` says whether it is masked or open."""

    receiver: str
    sender: str
    what: str
    form: str
    messages: int
    bytes: int


@dataclass(frozen=True)
class Judged:
    """Tests about words of one kind: how many, the smallest p-value as it is, and those that are rejected, by name."""

    of: str
    tests: int
    smallest: float
    rejected: list[str]


@dataclass(frozen=True)
class Inversion:
    """What gradient inversion made of one view of several hospitals' images.

    `own`: similarity with its own image, of each hospital; `others`: the mean with all other images, of each. `at_chance`: how
    probable it is that they are as close to their own images, or closer, if they show nothing of these.
    """

    view: str
    own: list[float]
    others: list[float]
    at_chance: float

    @property
    def mean(self) -> float:
        """Similarity with their own images on average."""
        return sum(self.own) / len(self.own)


@dataclass(frozen=True)
class Extraction:
    """How often students agree with the run's model on new images, by what they were told: pairs of queries and shares.

    `least` is what a student reaches that always says the most frequent class.
    """

    held_out: int
    least: float
    labels: list[tuple[int, float]]
    logits: list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class ViewsSummary:
    """Of `mpc-fl audit views`. All tests of uniformity and independence together reject what is right with probability `level`.

    `recorded` are tests of the run's own messages, `repeated` those of sums made again, whose plaintext is known. Of a diagnosis
    there are the first alone. `noise_multiplier` is that of the noised update that was inverted.
    """

    name: str
    run: str
    synthetic: bool
    command: str
    versions: dict[str, str]
    mechanism: str | None
    hospitals: int
    level: float
    received: list[Received]
    not_kept: int
    recorded: list[Judged]
    repeated: list[Judged]
    noise_multiplier: float | None
    inversions: list[Inversion]
    extraction: Extraction | None
    seconds: float

    @property
    def rejected(self) -> list[str]:
        """All tests that are rejected, by name."""
        return [name for made in (*self.recorded, *self.repeated) for name in made.rejected]

    @property
    def holds(self) -> bool:
        """Whether masked words look as they must."""
        return not self.rejected

    def to_json(self) -> dict[str, Any]:
        """The content of views.json."""
        return {**asdict(self), "holds": self.holds}

    @classmethod
    def from_json(cls, value: object, where: str = VIEWS_FILE) -> ViewsSummary:
        """Raises `DataError` when `value` is not the content of such a file; `where` names it."""
        return typed(cls, value, where)
