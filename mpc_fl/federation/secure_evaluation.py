"""Evaluation over all hospitals: each counts on its own test patients, and only the sum of the counts is opened.

A hospital's own evaluation stays with it and is made after every round. Sums are opened after the rounds that
`evaluation.every` says (`Config.evaluates`), by default before the first one and after the last.

Exact counts carry no noise, so their sum is opened over all hospitals or not at all, unless `federation.evaluate_incomplete`
says otherwise: the difference of two sums would be one hospital's counts. With `evaluation.noise_multiplier` a noised
confusion matrix is opened instead (`noised_evaluation`), charged before it leaves, over any quorum.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Rules
from mpc_fl.aggregation.words import next_word, say
from mpc_fl.config.config import Config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import QuorumError, SumLostError
from mpc_fl.federation.aggregator_state import Aggregator
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.federation.model_digests import sum_terms
from mpc_fl.federation.noised_evaluation import (
    EvaluationPlan,
    NoisedEvaluation,
    decode_confusion,
    encode_confusion,
    plan_noised_evaluation,
)
from mpc_fl.federation.planning import evaluation_run_name, over_all_hospitals
from mpc_fl.learning.models.evaluation import (
    Evaluation,
    decode_evaluation,
    encode_evaluation,
    evaluate_locally,
    evaluation_length,
    predict,
)
from mpc_fl.roles import AGGREGATOR
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)

Evaluated = Evaluation | NoisedEvaluation


def hospital_evaluation(
    hospital: Hospital, domain: SecretDomain, rules: Rules, hospitals: tuple[str, ...], plan: RoundPlan
) -> Evaluation | None:
    """Step 6 at a hospital; also run once before the first round. Returns its own evaluation, which stays with it, or `None`
    when it was left out of what the others opened.

    Raises `PrivacyBudgetError` before anything is sent where a noised evaluation would exceed the budget.
    """
    number, config = plan.number, hospital.config
    domain.links.set_phase(f"round {number} evaluation")
    probabilities = torch.softmax(predict(hospital.model, hospital.test.inputs).double(), dim=1)
    own = evaluate_locally(probabilities, hospital.test.labels)
    if not config.evaluates(number):
        return own
    if next_word(domain.links, AGGREGATOR, ("evaluate", "skip"))["word"] == "evaluate":
        noised = plan_noised_evaluation(config)
        release: Callable[[], None] | None = None
        if noised is None:
            exact = encode_evaluation(own, config.aggregation.count_bound)
            counts = Private(f"evaluation of {hospital.name}", exact)
        else:
            counts, release = _noised(hospital, noised, probabilities, plan), hospital.ledger.release
        rules, label = _evaluating(config, rules), ("evaluation", *plan.round_of)
        seen = sum_terms(config, plan.weight_total, hospital.digests)
        agreed = AgreedSum(hospitals, label, _evaluation_counts(config, number), seen)
        try:
            admitted = contribute(domain, rules, agreed, counts, release)
        except SumLostError as error:
            log.warning("%s", error)
            return own
        if admitted and hospital.name not in admitted:
            return None
    return own


def _noised(
    hospital: Hospital, noised: EvaluationPlan, probabilities: torch.Tensor, plan: RoundPlan
) -> Private[torch.Tensor]:
    """Charge the release of a noised confusion matrix, then make this hospital's part of it."""
    run, budget = evaluation_run_name(hospital.config), hospital.budget
    hospital.ledger.charge(noised.event(1), run=run, round_number=plan.number, budget=budget, reserve=True)
    seed, threads = hospital.noise_seed.derive("evaluation", *plan.round_of), hospital.config.runtime.threads
    # A probability that is not finite is that of a model that diverged: its prediction is as bad as any.
    predicted = torch.nan_to_num(probabilities).argmax(dim=1)
    return encode_confusion(noised, hospital.test, predicted, seed, threads)


def _evaluation_counts(config: Config, number: int) -> Description:
    noise = config.evaluation.noise_multiplier
    if noise is None:
        return Description("sum of evaluation counts", f"round {number}: evaluation counts")
    privacy = {"mechanism": config.privacy.mechanism, "unit": "test patient", "noise multiplier": noise}
    return Description("sum of confusion matrices", f"round {number}: noised evaluation", privacy)


def _evaluating(config: Config, rules: Rules) -> Rules:
    """Exact counts are opened over all hospitals or not at all, unless configured otherwise; noised ones over any quorum."""
    if config.evaluation.noise_multiplier is not None:
        return replace(rules, check=None)
    return rules if config.federation.evaluate_incomplete else over_all_hospitals(config, rules)


def aggregator_evaluation(
    aggregator: Aggregator, domain: SecretDomain, rules: Rules, hospitals: tuple[str, ...], plan: RoundPlan
) -> tuple[tuple[str, ...], Evaluated | None]:
    """Step 6 at the aggregator; also run once before the first round: who goes on, and what was opened.

    That is `None` when no evaluation is due, or somebody is missing. Who was left out of a sum that was opened has no record
    of it to sign, and comes back with the next round.
    """
    config = aggregator.config
    if not config.evaluates(plan.number):
        return hospitals, None
    domain.links.set_phase(f"round {plan.number} evaluation")
    rules, label = _evaluating(config, rules), ("evaluation", *plan.round_of)
    if len(hospitals) < rules.smallest:
        say(domain.links, hospitals, "skip")
        return hospitals, None
    say(domain.links, hospitals, "evaluate")
    classes, noised = len(config.data.classes), plan_noised_evaluation(config)
    length = evaluation_length(classes) if noised is None else noised.length
    seen = sum_terms(config, plan.weight_total, aggregator.digests)
    agreed = AgreedSum(hospitals, label, _evaluation_counts(config, plan.number), seen)
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
    if noised is None:
        return present, decode_evaluation(total, classes)
    return present, decode_confusion(noised, total, len(present))
