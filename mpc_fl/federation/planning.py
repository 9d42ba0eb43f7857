"""What is clear before the first round, alike at all parties: headroom, who may be left out of a sum, and privacy.

Everything here follows from the configuration and other public values. Privacy is planned as a whole: what the rest of a
run may release of a hospital's patients (`plan_release`), with noise of its own or of all hospitals (`mechanism_of`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mpc_fl.aggregation.norm_check_session import check_of
from mpc_fl.aggregation.rules import Description, Rules
from mpc_fl.audit.reveal_ledger import Scalar
from mpc_fl.config.config import Config, party_names
from mpc_fl.crypto.ring import FixedPoint, MeanHeadroom
from mpc_fl.errors import HeadroomError, PrivacyBudgetError
from mpc_fl.federation.feature_statistics import plan_features
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.parameters import flatten_parameters
from mpc_fl.learning.privacy.accounting import (
    PrivacyBudget,
    SubsampledGaussian,
    calibrate_noise_multiplier,
    check_delta,
    epsilon_of,
)
from mpc_fl.learning.privacy.distributed_gaussian import (
    DistributedGaussian,
    MechanismTerms,
    plan_mechanism,
    step_total_variation,
)
from mpc_fl.learning.training.sampling import sampling_rate
from mpc_fl.links.links import Links
from mpc_fl.roles import AGGREGATOR, DEALER, hospital_names
from mpc_fl.sharing.crypten_runtime import CrypTenRuntime


def headroom_of(config: Config) -> MeanHeadroom:
    """The headroom of the weighted mean over all hospitals; `require` it before a run."""
    fixed_point = FixedPoint(config.aggregation.fraction_bits, config.aggregation.update_bound)
    return MeanHeadroom(fixed_point, config.federation.hospitals)


def sum_rules(config: Config) -> Rules:
    """How the sums of a training run are made: closing masks only where a hospital may be left out of one."""
    federation = config.federation
    may_leave_out = federation.quorum_size < federation.hospitals or config.aggregation.norm_check
    closing = config.noise_colluders + 1 if may_leave_out else 0
    seconds = federation.round_timeout or config.runtime.receive_timeout
    hospitals = tuple(hospital_names(federation.hospitals))
    return Rules(AGGREGATOR, hospitals, federation.quorum_size, closing, seconds)


def largest_weight_total(config: Config) -> int:
    """The power of two that no total of weights exceeds."""
    return 1 << (config.federation.hospitals * config.aggregation.count_bound - 1).bit_length()


def with_norm_check(
    rules: Rules, config: Config, mechanism: DistributedGaussian | None, parameters: int, weight_total: int
) -> Rules:
    """The rules of the sums that may have a check of norms: of updates or gradients."""
    return replace(rules, check=check_of(config, headroom_of(config), mechanism, parameters, weight_total))


def budget_of(config: Config) -> PrivacyBudget:
    """What a hospital's patients are promised over all it releases from their data."""
    return PrivacyBudget(config.privacy.epsilon, config.privacy.delta, config.privacy.accountant)


def plan_release(
    config: Config, patients: int, spent: Iterable[SubsampledGaussian], who: str, rounds_done: int = 0
) -> SubsampledGaussian | None:
    """What the rest of the run will release of a hospital's patients; `None` without differential privacy.

    The noise multiplier is the configured one, or the smallest with which the run fits what `spent` leaves of the budget.
    Raises `PrivacyBudgetError` when nothing is left, the run does not fit or delta is too large, `HeadroomError` for more
    patients than sums have room for. Messages begin with `who`.
    """
    if patients > config.aggregation.count_bound:
        raise HeadroomError(f"{who} has more patients than aggregation.count_bound", "raise aggregation.count_bound")
    settings, past = config.privacy, list(spent)
    if settings.mechanism == "none":
        return None
    check_delta(settings.delta, patients, who)
    rate = sampling_rate(config, patients)
    steps = max(1, config.training.rounds - rounds_done) * config.training.local_steps
    noise = settings.noise_multiplier
    if patients < (settings.smallest_hospital or 0):
        raise PrivacyBudgetError(f"{who} has fewer patients than privacy.smallest_hospital", "lower that bound")
    if settings.mechanism == "distributed":
        planned = mechanism_of(config).event(rate, steps)
        noise = planned.noise_multiplier
    else:
        if noise is None:
            noise = calibrate_noise_multiplier(budget_of(config), rate, steps, past, who)
        planned = SubsampledGaussian(noise, rate, steps)
    total = epsilon_of([*past, planned], settings.delta, settings.accountant)
    if total > settings.epsilon:
        raise PrivacyBudgetError(
            f"{who}: {steps} steps with noise multiplier {noise:g} would bring epsilon to {total:.3f}, beyond the budget of "
            f"{settings.epsilon:g}",
            "raise privacy.noise_multiplier, or set it to null to have it calibrated",
        )
    return planned


def features_run_name(config: Config) -> str:
    """How a privacy ledger names what the normalisation of the inputs spends."""
    return f"{run_name(config)} features"


def run_name(config: Config) -> str:
    """How a privacy ledger names this run: two runs of one configuration differ by their sessions."""
    return f"{config.name} {config.federation.session}".strip()


def over_all_hospitals(config: Config, rules: Rules) -> Rules:
    """For sums over all hospitals alone, whoever may be missing later; of whole numbers, so without a check of norms."""
    return replace(rules, smallest=config.federation.hospitals, check=None)


def describe_mean_update(config: Config, number: int) -> Description:
    """What the records of openings say of a round's mean update, alike at all parties."""
    privacy = privacy_of_steps(config, config.training.local_steps)
    return Description("sum of weighted updates", f"round {number}: mean update", privacy)


def mechanism_of(config: Config, parameters: int | None = None) -> DistributedGaussian:
    """The mechanism of a run with distributed noise, from public values alone and so the same at all parties.

    It is for P `parameters`, by default those of the configured network.
    A noise multiplier that is not configured is calibrated for the sampling rate of the smallest hospital there may be.
    The ring is Z_2^32 where headroom allows it, else Z_2^64. Raises `HeadroomError` or `PrivacyBudgetError`.
    """
    settings, training, hospitals = config.privacy, config.training, config.federation.hospitals
    if parameters is None:
        parameters = len(flatten_parameters(build_model(config)))
    # Whose noise may not be in a sum: that of colluders, and of hospitals that are absent.
    absent = config.noise_colluders + hospitals - config.federation.quorum_size
    noise = settings.noise_multiplier
    if noise is None:
        assert settings.smallest_hospital is not None  # the configuration demands it
        rate = min(1.0, training.batch_size / settings.smallest_hospital)
        distance = step_total_variation(parameters, hospitals, absent)
        steps = training.rounds * training.local_steps
        features = plan_features(config).event() if config.data.normalise == "secure" else None
        before = [] if features is None else [features]
        noise = calibrate_noise_multiplier(budget_of(config), rate, steps, before, "the federation", distance)
    terms = MechanismTerms(parameters, hospitals, absent, training.batch_size, settings.clipping_norm, noise)
    try:
        return plan_mechanism(terms, ring_bits=32)
    except HeadroomError:
        return plan_mechanism(terms, ring_bits=64)


def privacy_of_steps(config: Config, steps: int) -> dict[str, Scalar]:
    """What all parties may know of the privacy that `steps` steps spend: what was agreed, no hospital's own figure."""
    settings = config.privacy
    if settings.mechanism == "none":
        return {"mechanism": "none"}
    return {
        "mechanism": settings.mechanism,
        "unit": "patient",
        "steps": steps,
        "clipping norm": settings.clipping_norm,
        "delta": settings.delta,
        "epsilon of all rounds at most": settings.epsilon,
    }


def training_runtime(links: Links, config: Config) -> CrypTenRuntime:
    """CrypTen over all parties of a training run that are there at its start."""
    world = [name for name in party_names(config) if name != DEALER and (name == links.name or links.alive(name))]
    return CrypTenRuntime(links, world, None, config.aggregation.fraction_bits)
