"""What a run with more rounds than it was begun with has room for: in the patients' budget, and for the mean of its last models.

Nothing that was released is planned anew. The privacy ledger holds the noise of each round that left the hospital, and what is to
come is planned on top of that. Noise that was calibrated had the whole budget for the rounds of then, so for more of them a
larger `privacy.epsilon` has to be agreed on, or `privacy.noise_multiplier` set. Distributed noise follows from public values
alone, and what is left in a hospital's ledger is none: there the noise multiplier has to be set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpc_fl.config.config import Config
from mpc_fl.config.continuing import ROUNDS, changed_settings
from mpc_fl.errors import ConfigError, PrivacyBudgetError
from mpc_fl.federation.checkpoint import Checkpoint
from mpc_fl.federation.planning import (
    Done,
    budget_of,
    mechanism_of,
    releases_beside_steps,
    rounds_to_come,
    sample_rate_of,
)
from mpc_fl.learning.privacy.accounting import SubsampledGaussian, calibrate_noise_multiplier, epsilon_of

_ROOM = 1.01  # what is proposed is a little more than what is needed


def require_room_for_mean(config: Config, done: int) -> None:
    """Raise `ConfigError` where a run with more rounds, of which so many are `done`, would end in a mean of fewer global models
    than `training.average_last`: those before are in the mean that it goes on from, and in none that is taken later."""
    per_round, last = config.global_models // config.training.rounds, config.training.average_last or 1
    if (config.training.rounds - done) * per_round < last:
        least = done + -(-last // per_round)
        raise ConfigError(
            f"the final model is to be the mean of the last {last} (training.average_last), and those before round {done + 1} "
            "count no more in a run that is given more rounds",
            f"set {ROUNDS} to {least} or more",
        )


def ends_before(saved: Checkpoint | None, config: Config) -> tuple[int, ...]:
    """After which rounds a run was complete before it was given more, by a hospital's last checkpoint."""
    if saved is None:
        return ()
    ends = tuple(saved.facts.get("ends", ()))
    complete = ROUNDS in changed_settings(saved.settings, config) and saved.round == _rounds(saved.settings)
    return (*ends, saved.round) if complete else ends


def require_room_for_rounds(
    config: Config, saved: Checkpoint, done: Done, patients: int, spent: Sequence[SubsampledGaussian], who: str
) -> None:
    """Raise `PrivacyBudgetError` where a run gets more rounds and its calibrated noise has planned the budget without them.

    The line says what is left of the budget and what to set. `spent` is all that a hospital's ledger holds, the noise of the
    rounds that are done among it. With `distributed` noise, raises `ConfigError` also where a larger budget was agreed on and no
    noise multiplier: parties could not calibrate it alike.
    """
    settings = config.privacy
    changed = changed_settings(saved.settings, config)
    if settings.mechanism == "none" or ROUNDS not in changed or settings.noise_multiplier is not None:
        return
    raised = "privacy.epsilon" in changed and changed["privacy.epsilon"][0] < settings.epsilon
    if raised and settings.mechanism == "local":
        return  # calibrated to what is left
    steps, rate = rounds_to_come(config, done) * config.training.local_steps, sample_rate_of(config, patients)
    past, used = [*spent, *releases_beside_steps(config, done)], _noise_of_rounds(config, saved, spent)
    before = epsilon_of(spent, settings.delta, settings.accountant)
    after = epsilon_of([*past, _steps(config, used, rate, steps)], settings.delta, settings.accountant)
    if settings.mechanism == "distributed" and raised:
        raise ConfigError(
            f"distributed noise of rounds that are added is set, so that all parties plan alike: rounds 1 to {saved.round} had "
            f"noise multiplier {used:.4g}, with which all would come to epsilon {after:.3f}",
            f"set privacy.noise_multiplier, and privacy.epsilon to {after * _ROOM:.2f} or more for that one",
        )
    left = max(0.0, settings.epsilon - before)
    raise PrivacyBudgetError(
        f"{who}: the noise of rounds 1 to {saved.round} was calibrated to the whole budget: epsilon {before:.3f} of "
        f"{settings.epsilon:g} is spent, {left:.3f} is left, and {steps} steps more with the same noise multiplier "
        f"{used:.4g} would bring it to {after:.3f}",
        f"set privacy.epsilon to {after * _ROOM:.2f} or more{_or_noise(config, past, rate, steps)}",
    )


def _or_noise(config: Config, past: list[SubsampledGaussian], rate: float, steps: int) -> str:
    """With which noise the steps fit what is left of the budget, in words; empty where none does."""
    both = " and privacy.noise_multiplier with it" if config.privacy.mechanism == "distributed" else ""
    try:
        noise = calibrate_noise_multiplier(budget_of(config), rate, steps, past)
    except PrivacyBudgetError:
        return both
    return f"{both}, or privacy.noise_multiplier to {noise * _ROOM:.4g} to stay within what is left"


def _steps(config: Config, noise: float, rate: float, steps: int) -> SubsampledGaussian:
    if config.privacy.mechanism == "local":
        return SubsampledGaussian(noise, rate, steps)
    return mechanism_of(config.with_values(privacy={"noise_multiplier": noise})).event(rate, steps)


def _noise_of_rounds(config: Config, saved: Checkpoint, spent: Sequence[SubsampledGaussian]) -> float:
    """The noise multiplier of the rounds that are done: the configured one of then, else the last one in the ledger."""
    configured = saved.settings.get("privacy", {}).get("noise_multiplier")
    noise = saved.facts.get("noise multiplier", configured)
    return float(noise) if isinstance(noise, (int, float)) and noise > 0 else spent[-1].noise_multiplier


def _rounds(settings: Mapping[str, Any]) -> Any:
    return settings.get("training", {}).get("rounds")
