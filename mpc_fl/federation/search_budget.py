"""What a search over settings may spend: several runs on the same patients, and a last one, within one budget.

Every trial is a run like any other: each hospital charges all that it releases to its privacy ledger before it leaves. What
a patient is promised is the composition of all that is in the ledger, the trials that were not chosen included, so choosing
among them costs nothing more: it is post-processing of what was opened and charged. (Papernot and Steinke, ICLR 2022, charge
less where only the best trial is shown; here all are opened.)

All trials have one noise multiplier, the smallest with which their composition fits the share of the budget that the search
may take. Without a share it is the one with which trials and a last run as dear as the dearest trial fit together, as if that
had the same noise; the last run then gets what is left by the ledgers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpc_fl.config.config import Config
from mpc_fl.errors import PrivacyBudgetError
from mpc_fl.federation.planning import (
    budget_of,
    releases_beside_steps,
    rounds_to_come,
    sample_rate_of,
)
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.parameters import flatten_parameters
from mpc_fl.learning.models.trainable import set_trainable
from mpc_fl.learning.privacy.accounting import (
    LARGEST_NOISE_MULTIPLIER,
    SubsampledGaussian,
    calibrate_noise_multiplier,
    epsilon_of,
)
from mpc_fl.learning.privacy.distributed_gaussian import step_total_variation

_TOLERANCE = 1e-3
_MARGIN = 1e-3  # of epsilon: what is planned may be composed in another order and grouping


def steps_of(config: Config) -> Callable[[float], SubsampledGaussian]:
    """What the steps of a whole run, its spare rounds among them, cost every patient with a noise multiplier."""
    rate, steps, distance = sample_rate_of(config, 0), rounds_to_come(config) * config.training.local_steps, 0.0
    if config.privacy.mechanism == "distributed":
        parameters = len(flatten_parameters(set_trainable(build_model(config), config.training.trainable)))
        distance = step_total_variation(parameters, config.federation.hospitals, config.absent_noise())
    return lambda noise: SubsampledGaussian(noise, rate, steps, distance)


def noise_of_trials(
    trials: Sequence[Config], last: Sequence[Config], spent: Sequence[Sequence[SubsampledGaussian]], share: float | None
) -> float:
    """The noise multiplier of all trials; `last` are the settings that the last run may have, `spent` what each hospital's
    ledger holds before. Raises `PrivacyBudgetError` where none is large enough."""
    budget, beside = budget_of(trials[0]), [event for trial in trials for event in releases_beside_steps(trial)]
    steps = [steps_of(trial) for trial in trials]
    if share is None:
        candidates = [(steps_of(config), releases_beside_steps(config)) for config in last]
        dearest = max(
            candidates, key=lambda pair: epsilon_of([pair[0](1.0), *pair[1]], budget.delta, budget.accountant)
        )
        steps, beside = [*steps, dearest[0]], [*beside, *dearest[1]]
    target = budget.epsilon * (1.0 if share is None else share) * (1 - _MARGIN)

    def total(noise: float) -> float:
        events = [*beside, *(of(noise) for of in steps)]
        return max(epsilon_of([*before, *events], budget.delta, budget.accountant) for before in _different(spent))

    high = 1.0
    while total(high) > target:
        high *= 2
        if high > LARGEST_NOISE_MULTIPLIER:
            raise PrivacyBudgetError(
                f"{len(trials)} trials fit epsilon {target:.3g} with no noise multiplier up to {LARGEST_NOISE_MULTIPLIER:g}",
                "try fewer settings, raise --share or evaluation.noise_multiplier, or begin other privacy ledgers",
            )
    low = high / 2
    while low > 1e-3 and total(low) <= target:
        high, low = low, low / 2
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        high, low = (middle, low) if total(middle) <= target else (high, middle)
    return high


def _different(spent: Sequence[Sequence[SubsampledGaussian]]) -> list[Sequence[SubsampledGaussian]]:
    """Hospitals that have spent the same count once; none has spent nothing."""
    return list({tuple(events): events for events in spent}.values()) or [()]


def noise_of_last(config: Config, spent: Sequence[Sequence[SubsampledGaussian]]) -> float:
    """The noise multiplier of the last run: the smallest that fits what each hospital's ledger leaves. Raises
    `PrivacyBudgetError`."""
    event, beside = steps_of(config)(1.0), releases_beside_steps(config)
    return max(
        calibrate_noise_multiplier(
            budget_of(config), event.sample_rate, event.steps, [*before, *beside], "the last run", event.total_variation
        )
        for before in _different(spent)
    )
