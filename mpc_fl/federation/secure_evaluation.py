"""secure_evaluation"""

from __future__ import annotations

import logging

import torch

from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Rules
from mpc_fl.aggregation.words import next_word, say
from mpc_fl.config.config import Config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import QuorumError, SumLostError
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.federation.planning import _all
from mpc_fl.learning.models.evaluation import (
    SCORE_BINS,
    Evaluation,
    decode_evaluation,
    encode_evaluation,
    evaluate_locally,
    evaluation_length,
    predict,
    require_evaluation_headroom,
)
from mpc_fl.roles import AGGREGATOR
from mpc_fl.sharing.opening import SecretDomain, open_to
from mpc_fl.sharing.secure_sum import secure_sum

log = logging.getLogger(__name__)


def hospital_evaluation(
    hospital: Hospital, domain: SecretDomain, rules: Rules, hospitals: tuple[str, ...], number: int, attempt: int
) -> Evaluation:
    """Step 6 at a hospital; also run once before the first round."""
    domain.links.set_phase(f"round {number} evaluation")
    probabilities = torch.softmax(predict(hospital.model, hospital.test.inputs), dim=1)
    own = evaluate_locally(probabilities, hospital.test.labels)
    encoded = encode_evaluation(own, hospital.config.aggregation.count_bound)
    if next_word(domain.links, AGGREGATOR, ("evaluate", "skip"))["word"] == "evaluate":
        counts = Private(f"evaluation of {hospital.name}", encoded)
        rules, label = _evaluating(hospital.config, rules), ("evaluation", number, attempt)
        contribute(domain, rules, AgreedSum(hospitals, label, _evaluation_counts(number)), counts)
    return own


def _evaluation_counts(number: int) -> Description:
    return Description("sum of evaluation counts", f"round {number}: evaluation counts")


def _evaluating(config: Config, rules: Rules) -> Rules:
    """Counts carry no noise: unless configured otherwise they are opened over all hospitals or not at all."""
    return rules if config.federation.evaluate_incomplete else _all(config, rules)


def aggregator_evaluation(
    config: Config, domain: SecretDomain, rules: Rules, hospitals: tuple[str, ...], plan: RoundPlan
) -> Evaluation | None:
    """Step 6 at the aggregator; also run once before the first round. `None` when somebody is missing."""
    domain.links.set_phase(f"round {plan.number} evaluation")
    rules, label = _evaluating(config, rules), ("evaluation", plan.number, plan.attempt)
    if len(hospitals) < rules.smallest:
        say(domain.links, hospitals, "skip")
        return None
    say(domain.links, hospitals, "evaluate")
    classes = len(config.data.classes)
    agreed = AgreedSum(hospitals, label, _evaluation_counts(plan.number))
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


__all__ = ["SCORE_BINS", "Evaluation", "evaluate_locally", "secure_evaluation"]


def secure_evaluation(
    domain: SecretDomain, own: Private[Evaluation] | None, classes: int, count_bound: int, opener: str, why: str
) -> Evaluation | None:
    """Sum all hospitals' evaluations and open the sum to `opener`; parties without patients pass `None`.

    One opening of `evaluation_length(classes)` counts. Raises `HeadroomError` when a count exceeds `count_bound` or sums
    could be inexact, before anything is sent.
    """
    require_evaluation_headroom(len(domain.world), count_bound)
    if own is None:
        counts = torch.zeros(evaluation_length(classes), dtype=torch.int64)
    else:
        counts = encode_evaluation(own.inside_protocol(), count_bound)
    shared = secure_sum(domain, Private("evaluation counts", counts), 0, "sum of evaluation counts")
    opened = open_to(domain, shared, [opener], why)
    return None if opened is None else decode_evaluation(opened.long(), classes)
