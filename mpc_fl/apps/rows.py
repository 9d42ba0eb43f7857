"""Lines of the files that parties leave in a run's directory, as far as reports and commands read them.

Who writes them: `metrics.jsonl` of the aggregator and of each hospital the training round, `rounds.jsonl` of each hospital
among peers what an aggregator would write, `results.jsonl` the hospital that
asks (`summaries.ImageResult`), `openings.jsonl` the record of openings, `traffic.json` the links of each party.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mpc_fl.apps.costs import Cost, PartyCosts, energy_words, phase_of_all
from mpc_fl.apps.group_scores import GroupScores
from mpc_fl.apps.scores import Scores
from mpc_fl.apps.summaries import ChosenRound, FittedCalibration
from mpc_fl.apps.typed_json import typed
from mpc_fl.errors import DataError
from mpc_fl.parsing import parse_json, parse_json_lines

T = TypeVar("T")


@dataclass(frozen=True)
class GlobalRound:
    """A line of the aggregator's metrics.jsonl, or of rounds.jsonl; round 0 is the model before training.

    `validation` is on validation patients; the round after training may have `chosen` and calibrated the model. The last one has
    `groups` of test patients, where they were asked for.
    """

    round: int
    evaluation: Scores | None
    hospitals: list[str] = field(default_factory=list)
    validation: Scores | None = None
    chosen: ChosenRound | None = None
    calibration: FittedCalibration | None = None
    groups: GroupScores | None = None


@dataclass(frozen=True, kw_only=True)
class HospitalRound:
    """A line of a hospital's metrics.jsonl; None stands for what is not a number, or does not exist without noise.

    What has a default is not recorded by all versions.
    """

    round: int
    loss: float | None
    epsilon: float | None
    noise_multiplier: float | None = None
    clipped_fraction: float | None = None
    method: str | None = None
    own_accuracy: float | None
    skipped_files: int = 0
    treatments: dict[str, int] = field(default_factory=dict)
    patients: dict[str, int] | None = None
    records: dict[str, int] | None = None
    class_counts: dict[str, list[int]] | None = None
    left_aside: dict[str, int] | None = None


@dataclass(frozen=True)
class OwnModel:
    """A hospital's own_model.json: the final model and one trained on its own patients alone, on its own test records.

    How many records one of them alone decides rightly, and how probable so large a difference is by chance.
    """

    federated: Scores
    alone: Scores
    federated_alone_right: int
    own_alone_right: int
    chance: float


@dataclass(frozen=True)
class OpenedValue:
    """A line of openings.jsonl: what was opened, why, of what shape, to whom, and who held the shares."""

    what: str
    why: str
    shape: list[int]
    to: list[str]
    among: list[str]


@dataclass(frozen=True)
class PeerTraffic:
    """Bytes and messages between a party and one peer in one phase."""

    bytes_sent: int
    bytes_received: int
    messages_sent: int
    waits: int
    seconds_waited: float


@dataclass(frozen=True)
class PhaseTraffic:
    """One phase of a party's work; `gpu_seconds` is None where none was used."""

    seconds: float
    peers: dict[str, PeerTraffic]
    processor_seconds: float | None = None
    gpu_seconds: float | None = None
    joules: float | None = None

    @property
    def cost(self) -> Cost:
        """The same with all peers together."""
        peers = self.peers.values()
        return Cost(
            self.seconds,
            self.processor_seconds,
            self.gpu_seconds,
            self.joules,
            sum(peer.bytes_sent for peer in peers),
            sum(peer.bytes_received for peer in peers),
            sum(peer.messages_sent for peer in peers),
            sum(peer.waits for peer in peers),
            sum(peer.seconds_waited for peer in peers),
        )


@dataclass(frozen=True)
class EnergyRead:
    """How the joules of a traffic.json are known, and what was taken for what could not be measured."""

    processors_measured: bool
    watts_per_core: float
    watts_per_gpu: float
    grid_intensity: float
    grams_co2: float


@dataclass(frozen=True)
class PartyTraffic:
    """A party's traffic.json: its phases in the order of work."""

    phases: dict[str, PhaseTraffic]
    energy: EnergyRead | None = None

    def costs(self) -> PartyCosts:
        """What the party spent, phases of all rounds or images together."""
        found, total = dict[str, Cost](), Cost()
        for name, phase in self.phases.items():
            of_all = phase_of_all(name)
            found[of_all] = found[of_all] + phase.cost if of_all in found else phase.cost
            total += phase.cost
        found, total, energy = {name: cost.rounded() for name, cost in found.items()}, total.rounded(), self.energy
        if energy is None:
            return PartyCosts(found, total)
        words = energy_words(energy.processors_measured, total.gpu_seconds is not None)
        return PartyCosts(found, total, words, energy.grams_co2)


@dataclass(frozen=True)
class PlaintextReference:
    """plaintext_reference.json: the logits (images, classes) of the same network in the clear."""

    logits: list[list[float]]


def costs_in(directory: Path, files: Mapping[str, str]) -> dict[str, PartyCosts]:
    """Costs of the parties whose traffic.json lies in `directory`, by the names in `files`; who was lost left none.

    Raises `DataError` for a damaged one.
    """
    there = {party: name for party, name in files.items() if (directory / name).is_file()}
    return {party: read_object(PartyTraffic, directory, name).costs() for party, name in there.items()}


def why_of_all(why: str) -> str:
    """Why something is opened, of all rounds, and of all their steps, under one name."""
    return re.sub(r"^round \d+( step)?[ \d]*: ", lambda found: f"each{found[1] or ' round'}: ", why)


def read_text(directory: Path, name: str) -> str:
    """A file of a run. Raises `DataError` when it is missing or unreadable."""
    try:
        return (directory / name).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{name} is missing") from None
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{name} cannot be read") from None


def read_object(kind: type[T], directory: Path, name: str) -> T:
    """The JSON object in a file. Raises `DataError` when the file is missing, unreadable or damaged."""
    try:
        content = parse_json(read_text(directory, name))
    except ValueError as error:
        raise DataError(f"{name} cannot be read: {error}") from None
    return typed(kind, content, name)


def read_rows(kind: type[T], directory: Path, name: str) -> list[T]:
    """The JSON object on each line of a file. Raises `DataError` when the file is missing, unreadable or damaged."""
    try:
        lines = parse_json_lines(read_text(directory, name))
    except ValueError as error:
        raise DataError(f"{name} cannot be read: {error}") from None
    return [typed(kind, line, name) for line in lines]
