"""What is clear before the first round, alike at all parties: headroom, who may be left out of a sum, and privacy.

Everything here follows from the configuration and other public values. Privacy is planned as a whole: what the rest of a
run may release of a hospital's patients (`plan_release`), with noise of its own or of all hospitals (`mechanism_of`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mpc_fl.aggregation.mask_graph import most_colluding
from mpc_fl.aggregation.norm_plan import check_of
from mpc_fl.aggregation.rules import Description, Rules
from mpc_fl.audit.reveal_ledger import Scalar
from mpc_fl.config.config import Config, party_names
from mpc_fl.config.deadlines import deadlines_of, peer_deadlines_of
from mpc_fl.config.evaluation import Evaluated
from mpc_fl.config.protocols import MASKS_BETWEEN_ALL_UP_TO
from mpc_fl.crypto.ring import FixedPoint, MeanHeadroom
from mpc_fl.errors import ConfigError, DataError, HeadroomError, PrivacyBudgetError
from mpc_fl.federation.feature_statistics import plan_features
from mpc_fl.federation.group_evaluation import plan_groups
from mpc_fl.federation.noised_calibration import plan_calibration
from mpc_fl.federation.noised_evaluation import plan_noised_evaluation
from mpc_fl.learning.data.loading import public_sizes
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.parameters import flatten_parameters
from mpc_fl.learning.models.trainable import set_trainable
from mpc_fl.learning.privacy.accounting import (
    ROUNDING,
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
from mpc_fl.roles import AGGREGATOR, hospital_names
from mpc_fl.sharing.crypten_runtime import CrypTenRuntime


def headroom_of(config: Config) -> MeanHeadroom:
    """The headroom of the weighted mean over all hospitals; `require` it before a run."""
    fixed_point = FixedPoint(config.aggregation.fraction_bits, config.aggregation.update_bound)
    return MeanHeadroom(fixed_point, config.federation.hospitals)


def sum_rules(config: Config) -> Rules:
    """How the sums of a training run are made: closing masks only where a hospital may be left out of one, a graph of masks
    only beyond 16 hospitals.

    Raises `ConfigError` for a quorum that does not hide a summand from as many colluding hospitals as are configured.
    """
    federation = config.federation
    _require_hidden(config)
    may_leave_out = federation.quorum_size < federation.hospitals or config.aggregation.norm_check
    closing = config.noise_colluders + 1 if may_leave_out else 0
    hospitals = tuple(hospital_names(federation.hospitals))
    rules = Rules(AGGREGATOR, hospitals, federation.quorum_size, closing, deadlines_of(config).summand)
    if config.aggregation.mask_neighbours == "all" or len(hospitals) <= MASKS_BETWEEN_ALL_UP_TO:
        return rules
    return replace(rules, colluders=most_colluding(len(hospitals), config.noise_colluders))


def peer_rules(config: Config) -> Rules:
    """How the sums of a run among peers are made, but for who proposes, who is the opener of the rules of a round.

    Always with closing masks: each hospital opens a slice, and none of them may open it by itself. Raises `ConfigError` as
    `sum_rules` does.
    """
    _require_hidden(config)
    hospitals, closing = tuple(hospital_names(config.federation.hospitals)), config.noise_colluders + 1
    seconds = peer_deadlines_of(config).summand
    return Rules(hospitals[0], hospitals, config.federation.quorum_size, closing, seconds)


def _require_hidden(config: Config) -> None:
    federation, colluders = config.federation, config.privacy.colluders or 0
    if colluders > federation.quorum_size - 2:
        whom = f"{federation.quorum_size - 2} hospitals"
        raise ConfigError(
            f"a summand is masked by the other hospitals of its sum: a quorum of {federation.quorum_size} hides it from "
            f"{whom if config.among_peers else f'the aggregator with {whom}'}, not with privacy.colluders={colluders}",
            "raise federation.quorum, or lower privacy.colluders",
        )


def largest_weight_total(config: Config) -> int:
    """The power of two that no total of weights exceeds: that of all hospitals, with room for who is counted later."""
    return 1 << (2 * config.federation.hospitals * config.aggregation.count_bound - 1).bit_length()


def with_norm_check(
    rules: Rules, config: Config, mechanism: DistributedGaussian | None, parameters: int, weight_total: int
) -> Rules:
    """The rules of the sums that may have a check of norms: of updates or gradients."""
    return replace(rules, check=check_of(config, headroom_of(config), mechanism, parameters, weight_total))


def budget_of(config: Config) -> PrivacyBudget:
    """What a hospital's patients are promised over all it releases from their data."""
    return PrivacyBudget(config.privacy.epsilon, config.privacy.delta, config.privacy.accountant)


@dataclass(frozen=True)
class Done:
    """How far a run has come, by a hospital's last checkpoint and its privacy ledger.

    `rounds`: the last one that is complete, None before the sums that come before the first. `charged`, `features`,
    `evaluations`, `validations`, `calibrations` and `groups`: how many rounds, sums of features, of evaluation on test and on
    validation patients, of calibration and of groups were charged, those that were lost among them. `ends`: after which rounds it
    was complete, and evaluated, before it was given more.
    """

    rounds: int | None = None
    charged: int = 0
    features: int = 0
    evaluations: int = 0
    validations: int = 0
    calibrations: int = 0
    ends: tuple[int, ...] = ()
    groups: int = 0


NOTHING_DONE = Done()
_SUMS_OF_GROUPS = 2  # of sizes and of counts


def _to_come(left: int, planned: int, charged: int) -> int:
    """How many releases are left of a kind, with what is unspent of those that may be lost."""
    return max(left, planned - charged)


def rounds_to_come(config: Config, done: Done = NOTHING_DONE) -> int:
    """Rounds that a run may still charge: those it lacks, and the spare ones that were not lost yet."""
    rounds = config.training.rounds
    return _to_come(max(1, rounds - (done.rounds or 0)), rounds + config.privacy.spare_rounds, done.charged)


def releases_beside_steps(config: Config, done: Done = NOTHING_DONE) -> list[SubsampledGaussian]:
    """What a run may still charge besides rounds: sums of features, of noised evaluation on test and validation patients and in
    groups, and of calibration, from public values alone."""
    spare, events = config.privacy.spare_rounds, list[SubsampledGaussian]()
    features = plan_features(config).event() if config.data.normalise == "secure" else None
    if features is not None:
        times = _to_come(int(done.rounds is None), 1 + min(1, spare), done.features)
        events += [features] * (times if done.rounds is None else 0)
    charged: tuple[tuple[Evaluated, int], ...] = (("test", done.evaluations), ("validation", done.validations))
    for whom, before in charged:
        evaluation = plan_noised_evaluation(config, whom)
        every = range(config.last_round + 1)
        ends = done.ends if any(config.evaluates(number, whom) for number in every) else ()
        numbers = [number for number in every if config.evaluates(number, whom) or number in ends]
        if evaluation is not None and numbers:
            left = [number for number in numbers if done.rounds is None or number > done.rounds]
            times = _to_come(len(left), len(numbers) + spare, before)
            events += [evaluation.event(times)] if times else []
    calibration = plan_calibration(config)
    event = None if calibration is None else calibration.event()
    if event is not None and (done.rounds is None or done.rounds < config.last_round):
        events += [event] * _to_come(1, 1 + min(1, spare), done.calibrations)
    return [*events, *_releases_of_groups(config, done)]


def _releases_of_groups(config: Config, done: Done) -> list[SubsampledGaussian]:
    """Two sums for each evaluation in groups, one of which may be lost."""
    planned, last = plan_groups(config), config.last_round
    event = None if planned is None else planned.event()
    numbers = {*done.ends, last} if config.evaluates_groups(last) else set[int]()
    left = [number for number in numbers if done.rounds is None or number > done.rounds]
    if event is None or not left:
        return []
    times = _to_come(
        _SUMS_OF_GROUPS * len(left), _SUMS_OF_GROUPS * (len(numbers) + min(1, config.privacy.spare_rounds)), done.groups
    )
    return [event] * times


def sample_rate_of(config: Config, patients: int) -> float:
    """Probability with which a step takes a patient of a hospital with so many: with a mechanism the same at all.

    Raises `ConfigError` where nothing public says how small hospitals may be.
    """
    private = config.privacy.mechanism != "none"
    return sampling_rate(config, public_sizes(config).smallest if private else patients)


def require_public_values(config: Config) -> None:
    """Raise `ConfigError` where a run with a privacy mechanism would take a hospital's number of patients for a public one, or
    so many of its patients that one who is removed has another in the place."""
    if config.privacy.mechanism == "none":
        return
    limits, noised_tests = config.data.subset, config.evaluation.noise_multiplier is not None
    if config.data.source != "phantoms" and (limits.train_patients or (limits.test_patients and noised_tests)):
        raise ConfigError(
            "of a hospital with more patients than data.subset one who is removed has another in the place: that is two who "
            "change, and epsilon is for one",
            "leave data.subset null; for a short run lower training.rounds or training.local_steps",
        )
    if config.aggregation.weighted:
        raise ConfigError(
            "aggregation.weighted would open the exact number of patients, which one patient more or less changes",
            "leave it null: with a privacy mechanism hospitals weigh the same",
        )
    public_sizes(config)


def require_smallest_site(config: Config, patients: int, who: str) -> None:
    """Raise `DataError` for a hospital with fewer training patients than all agreed that each must have."""
    if patients < config.federation.smallest_site:
        raise DataError(
            f"{who} has fewer training patients than federation.smallest_site, {config.federation.smallest_site}",
            "nothing was sent; let all agree on a lower bound, or leave this hospital out",
        )


def plan_release(
    config: Config, patients: int, spent: Iterable[SubsampledGaussian], who: str, done: Done = NOTHING_DONE
) -> SubsampledGaussian | None:
    """What the rest of the run will release of a hospital's patients; `None` without differential privacy.

    Sampling rate and noise follow from public values: the noise multiplier is the configured one, or the smallest with which
    the run, its spare rounds, and what is opened besides fit what `spent` leaves of the budget. The number of `patients` is
    held against public bounds and against delta; it enters nothing that is released. Raises `PrivacyBudgetError` when
    nothing is left, the run does not fit, delta is too large, or a bound does not hold, `HeadroomError` for more patients
    than sums have room for, `ConfigError` where a public figure is missing, `DataError` for fewer than
    `federation.smallest_site`. Messages begin with `who`.
    """
    if patients > config.aggregation.count_bound:
        raise HeadroomError(f"{who} has more patients than aggregation.count_bound", "raise aggregation.count_bound")
    require_smallest_site(config, patients, who)
    settings = config.privacy
    if settings.mechanism == "none":
        return None
    require_public_values(config)
    check_delta(settings.delta, patients, who)
    sizes = public_sizes(config)
    if patients < sizes.smallest:
        raise PrivacyBudgetError(
            f"{who} has fewer patients than privacy.smallest_hospital, {sizes.smallest}", "lower that bound"
        )
    if patients > sizes.largest:
        raise PrivacyBudgetError(
            f"{who} has more patients than privacy.largest_hospital, {sizes.largest}", "raise that bound"
        )
    past = [*spent, *releases_beside_steps(config, done)]
    rate, steps = sample_rate_of(config, patients), rounds_to_come(config, done) * config.training.local_steps
    noise = settings.noise_multiplier
    if settings.mechanism == "distributed":
        planned = mechanism_of(config).event(rate, steps)
        noise = planned.noise_multiplier
    else:
        if noise is None:
            noise = calibrate_noise_multiplier(budget_of(config), rate, steps, past, who)
        planned = SubsampledGaussian(noise, rate, steps)
    total = epsilon_of([*past, planned], settings.delta, settings.accountant)
    if total > settings.epsilon + ROUNDING:
        raise PrivacyBudgetError(
            f"{who}: {steps} steps with noise multiplier {noise:g} would bring epsilon to {total:.3f}, beyond the budget of "
            f"{settings.epsilon:g}",
            "raise privacy.noise_multiplier, agree on a larger privacy.epsilon, or set the former to null to have it calibrated",
        )
    return planned


def features_run_name(config: Config) -> str:
    """How a privacy ledger names what the normalisation of the inputs spends."""
    return f"{run_name(config)} features"


def evaluation_run_name(config: Config) -> str:
    """How a privacy ledger names what noised evaluation spends."""
    return f"{run_name(config)} evaluation"


def validation_run_name(config: Config) -> str:
    """How a privacy ledger names what noised evaluation on validation patients spends."""
    return f"{run_name(config)} validation"


def calibration_run_name(config: Config) -> str:
    """How a privacy ledger names what calibration spends."""
    return f"{run_name(config)} calibration"


def groups_run_name(config: Config) -> str:
    """How a privacy ledger names what noised evaluation in groups spends."""
    return f"{run_name(config)} groups"


def run_name(config: Config) -> str:
    """How a privacy ledger names this run: two runs of one configuration differ by their sessions."""
    return f"{config.name} {config.federation.session}".strip()


def over_all_hospitals(config: Config, rules: Rules) -> Rules:
    """For sums over all hospitals alone, whoever may be missing later; of whole numbers, so without a check of norms."""
    return replace(rules, smallest=config.federation.hospitals, check=None, quorum=rules.smallest)


def describe_mean_update(config: Config, number: int) -> Description:
    """What the records of openings say of a round's mean update, alike at all parties."""
    privacy = privacy_of_steps(config, config.training.local_steps)
    return Description("sum of weighted updates", f"round {number}: mean update", privacy)


def mechanism_of(config: Config, parameters: int | None = None) -> DistributedGaussian:
    """The mechanism of a run with distributed noise, from public values alone and so the same at all parties.

    It is for P `parameters`, by default those of the configured network.
    A noise multiplier that is not configured is calibrated for a whole run, its spare rounds, and what is opened besides.
    The ring is Z_2^32 where headroom allows it, else Z_2^64. Raises `HeadroomError` or `PrivacyBudgetError`.
    """
    settings, training, hospitals = config.privacy, config.training, config.federation.hospitals
    if parameters is None:
        parameters = len(flatten_parameters(set_trainable(build_model(config), config.training.trainable)))
    absent = config.absent_noise()
    sizes, rate = public_sizes(config), sample_rate_of(config, 0)
    noise = settings.noise_multiplier
    if noise is None:
        distance = step_total_variation(parameters, hospitals, absent)
        steps, beside = rounds_to_come(config) * training.local_steps, releases_beside_steps(config)
        noise = calibrate_noise_multiplier(budget_of(config), rate, steps, beside, "the federation", distance)
    most = math.ceil(rate * sizes.largest)
    divisor = training.batch_size
    terms = MechanismTerms(parameters, hospitals, absent, most, settings.clipping_norm, noise, divisor=divisor)
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
        "unit": config.data.counted_unit,
        "steps": steps,
        "clipping norm": settings.clipping_norm,
        "delta": settings.delta,
        "epsilon of all rounds at most": settings.epsilon,
    }


def training_runtime(links: Links, config: Config) -> CrypTenRuntime:
    """CrypTen over all parties of a training run that are there at its start."""
    world = [name for name in party_names(config) if name == links.name or links.alive(name)]
    return CrypTenRuntime(links, world, None, config.aggregation.fraction_bits)
