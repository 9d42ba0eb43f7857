"""A lower bound on what a run shows of its patients, beside what its accountant says (`mpc-fl audit privacy`).

1. The run is made again with its own noise, steps and hospitals, with canaries that are there with probability 1/2 each
   (`audited_rounds`). Repetitions have canaries of their own: together they are one mechanism for all of them, since each canary
   takes part in one repetition alone.
2. Each canary gets a score from what was opened (`canary_scores`), and those with the most extreme ones are guessed about
   (`guessing`). How many guesses there are was fixed before.
3. The right guesses give a lower bound on epsilon (`one_run_bound`): after all rounds; after the last round at which the
   accountant's epsilon is small, where fewer canaries tell more; and from the final model alone. The level is divided among
   them, so they hold together.
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mpc_fl.apps.audit_summary import BoundFound
from mpc_fl.apps.auditing.audited_config import AuditedRun, rates_of, sample_rate
from mpc_fl.apps.auditing.audited_rounds import repeat_run
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.evidence.canaries import RECORDS_OF_PATIENT, drawn_canaries
from mpc_fl.evidence.canary_scores import Claim, Steps, score_of_sum, scores_of, step_responses
from mpc_fl.evidence.guessing import Guesses, planned_guesses, planned_without_noise, right_guesses
from mpc_fl.evidence.one_run_bound import lower_bound

CONFIDENCE = 0.95
FINAL_MODEL = "the final model alone"
_CLEAREST = 2.0  # the accountant's epsilon up to which an accountant that is wrong is found with the fewest canaries
# Most that delta times the number of canaries may be: beyond, what delta allows hides what epsilon does.
_OF_ALL_CANARIES = 0.2

Told = Callable[[int, int], None]


@dataclass(frozen=True)
class AuditPlan:
    """How a run is audited: so many repetitions of it, with patients of several records or of one.

    `delta` is that of both bounds: the run's own, or a fifth over the number of canaries, where that is less.
    """

    run: AuditedRun
    repetitions: int
    of_patients: bool

    @property
    def canaries(self) -> int:
        """In all repetitions."""
        return self.run.canaries * self.repetitions

    @property
    def delta(self) -> float:
        """Of both bounds."""
        return min(self.run.config.privacy.delta, _OF_ALL_CANARIES / self.canaries)


@dataclass(frozen=True)
class PrivacyAudit:
    """What an audit found: bounds, the accountant's epsilon after each round (empty without noise), and the seconds it took."""

    bounds: list[BoundFound]
    upper: list[float]
    seconds: float


@dataclass
class _Seen:
    """All repetitions: who was inside, bool (m,) each, and what was released, float64 (releases, m) each."""

    inside: list[np.ndarray] = field(default_factory=list)
    releases: list[np.ndarray] = field(default_factory=list)


def audit_privacy(plan: AuditPlan, told: Told) -> PrivacyAudit:
    """Repeat the run and bound epsilon from below. `told(round, rounds)` follows, over all repetitions.

    Raises `ConfigError` for a run that cannot be audited, and what the run itself would raise.
    """
    began, run, seen, upper = time.monotonic(), plan.run, _Seen(), list[float]()
    rounds, seed = run.config.training.rounds, Seed.from_system()
    of_each = RECORDS_OF_PATIENT if plan.of_patients else 1
    for number in range(plan.repetitions):
        stream = seed.stream("canaries", number)
        canaries = drawn_canaries(stream, run.canaries, run.honest, run.config.privacy.clipping_norm, of_each)
        done = functools.partial(_told_of_repetition, told, number * rounds, plan.repetitions * rounds)
        with tempfile.TemporaryDirectory(prefix="mpc-fl-audit-") as directory:
            released = repeat_run(run, canaries, Path(directory), done, plan.delta if number == 0 else None)
        seen.inside.append(canaries.inside)
        seen.releases.append(released.matrix)
        if all(map(math.isfinite, released.epsilon)):
            upper += released.epsilon
    return PrivacyAudit(_bounds(plan, seen, upper), upper, time.monotonic() - began)


def _told_of_repetition(told: Told, before: int, of: int, done: int) -> None:
    told(before + done, of)


def _bounds(plan: AuditPlan, seen: _Seen, upper: list[float]) -> list[BoundFound]:
    """Step 3. `upper`: the accountant's epsilon after each round, empty without noise."""
    rounds, inside = plan.run.config.training.rounds, np.concatenate(seen.inside)
    small = [number for number, epsilon in enumerate(upper, 1) if epsilon <= _CLEAREST and number < rounds]
    looks = [(f"all that was opened up to round {number}", number) for number in (*small[-1:], rounds)]
    looks.append((FINAL_MODEL, rounds))
    level, found = (1 - CONFIDENCE) / len(looks), list[BoundFound]()
    for what, number in looks:
        claimed = upper[number - 1] if upper else None
        guesses = _planned(plan, claimed, level)
        of_each = [score_of_sum(one) if what == FINAL_MODEL else _scores(plan, one, number) for one in seen.releases]
        right = right_guesses(guesses, np.concatenate(of_each), inside)
        lower = lower_bound(plan.canaries, guesses.count, right, plan.delta, level)
        found.append(BoundFound(what, number, lower, claimed, guesses.count, right))
    return found


def _planned(plan: AuditPlan, claimed: float | None, level: float) -> Guesses:
    if claimed is None:
        return planned_without_noise(plan.canaries, (1 - sample_rate(plan.run)) ** plan.run.steps)
    return planned_guesses(plan.canaries, claimed, plan.delta, level)


def _scores(plan: AuditPlan, releases: np.ndarray, rounds: int) -> np.ndarray:
    """Step 2: from all that was opened up to a round, float64 (canaries,)."""
    run, training = plan.run, plan.run.config.training
    claim = Claim(run.noise_multiplier, sample_rate(run))
    if run.config.privacy.mechanism == "distributed":  # each step is opened by itself
        steps = rounds * training.local_steps
        return scores_of(releases[:steps], np.eye(steps), claim)
    order = Steps(training.local_steps, rates_of(run)[: rounds * training.local_steps], training.momentum,
                  run.config.keeps_momentum)  # fmt: skip
    return scores_of(releases[:rounds], step_responses(order), claim)
