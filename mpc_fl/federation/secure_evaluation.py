"""Evaluation over all hospitals: each counts on its own patients, and only the sum of the counts is opened.

It is made on test patients, and on validation patients where some are kept aside. A hospital's own evaluation stays with it and
is made after every round. Sums are opened after the rounds that `Config.evaluates` says: of test patients by default before the
first one and after the last.

Exact counts carry no noise, so their sum is opened over all hospitals or not at all, unless `federation.evaluate_incomplete`
says otherwise: the difference of two sums would be one hospital's counts. With `evaluation.noise_multiplier` a noised
confusion matrix is opened instead (`noised_evaluation`), charged before it leaves, over any quorum.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Rules
from mpc_fl.aggregation.words import next_word, say
from mpc_fl.audit.opening_record import Scalar
from mpc_fl.config.config import Config
from mpc_fl.config.evaluation import Evaluated as Of
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import QuorumError, SumLostError
from mpc_fl.federation.aggregator_state import Aggregator
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.group_evaluation import OwnDecisions
from mpc_fl.federation.group_sums import aggregator_groups, hospital_groups
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.federation.model_digests import ModelDigests, sum_terms
from mpc_fl.federation.noised_evaluation import (
    EvaluationPlan,
    NoisedEvaluation,
    decode_confusion,
    encode_confusion,
    plan_noised_evaluation,
)
from mpc_fl.federation.planning import evaluation_run_name, over_all_hospitals, validation_run_name
from mpc_fl.learning.device import on_device
from mpc_fl.learning.models.evaluation import (
    Evaluation,
    decode_evaluation,
    encode_evaluation,
    evaluate_locally,
    evaluation_length,
    predict,
    predict_each,
)
from mpc_fl.roles import AGGREGATOR
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)

Evaluated = Evaluation | NoisedEvaluation


def phase_of(whom: Of) -> str:
    """How phases and labels name evaluation on these patients."""
    return "evaluation" if whom == "test" else "validation"


@dataclass(frozen=True)
class RoundOpened:
    """Which hospitals made a round, what evaluation opened of its model, and what else the aggregator notes `about` it."""

    hospitals: tuple[str, ...]
    evaluation: Evaluated | None
    validation: Evaluated | None = None
    about: dict[str, Any] = field(default_factory=dict)


def hospital_evaluation(
    hospital: Hospital, domain: SecretDomain, rules: Rules, hospitals: tuple[str, ...], plan: RoundPlan
) -> Evaluation | None:
    """Step 6 at a hospital, on validation and on test patients; also run once before the first round. Returns its own
    evaluation, which stays with it, or `None` when it was left out of what the others opened.

    Raises `PrivacyBudgetError` before anything is sent where a noised evaluation would exceed the budget.
    """
    if hospital.config.evaluates(plan.number, "validation"):
        validated = _evaluate(hospital, domain, rules, hospitals, plan, "validation")
        if validated is None:
            return None
        hospitals = validated.hospitals
    found = _evaluate(hospital, domain, rules, hospitals, plan, "test")
    if found is None:
        return None
    if hospital.config.evaluates_groups(plan.number):
        of_tests = evaluation_rules(hospital.config, rules, "test")
        if not hospital_groups(hospital, domain, of_tests, found.hospitals, plan, found.found):
            return None
    return found.found.own


@dataclass(frozen=True)
class _Own:
    """A hospital's own evaluation, and who is still in the round."""

    found: OwnDecisions
    hospitals: tuple[str, ...]


def own_evaluation(hospital: Hospital, number: int, whom: Of) -> OwnDecisions:
    """What a hospital finds on its own patients after round `number`, by the model that it has."""
    config = hospital.config
    # Where test patients are left alone, a hospital does not look at its own either.
    records = hospital.records_of(whom if config.evaluation.test else "validation")
    computed = on_device(hospital.model, hospital.device.exact)
    noised = plan_noised_evaluation(config, whom) if config.evaluates(number, whom) else None
    # Sensitivity is that of one patient: nobody's prediction may depend on who else is there.
    logits = (predict if noised is None else predict_each)(computed, records.inputs).double()
    if not len(records):  # nobody to evaluate on here: zeros in the sum, which nothing tells apart in it
        logits = logits.new_zeros(0, len(config.data.classes))
    calibration = hospital.calibration
    probabilities = torch.softmax(logits, dim=1) if calibration is None else calibration.probabilities(logits)
    predicted = None if calibration is None else calibration.decided(logits)
    own = evaluate_locally(probabilities, records.labels, predicted)
    # A probability that is not finite is that of a model that diverged: its prediction is as bad as any.
    decided = torch.nan_to_num(probabilities).argmax(dim=1) if predicted is None else predicted
    return OwnDecisions(own, probabilities, decided)


Release = Callable[[], None]


def counts_to_sum(
    hospital: Hospital, found: OwnDecisions, plan: RoundPlan, whom: Of
) -> tuple[Private[torch.Tensor], Release | None]:
    """What enters the sum of counts, charged where it carries noise, and what enters the privacy ledger when it leaves."""
    config, noised = hospital.config, plan_noised_evaluation(hospital.config, whom)
    if noised is not None:
        return _noised(hospital, noised, found.decided, plan, whom), hospital.ledger.release
    counts = Private(f"evaluation of {hospital.name}", encode_evaluation(found.own, config.aggregation.count_bound))
    if whom == "validation" and config.privacy.mechanism == "none":
        return counts, hospital.releasing(plan.number)  # they are patients of the privacy ledger, as those who train
    return counts, None


def agreed_evaluation(
    config: Config, hospitals: tuple[str, ...], plan: RoundPlan, whom: Of, digests: ModelDigests
) -> AgreedSum:
    """The sum of counts, as all its parties know it."""
    seen = sum_terms(config, plan.weight_total, digests)
    label = (phase_of(whom), *plan.round_of)
    return AgreedSum(hospitals, label, _evaluation_counts(config, plan.number, whom), seen)


def _evaluate(
    hospital: Hospital, domain: SecretDomain, rules: Rules, hospitals: tuple[str, ...], plan: RoundPlan, whom: Of
) -> _Own | None:
    config = hospital.config
    domain.links.set_phase(f"round {plan.number} {phase_of(whom)}")
    found = own_evaluation(hospital, plan.number, whom)
    if not config.evaluates(plan.number, whom):
        return _Own(found, hospitals)
    if next_word(domain.links, AGGREGATOR, ("evaluate", "skip"))["word"] == "evaluate":
        counts, release = counts_to_sum(hospital, found, plan, whom)
        agreed = agreed_evaluation(config, hospitals, plan, whom, hospital.digests)
        try:
            admitted = contribute(domain, evaluation_rules(config, rules, whom), agreed, counts, release)
        except SumLostError as error:
            log.warning("%s", error)
            return _Own(found, hospitals)
        if admitted and hospital.name not in admitted:
            return None
        hospitals = admitted or hospitals  # nobody: nothing was opened
    return _Own(found, hospitals)


def _noised(
    hospital: Hospital, noised: EvaluationPlan, predicted: torch.Tensor, plan: RoundPlan, whom: Of
) -> Private[torch.Tensor]:
    """Charge the release of a noised confusion matrix, then make this hospital's part of it."""
    run = (evaluation_run_name if whom == "test" else validation_run_name)(hospital.config)
    hospital.ledger.charge(noised.event(1), run=run, round_number=plan.number, budget=hospital.budget, reserve=True)
    seed, threads = hospital.noise_seed.derive(phase_of(whom), *plan.round_of), hospital.config.runtime.threads
    return encode_confusion(noised, hospital.records_of(whom), predicted, seed, threads)


def _evaluation_counts(config: Config, number: int, whom: Of) -> Description:
    noise, what = config.evaluation_noise(whom), phase_of(whom)
    if noise is None:
        return Description(f"sum of {what} counts", f"round {number}: {what} counts")
    unit = f"{whom} {config.data.counted_unit}"
    privacy: dict[str, Scalar] = {"mechanism": config.privacy.mechanism, "unit": unit, "noise multiplier": noise}
    return Description("sum of confusion matrices", f"round {number}: noised {what}", privacy)


def evaluation_rules(config: Config, rules: Rules, whom: Of) -> Rules:
    """Exact counts are opened over all hospitals or not at all, unless configured otherwise; noised ones over any quorum."""
    if config.evaluation_noise(whom) is not None:
        return replace(rules, check=None)
    return rules if config.federation.evaluate_incomplete else over_all_hospitals(config, rules)


def aggregator_evaluation(
    aggregator: Aggregator,
    domain: SecretDomain,
    rules: Rules,
    hospitals: tuple[str, ...],
    plan: RoundPlan,
    whom: Of = "test",
) -> tuple[tuple[str, ...], Evaluated | None]:
    """Step 6 at the aggregator; also run once before the first round: who goes on, and what was opened.

    That is `None` when no evaluation is due, or somebody is missing. Who was left out of a sum that was opened has no record
    of it to sign, and comes back with the next round.
    """
    config = aggregator.config
    if not config.evaluates(plan.number, whom):
        return hospitals, None
    domain.links.set_phase(f"round {plan.number} {phase_of(whom)}")
    rules = evaluation_rules(config, rules, whom)
    if len(hospitals) < rules.smallest:
        say(domain.links, hospitals, "skip")
        return hospitals, None
    say(domain.links, hospitals, "evaluate")
    classes, noised = len(config.data.classes), plan_noised_evaluation(config, whom)
    length = evaluation_length(classes) if noised is None else noised.length
    agreed = agreed_evaluation(config, hospitals, plan, whom, aggregator.digests)
    try:
        present, total = collect(domain, rules, agreed, plan.starts, torch.int64, (length,))
    except QuorumError as error:
        # Nothing was opened and nobody need wait: the round itself has its result.
        log.warning("%s", error)
        say(domain.links, hospitals, "fixed", hospitals=[])
        return hospitals, None
    except SumLostError as error:
        log.warning("%s", error)
        return hospitals, None
    return present, opened_evaluation(config, total, len(present), whom)


def evaluated_groups(
    aggregator: Aggregator,
    domain: SecretDomain,
    rules: Rules,
    hospitals: tuple[str, ...],
    plan: RoundPlan,
    evaluation: Evaluated | None,
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Groups of test patients at the aggregator, where that is due: who goes on, and what its line about the round says of them."""
    if not aggregator.config.evaluates_groups(plan.number):
        return hospitals, {}
    of_tests = evaluation_rules(aggregator.config, rules, "test")
    hospitals, found = aggregator_groups(aggregator, domain, of_tests, hospitals, plan, evaluation)
    return hospitals, {} if found is None else {"groups": found.to_json()}


def opened_evaluation(config: Config, total: torch.Tensor, hospitals: int, whom: Of) -> Evaluated:
    """What the opened sum of counts over so many hospitals says. Raises `ProtocolError` for one that cannot be."""
    noised = plan_noised_evaluation(config, whom)
    if noised is None:
        return decode_evaluation(total, len(config.data.classes))
    return decode_confusion(noised, total, hospitals)


def log_accuracy(number: int, evaluation: Evaluated) -> None:
    """Say what was opened after round `number`."""
    log.info("round %d: accuracy %.1f %% on the test records of all hospitals", number, 100 * evaluation.accuracy)
