"""Sums of training made again in one process with the plaintext at hand: whether masked words show anything of it.

Two runs are made like the audited one, on the same data with the same patients drawn, each with keys, masks and noise of its own: a
step in each of two rounds. Of every summand the encoded update and the masked words are kept, and tested: the words by themselves;
with the update that they mask, and the mask itself, which is their difference; what is left of them once the keys are given that
open the sum; with the same hospital's words in the round before, with another hospital's for the same sum, and with its own in the
other run, where what is masked is nearly the same.

Training, encoding, masks and sums are the code of every run (`apps.simulation.hospitals`); nothing of it is a copy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mpc_fl.apps.auditing.audited_config import viewed_config
from mpc_fl.apps.auditing.audited_rounds import OneGroup
from mpc_fl.apps.auditing.recorded_views import PValues
from mpc_fl.apps.simulation.hospitals import HospitalGroup, Release, Simulated
from mpc_fl.apps.simulation.rounds import SimulatedRounds
from mpc_fl.apps.simulation.sums import SumRequest
from mpc_fl.audit.opening_record import OPENINGS_FILE, OpeningRecord
from mpc_fl.config.config import Config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.evidence.uniformity import FEWEST_WORDS, correlation, equal_bits, p_values_of_one, p_values_of_two, words_of
from mpc_fl.federation.aggregator_state import Aggregator, prepare_aggregator
from mpc_fl.federation.planning import sum_rules
from mpc_fl.roles import AGGREGATOR, hospital_name
from mpc_fl.sharing.closed_sum import SummandMasks

_OF_TRAINING, _RUNS, _MOST_WORDS = ("update", "gradient"), 2, 1 << 18


@dataclass(frozen=True, repr=False)
class MaskedSummand:
    """One hospital's part in a sum of training: the encoded update, and the masked words that leave; ring elements of one shape.

    `unlocked` is what the opener makes of these words with the keys that it is given: without the masks that close the sum. None
    where no masks close it.
    """

    hospital: int
    plain: torch.Tensor
    masked: torch.Tensor
    unlocked: torch.Tensor | None = None

    @property
    def words(self) -> tuple[np.ndarray, np.ndarray]:
        """Both as unsigned words, as many as are tested: plain and masked."""
        return words_of(self.plain)[:_MOST_WORDS], words_of(self.masked)[:_MOST_WORDS]


class WatchedGroup(HospitalGroup):
    """All hospitals of a run, whose summands of training are watched: `sums` has those of each sum, by rank."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, range(config.federation.hospitals))
        self.sums: list[dict[int, MaskedSummand]] = []
        self._plain: torch.Tensor | None = None

    def begin_sum(self, request: SumRequest) -> None:
        """As every group; a sum of training is one to watch."""
        super().begin_sum(request)
        if request.kind in _OF_TRAINING:
            self.sums.append({})

    def summand(self, each: Simulated, request: SumRequest) -> tuple[Private[torch.Tensor], Release | None]:
        """As every group; kept is what is masked afterwards."""
        encoded, release = super().summand(each, request)
        self._plain = encoded.inside_protocol().clone() if request.kind in _OF_TRAINING else None
        return encoded, release

    def add(self, rank: int) -> None:
        """As every group; kept is what this hospital's masked words changed of their total."""
        before = None if self._words is None else self._words.clone()
        super().add(rank)
        if self._plain is not None and self._words is not None:
            masked = self._words.clone() if before is None else self._words - before
            unlocked = _without_closing_masks(masked, self.hospitals[rank].masks)
            self.sums[-1][rank], self._plain = MaskedSummand(rank, self._plain, masked, unlocked), None


def _without_closing_masks(masked: torch.Tensor, masks: SummandMasks | None) -> torch.Tensor | None:
    if masks is None or not masks.plan.closing:
        return None
    unlocked = masked.clone()
    for closing in masks.closing_masks():
        closing.subtract_from(unlocked)
    return unlocked


@dataclass(frozen=True)
class WatchedRun:
    """A run whose sums were watched: those of each hospital, what each opened, and who stepped along them."""

    sums: list[dict[int, MaskedSummand]]
    opened: list[torch.Tensor]
    aggregator: Aggregator


def watched_rounds(config: Config, group: WatchedGroup, directory: Path, told: Callable[[], None]) -> WatchedRun:
    """Make all rounds of training of a simulation in this process. `told` is called after each. Raises what a run would raise."""
    aggregator, opened = prepare_aggregator(config), list[torch.Tensor]()

    def observe(request: SumRequest, total: torch.Tensor) -> None:
        if request.kind in _OF_TRAINING:
            opened.append(total.clone())

    record = OpeningRecord(directory / OPENINGS_FILE, AGGREGATOR)
    rounds = SimulatedRounds(aggregator, sum_rules(config), OneGroup(group), record, lambda *_: None, observe=observe)
    rounds.begin()
    for number in range(1, config.training.rounds + 1):
        rounds.round(number)
        told()
    return WatchedRun(group.sums, opened, aggregator)


def add_tests_of_repetitions(
    config: Config, noise_multiplier: float | None, tests: PValues, told: Callable[[int, int], None]
) -> None:
    """Make the sums of two runs like this one, and add the tests of them. `told(done, of)` follows.

    Raises `ConfigError` for a run that cannot be made again, and what the run itself would raise.
    """
    done, runs = 0, list[list[dict[int, MaskedSummand]]]()

    def round_done() -> None:
        nonlocal done
        done += 1
        told(done, of)

    for _ in range(_RUNS):
        with tempfile.TemporaryDirectory(prefix="mpc-fl-audit-") as directory:
            own = viewed_config(config, noise_multiplier, Path(directory))
            of = _RUNS * own.training.rounds
            runs.append(watched_rounds(own, WatchedGroup(own), Path(directory), round_done).sums)
    add_tests_of_summands(runs, tests)


def add_tests_of_summands(runs: list[list[dict[int, MaskedSummand]]], tests: PValues) -> None:
    """Add the tests of all summands of several runs over the same data: those of each sum by rank."""
    for run, sums in enumerate(runs):
        for number, summands in enumerate(sums):
            for rank, summand in summands.items():
                plain, masked = summand.words
                if masked.nbytes < FEWEST_WORDS:
                    continue
                name = f"{hospital_name(rank)}, sum {number + 1} of run {run + 1}"
                tests.add("masked words", name, p_values_of_one(masked))
                tests.add("the mask alone", name, p_values_of_one(masked - plain))
                signed = summand.plain.reshape(-1).double().numpy()[: len(masked)]
                shown = {"correlation": correlation(masked, signed), "equal bits": equal_bits(masked, plain)}
                tests.add("masked words and the update", name, shown)
                if summand.unlocked is not None:
                    opened = words_of(summand.unlocked)[:_MOST_WORDS]
                    of_opened = p_values_of_one(opened) | {"correlation": correlation(opened, signed)}
                    tests.add("masked words, less the masks whose keys are given", name, of_opened)
                for of, other in _others(runs, (run, number, rank)):
                    tests.add(of, name, p_values_of_two(masked, other.words[1]))


def _others(runs: list[list[dict[int, MaskedSummand]]], place: tuple[int, int, int]) -> list[tuple[str, MaskedSummand]]:
    """Those that a summand must not depend on; not one of two hospitals alone, which the sum ties to each other."""
    (run, number, rank), found = place, list[tuple[str, MaskedSummand]]()
    summands = runs[run][number]
    if number:
        found.append(("masked words, with the round before", runs[run][number - 1][rank]))
    if rank + 1 in summands and len(summands) > 2:
        found.append(("masked words, with another hospital's", summands[rank + 1]))
    if run:
        found.append(("masked words, with the other run", runs[run - 1][number][rank]))
    return found
