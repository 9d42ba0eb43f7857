"""Evaluation over all hospitals: each counts on its own test patients, and only the sum of the counts is opened.

A hospital's own evaluation stays with it. Counts carry no noise, so their sum is opened over all hospitals or not at all,
unless `federation.evaluate_incomplete` says otherwise: the difference of two sums would be one hospital's counts.
"""

from __future__ import annotations

import logging

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
from mpc_fl.federation.planning import over_all_hospitals
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


def hospital_evaluation(
    hospital: Hospital, domain: SecretDomain, rules: Rules, hospitals: tuple[str, ...], plan: RoundPlan
) -> Evaluation:
    """Step 6 at a hospital; also run once before the first round."""
    number, config = plan.number, hospital.config
    domain.links.set_phase(f"round {number} evaluation")
    probabilities = torch.softmax(predict(hospital.model, hospital.test.inputs), dim=1)
    own = evaluate_locally(probabilities, hospital.test.labels)
    encoded = encode_evaluation(own, config.aggregation.count_bound)
    if next_word(domain.links, AGGREGATOR, ("evaluate", "skip"))["word"] == "evaluate":
        counts = Private(f"evaluation of {hospital.name}", encoded)
        rules, label = _evaluating(config, rules), ("evaluation", *plan.round_of)
        seen = sum_terms(config, plan.weight_total, hospital.digests)
        try:
            contribute(domain, rules, AgreedSum(hospitals, label, _evaluation_counts(number), seen), counts)
        except SumLostError as error:
            log.warning("%s", error)
    return own


def _evaluation_counts(number: int) -> Description:
    return Description("sum of evaluation counts", f"round {number}: evaluation counts")


def _evaluating(config: Config, rules: Rules) -> Rules:
    """Counts carry no noise: unless configured otherwise they are opened over all hospitals or not at all."""
    return rules if config.federation.evaluate_incomplete else over_all_hospitals(config, rules)


def aggregator_evaluation(
    aggregator: Aggregator, domain: SecretDomain, rules: Rules, hospitals: tuple[str, ...], plan: RoundPlan
) -> Evaluation | None:
    """Step 6 at the aggregator; also run once before the first round. `None` when somebody is missing."""
    config = aggregator.config
    domain.links.set_phase(f"round {plan.number} evaluation")
    rules, label = _evaluating(config, rules), ("evaluation", *plan.round_of)
    if len(hospitals) < rules.smallest:
        say(domain.links, hospitals, "skip")
        return None
    say(domain.links, hospitals, "evaluate")
    classes = len(config.data.classes)
    seen = sum_terms(config, plan.weight_total, aggregator.digests)
    agreed = AgreedSum(hospitals, label, _evaluation_counts(plan.number), seen)
    try:
        _, total = collect(domain, rules, agreed, plan.starts, torch.int64, (evaluation_length(classes),))
    except QuorumError as error:
        # Nothing was opened and nobody need wait: the round itself has its result.
        log.warning("%s", error)
        say(domain.links, hospitals, "fixed", hospitals=[])
        return None
    except SumLostError as error:
        log.warning("%s", error)
        return None
    return decode_evaluation(total, classes)
