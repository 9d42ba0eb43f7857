"""The aggregator: leads the rounds, holds a share, learns the opened mean update and nothing about one hospital."""

from __future__ import annotations

import itertools
import time

from mpc_fl.aggregation.norm_check_session import end_checks
from mpc_fl.aggregation.rules import Rules
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.config.config import Config, party_names
from mpc_fl.errors import SumLostError
from mpc_fl.federation.aggregator_round import aggregator_round
from mpc_fl.federation.aggregator_state import Aggregator, prepare_aggregator
from mpc_fl.federation.attendance import Attendance, RoundPlan, announce_end
from mpc_fl.federation.audit_trail import begin_ledger, lead_signatures, open_ledger, sign_end
from mpc_fl.federation.planning import sum_rules, training_runtime
from mpc_fl.federation.preparation import aggregator_preparation, send_model
from mpc_fl.federation.secure_evaluation import aggregator_evaluation
from mpc_fl.files import append_json_line, keep_json_lines
from mpc_fl.learning.models.evaluation import Evaluation
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.links.links import Observer
from mpc_fl.links.party_links import connect, site_directory, write_traffic
from mpc_fl.progress import Notify
from mpc_fl.roles import AGGREGATOR, is_hospital
from mpc_fl.sharing.opening import SecretDomain


def run(config: Config, rank: int, notify: Notify, observer: Observer | None = None) -> None:
    """Take part in a training run until its last round; write model, metrics and opening record to `site.out`."""
    out, rules = site_directory(config), sum_rules(config)
    hospitals = tuple(name for name in party_names(config) if is_hospital(name))
    aggregator = prepare_aggregator(config)
    resumed = config.site.resume and aggregator.resume(out)
    links = connect(config, AGGREGATOR, observer)
    with links, training_runtime(links, config) as runtime:
        ledger = open_ledger(config, AGGREGATOR)
        domain, attendance = runtime.domain(ledger), Attendance(links, rules, hospitals)
        notify("connect", 1, 1)
        attendance.await_announced(not resumed, config.runtime.connect_timeout)
        if resumed:
            keep_json_lines(out / "metrics.jsonl", lambda line: line["round"] <= aggregator.round)
        else:
            _begin(aggregator, domain, ledger, rules, attendance)
        for number in range(aggregator.round + 1, config.training.rounds + 1):
            _round(aggregator, domain, ledger, rules, attendance, number, notify)
        # Whoever has come back since takes the last model and signs the end.
        plan = attendance.plan(config.training.rounds + 1, 0, aggregator.weight_total, True)
        _welcome(aggregator, domain, ledger, plan)
        sign_end(ledger, links, config, plan.hospitals, aggregator.model, aggregator.shared_parameters,
                 aggregator.normalisation)  # fmt: skip
        save_model(out / "model.safetensors", aggregator.model, config, aggregator.normalisation)
        announce_end(links, plan.hospitals, config.training.rounds)
        end_checks(links, config)
    write_traffic(links, out)


def _begin(
    aggregator: Aggregator, domain: SecretDomain, ledger: RevealLedger, rules: Rules, attendance: Attendance
) -> None:
    """All hospitals, before the first round: the same model, the sums over all of them, a first evaluation."""
    config, links = aggregator.config, domain.links
    plan = attendance.plan(0, 0, 1, bool(ledger.blocks))
    _welcome(aggregator, domain, ledger, plan)
    aggregator_preparation(aggregator, domain, rules, attendance)
    evaluation = aggregator_evaluation(config, domain, rules, plan.hospitals, plan)
    lead_signatures(ledger, links, rules, plan.hospitals, "round 0", aggregator.shared_parameters)
    _conclude(aggregator, 0, plan.hospitals, evaluation, 0.0)


def _welcome(aggregator: Aggregator, domain: SecretDomain, ledger: RevealLedger, plan: RoundPlan) -> None:
    """Newcomers get the global model; all sign who they are."""
    if plan.newcomers:
        domain.links.set_phase("distribution")
        send_model(aggregator, domain.links, plan.newcomers)
        begin_ledger(ledger, domain.links, aggregator.config, plan.hospitals, plan.resumed)


def _round(
    aggregator: Aggregator,
    domain: SecretDomain,
    ledger: RevealLedger,
    rules: Rules,
    attendance: Attendance,
    number: int,
    notify: Notify,
) -> None:
    """A round, as often as it takes until it has a result."""
    began = time.monotonic()
    for attempt in itertools.count():
        plan = attendance.plan(number, attempt, aggregator.weight_total, True)
        _welcome(aggregator, domain, ledger, plan)
        try:
            hospitals, evaluation = aggregator_round(aggregator, domain, rules, plan, notify)
            break
        except SumLostError:
            attendance.void()
    signed = lead_signatures(ledger, domain.links, rules, hospitals, f"round {number}", aggregator.shared_parameters)
    attendance.keep(signed)
    _conclude(aggregator, number, hospitals, evaluation, time.monotonic() - began)


def _conclude(
    aggregator: Aggregator, number: int, hospitals: tuple[str, ...], evaluation: Evaluation | None, seconds: float
) -> None:
    out = site_directory(aggregator.config)
    counts = None if evaluation is None else evaluation.to_json()
    line = {"round": number, "hospitals": list(hospitals), "evaluation": counts, "seconds": seconds}
    append_json_line(out / "metrics.jsonl", line)
    aggregator.checkpoint(out, number)
