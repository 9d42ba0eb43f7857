"""The round after training: the model of the run is chosen, calibrated on validation patients, and judged on test patients.

It takes place with `evaluation.choose: best` or `evaluation.calibrate`, as round `Config.last_round`:
  1. the aggregator says the figures of all validated rounds and which round's model it is, and sends that model
  2. each hospital holds the figures against those that all signed (`audit_trail.figure_digest`), finds the round itself, and
     holds the model against the one that all signed for that round
  3. with `evaluation.calibrate` one sum over hospitals is opened (`noised_calibration`); the aggregator fits temperature and
     offsets, and sends them to all
  4. all evaluate the final model, as it decides, on their own test patients; only the sum of the counts is opened
  5. all sign openings, model and calibration, as after every round

A hospital that missed rounds has their blocks, and so their figures, from the reveal ledger. A figure is what the aggregator
read from the sum, which it alone learns, and said when the round was signed: that it cannot be changed later is checked, that
it was read rightly is taken from the aggregator like every opened mean.

Without an aggregator each hospital has read all figures itself, and takes steps 1 to 3 by itself (`peer_round`).

Where no validation could be opened, the last model stays, uncalibrated. The mean of the last global models
(`training.average_last`) is the model of the last round, and so one candidate among the others.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Missed, Rules, missed_by
from mpc_fl.aggregation.words import next_word, say
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.reveal_ledger import Scalar
from mpc_fl.config.config import Config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import SAME_VERSION, ProtocolError, QuorumError, SumLostError
from mpc_fl.federation.aggregator_state import Aggregator
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.audit_trail import figure_digest, figure_in, signed_model
from mpc_fl.federation.choice import best_round
from mpc_fl.federation.distribution import receive_calibration, receive_global, send_calibration, send_global
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.federation.model_digests import sum_terms
from mpc_fl.federation.noised_calibration import CalibrationPlan, decode_changes, encode_changes, plan_calibration
from mpc_fl.federation.planning import calibration_run_name
from mpc_fl.federation.secure_evaluation import (
    RoundOpened,
    aggregator_evaluation,
    evaluated_groups,
    evaluation_rules,
    hospital_evaluation,
)
from mpc_fl.learning.models.calibration import Calibration, fit
from mpc_fl.learning.models.evaluation import predict_each
from mpc_fl.learning.models.parameters import flatten_parameters, join_parts, load_flat_parameters
from mpc_fl.links.links import Links
from mpc_fl.roles import AGGREGATOR
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)

_CALIBRATION = ("calibrate", "as it is")


def calibration_sum(plan: RoundPlan, hospitals: tuple[str, ...], config: Config, seen: dict[str, Any]) -> AgreedSum:
    """The sum of step 3, as all its parties know it."""
    noise, privacy = config.evaluation_noise("validation"), dict[str, Scalar]()
    if noise is not None:
        unit = f"validation {config.data.counted_unit}"
        privacy = {"mechanism": config.privacy.mechanism, "unit": unit, "noise multiplier": noise}
    about = Description("sum of changes by calibration", f"round {plan.number}: calibration", privacy or None)
    return AgreedSum(hospitals, ("calibration", *plan.round_of), about, seen)


# ---- at a hospital -----------------------------------------------------------------------------------------------------


def hospital_final(
    hospital: Hospital, domain: SecretDomain, ledger: RevealLedger, rules: Rules, plan: RoundPlan
) -> dict[str, Any] | Missed:
    """The round at a hospital. Returns this site's own metrics (they never leave it), or why there are none.

    Raises `ProtocolError` for another model than that of the round with the best figure, `PrivacyBudgetError` before
    anything is sent where a sum would exceed the budget.
    """
    began, links, config = time.monotonic(), domain.links, hospital.config
    links.set_phase(f"round {plan.number} choice")
    hospital.calibration, hospital.digests.calibration, hospitals = None, "", plan.hospitals
    if config.evaluation.choose == "best":
        _take_chosen(hospital, links, ledger)
    planned = plan_calibration(config)
    if planned is not None:
        fitted = _sum_changes(hospital, domain, rules, plan, planned)
        if isinstance(fitted, str):
            return fitted
        hospitals = fitted
    own = hospital_evaluation(hospital, domain, rules, hospitals, plan)
    if own is None:
        return "left out"
    seconds = {"train": 0.0, "aggregate": 0.0, "evaluate": time.monotonic() - began}
    return hospital.metrics(plan.number, own, seconds)


def _take_chosen(hospital: Hospital, links: Links, ledger: RevealLedger) -> None:
    """Steps 1 and 2."""
    word = next_word(links, AGGREGATOR, ("chosen",))
    figures = _signed_figures(hospital.config, ledger, word.get("figures"))
    expected = best_round(figures) if figures else hospital.config.training.rounds
    if type(word.get("round")) is not int or word["round"] != expected:
        raise ProtocolError(
            f"{AGGREGATOR} chose another round than {expected}, which has the best figure that all signed",
            f"{AGGREGATOR} does not follow the protocol; compare the reveal ledgers",
        )
    shared = receive_global(links, hospital.digests, len(hospital.shared_parameters))
    if signed_model(ledger, expected) != hospital.digests.parameters:
        raise ProtocolError(
            f"{AGGREGATOR} sent another model than all parties signed after round {expected}",
            f"{AGGREGATOR} does not follow the protocol; compare the reveal ledgers",
        )
    hospital.take_global(shared)
    log.info("the model after round %d is chosen", expected)


def _signed_figures(config: Config, ledger: RevealLedger, said: object) -> dict[int, float]:
    """The figures that the aggregator says, which must be those that all signed, none left out. Raises `ProtocolError`."""
    due = [number for number in range(config.training.rounds + 1) if config.evaluates(number, "validation")]
    signed = {number: ledger.signed_value(f"round {number}", "validation") for number in due}
    signed = {number: digest for number, digest in signed.items() if digest is not None}
    if not isinstance(said, dict) or set(said) != {str(number) for number in signed}:
        raise ProtocolError(f"{AGGREGATOR} sent figures of other rounds than all signed", SAME_VERSION)
    figures = {int(number): figure_in(figure) for number, figure in said.items()}
    for number, figure in figures.items():
        if figure is None or figure_digest(figure) != signed[number]:
            raise ProtocolError(
                f"{AGGREGATOR} sent another figure of round {number} than all parties signed",
                f"{AGGREGATOR} does not follow the protocol; compare the reveal ledgers",
            )
    return {number: figure for number, figure in figures.items() if figure is not None}


def _sum_changes(
    hospital: Hospital, domain: SecretDomain, rules: Rules, plan: RoundPlan, planned: CalibrationPlan
) -> tuple[str, ...] | Missed:
    """Step 3: the hospitals that are in the sum, or go on without one."""
    links, config, hospitals = domain.links, hospital.config, plan.hospitals
    links.set_phase(f"round {plan.number} calibration")
    opens = next_word(links, AGGREGATOR, _CALIBRATION)["word"] == "calibrate"
    if opens:
        encoded, release = own_changes(hospital, plan, planned)
        agreed = calibration_sum(plan, hospitals, config, sum_terms(config, plan.weight_total, hospital.digests))
        try:
            admitted = contribute(domain, evaluation_rules(config, rules, "validation"), agreed, encoded, release)
            hospitals = admitted or hospitals  # nobody: nothing was opened
        except SumLostError as error:
            log.warning("%s", error)
            if error.lost == hospital.name:
                return missed_by(hospital.name, error)
        if hospital.name not in hospitals:
            return "left out"
    hospital.calibration = receive_calibration(links, hospital.digests, config)
    if not opens and hospital.calibration != Calibration.none(len(config.data.classes)):
        raise ProtocolError(
            f"{AGGREGATOR} sent a calibration, and no sum was made to fit it", "it does not follow the protocol"
        )
    return hospitals


def own_changes(
    hospital: Hospital, plan: RoundPlan, planned: CalibrationPlan
) -> tuple[Private[torch.Tensor], Callable[[], None] | None]:
    """A hospital's summand of step 3, charged where it carries noise, and what to call before it leaves.

    Raises `PrivacyBudgetError` where it would exceed the budget.
    """
    config, event = hospital.config, planned.event()
    # Of public patients nothing is entered; without privacy what left, also of who comes to this round alone.
    release = hospital.releasing(plan.number) if config.privacy.mechanism == "none" else None
    if event is not None:
        run, budget = calibration_run_name(config), hospital.budget
        hospital.ledger.charge(event, run=run, round_number=plan.number, budget=budget, reserve=True)
        release = hospital.ledger.release
    seed = hospital.noise_seed.derive("calibration", *plan.round_of)  # fresh for every attempt
    records = hospital.records_of("validation")
    logits = predict_each(hospital.model, records.inputs)
    return encode_changes(planned, records, logits, seed, config.runtime.threads), release


# ---- at the aggregator, or at every hospital without one ---------------------------------------------------------------


def aggregator_final(aggregator: Aggregator, domain: SecretDomain, rules: Rules, plan: RoundPlan) -> RoundOpened:
    """The round at the aggregator, whose model and calibration are then the final ones; who is left, and what was opened.

    Until its end the aggregator keeps the model that all signed last: that is what newcomers of another attempt are given.
    """
    config, links, hospitals = aggregator.config, domain.links, plan.hospitals
    links.set_phase(f"round {plan.number} choice")
    final, said = with_chosen(aggregator)
    if "chosen" in said:
        say(links, hospitals, "chosen", **said["chosen"])
        send_global(links, final.digests, hospitals, final.shared_parameters)
    planned = plan_calibration(config)
    if planned is not None:
        hospitals, final.calibration = _fitted(final, domain, rules, plan, planned)
        send_calibration(links, final.digests, hospitals, final.calibration)
        said["calibration"] = final.calibration.to_json()
    hospitals, evaluation = aggregator_evaluation(final, domain, rules, hospitals, plan)
    hospitals, of_groups = evaluated_groups(final, domain, rules, hospitals, plan, evaluation)
    aggregator.model, aggregator.calibration = final.model, final.calibration
    return RoundOpened(hospitals, evaluation, about=said | of_groups)


def with_chosen(aggregator: Aggregator) -> tuple[Aggregator, dict[str, Any]]:
    """Step 1: the state with the chosen model, uncalibrated, and what is noted of the choice, where there is one to make."""
    aggregator.digests.calibration = ""
    final = replace(aggregator, model=copy.deepcopy(aggregator.model))
    if aggregator.config.evaluation.choose != "best":
        return final, {}
    return final, chosen_json(final, take_candidate(final))


def take_candidate(common: Aggregator) -> int:
    """Put the candidate's parameters, if there is one, into the model; the round that the model then is of."""
    candidate = common.choice.candidate
    if candidate is None:
        return common.config.training.rounds
    own = flatten_parameters(common.model)
    load_flat_parameters(common.model, join_parts(candidate.parameters, own, common.coordinates))
    return candidate.round


def chosen_json(common: Aggregator, number: int) -> dict[str, Any]:
    """What the line about the round says of the choice of round `number`."""
    return {"chosen": {"round": number, "figures": {str(n): f for n, f in sorted(common.choice.figures.items())}}}


def _fitted(
    aggregator: Aggregator, domain: SecretDomain, rules: Rules, plan: RoundPlan, planned: CalibrationPlan
) -> tuple[tuple[str, ...], Calibration]:
    """Step 3: who is left, and what was fitted; nothing is changed where no sum could be opened."""
    config, links, hospitals = aggregator.config, domain.links, plan.hospitals
    links.set_phase(f"round {plan.number} calibration")
    rules, candidate = evaluation_rules(config, rules, "validation"), aggregator.choice.candidate
    unchanged = Calibration.none(len(config.data.classes))
    if candidate is None or len(hospitals) < rules.smallest:
        say(links, hospitals, _CALIBRATION[1])
        return hospitals, unchanged
    say(links, hospitals, _CALIBRATION[0])
    seen = sum_terms(config, plan.weight_total, aggregator.digests)
    agreed = calibration_sum(plan, hospitals, config, seen)
    try:
        present, total = collect(domain, rules, agreed, plan.starts, torch.int64, (planned.grid.length,))
    except QuorumError as error:
        log.warning("%s", error)
        say(links, hospitals, "fixed", hospitals=[])
        return hospitals, unchanged
    except SumLostError as error:
        log.warning("%s", error)
        return hospitals, unchanged
    return present, fitted_calibration(aggregator, planned, total, len(present))


def fitted_calibration(
    common: Aggregator, planned: CalibrationPlan, total: torch.Tensor, hospitals: int
) -> Calibration:
    """What is fitted to the opened sum of changes over so many hospitals, int64 (length,); there is a candidate."""
    assert common.choice.candidate is not None
    weights = _weights(common.config, common.choice.candidate.totals)
    return fit(planned.grid, decode_changes(planned, total), weights, planned.deviation(hospitals))


def _weights(config: Config, totals: torch.Tensor) -> torch.Tensor:
    """What a right decision counts for in the criterion, by true class, from patients of each, float64 (k,)."""
    counts = totals.clamp(min=1.0)
    if config.evaluation.criterion == "accuracy":
        return torch.full_like(counts, 1.0) / counts.sum()
    return 1.0 / (counts * len(counts))
