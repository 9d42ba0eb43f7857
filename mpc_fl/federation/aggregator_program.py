"""The aggregator in training: it leads all rounds, takes masked updates, and alone learns their opened mean.

`run` goes through a whole run. Where to read on: a round is `aggregator_round`; who takes part in it is `attendance`; what
all sign after it is `audit_trail`.
"""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass

from mpc_fl.aggregation.rules import Rules
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.config.config import Config, party_names
from mpc_fl.errors import SumLostError
from mpc_fl.federation.aggregator_round import aggregator_round
from mpc_fl.federation.aggregator_state import Aggregator, prepare_aggregator
from mpc_fl.federation.attendance import Attendance, RoundPlan, announce_end
from mpc_fl.federation.audit_trail import (
    begin_ledger,
    lead_signatures,
    open_ledger,
    sign_end,
    signatory_of,
    signed_model,
)
from mpc_fl.federation.distribution import send_model
from mpc_fl.federation.planning import sum_rules, training_runtime
from mpc_fl.federation.preparation import aggregator_preparation
from mpc_fl.federation.secure_evaluation import Evaluated, aggregator_evaluation
from mpc_fl.files import append_json_line, keep_json_lines
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.links.frames import Observer
from mpc_fl.links.party_links import connect, site_directory, write_traffic
from mpc_fl.progress import Notify
from mpc_fl.roles import AGGREGATOR, is_hospital
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Run:
    """What the aggregator leads one run with."""

    aggregator: Aggregator
    domain: SecretDomain
    ledger: RevealLedger
    rules: Rules
    attendance: Attendance
    notify: Notify

    def begin(self) -> None:
        """All hospitals, before the first round: the same model, the sums over all of them, a first evaluation."""
        aggregator, domain, rules, attendance = self.aggregator, self.domain, self.rules, self.attendance
        plan = attendance.plan(0, 0, 1, bool(self.ledger.blocks))
        self.welcome(plan)
        aggregator_preparation(aggregator, domain, rules, attendance)
        hospitals, evaluation = aggregator_evaluation(aggregator, domain, rules, plan.hospitals, plan)
        signed = lead_signatures(self.ledger, domain.links, rules, hospitals, "round 0", aggregator.digests)
        attendance.keep(signed)
        self._conclude(0, hospitals, evaluation, 0.0)

    def welcome(self, plan: RoundPlan) -> None:
        """Newcomers get the global model; all sign who they are."""
        links = self.domain.links
        if plan.newcomers:
            links.set_phase("distribution")
            send_model(self.aggregator, links, plan.newcomers)
            begin_ledger(self.ledger, links, self.aggregator.config, plan.hospitals, plan.resumed)

    def round(self, number: int) -> None:
        """A round, as often as it takes until it has a result."""
        aggregator, domain, attendance = self.aggregator, self.domain, self.attendance
        began = time.monotonic()
        for attempt in range(self.aggregator.config.federation.hospitals):
            plan = attendance.plan(number, attempt, aggregator.weight_total, True)
            self.welcome(plan)
            try:
                hospitals, evaluation = aggregator_round(aggregator, domain, self.rules, plan, self.notify)
                break
            except SumLostError as error:
                log.warning("%s", error)
                attendance.void()
        else:
            raise SumLostError(f"round {number} was lost in every attempt", "see the logs of the hospitals")
        about, held = f"round {number}", aggregator.digests
        signed = lead_signatures(self.ledger, domain.links, self.rules, hospitals, about, held)
        attendance.keep(signed)
        self._conclude(number, hospitals, evaluation, time.monotonic() - began)

    def _conclude(self, number: int, hospitals: tuple[str, ...], evaluation: Evaluated | None, seconds: float) -> None:
        out = site_directory(self.aggregator.config)
        counts = None if evaluation is None else evaluation.to_json()
        line = {"round": number, "hospitals": list(hospitals), "evaluation": counts, "seconds": seconds}
        append_json_line(out / "metrics.jsonl", line)
        self.aggregator.checkpoint(out, number)


def run(config: Config, notify: Notify, observer: Observer | None = None) -> None:
    """Lead a training run until its last round; write model, metrics and opening record to `site.out`."""
    out, rules = site_directory(config), sum_rules(config)
    hospitals = tuple(name for name in party_names(config) if is_hospital(name))
    aggregator = prepare_aggregator(config)
    links, ledger = connect(config, AGGREGATOR, observer), open_ledger(config, AGGREGATOR)
    resumed = config.site.resume and aggregator.resume(out, functools.partial(signed_model, ledger))
    with links, training_runtime(links, config) as runtime:
        domain = runtime.domain(ledger, signatory_of(ledger))
        attendance = Attendance(links, rules, hospitals)
        led = _Run(aggregator, domain, ledger, rules, attendance, notify)
        notify("connect", 1, 1)
        attendance.await_announced(not resumed, config.runtime.connect_timeout)
        if resumed:
            keep_json_lines(out / "metrics.jsonl", lambda line: line["round"] <= aggregator.round)
        else:
            led.begin()
        for number in range(aggregator.round + 1, config.training.rounds + 1):
            led.round(number)
        # Whoever has come back since takes the last model and signs the end.
        plan = attendance.plan(config.training.rounds + 1, 0, aggregator.weight_total, True)
        led.welcome(plan)
        save_model(out / "model.safetensors", aggregator.model, config, aggregator.normalisation)
        sign_end(ledger, links, plan.hospitals, aggregator)
        announce_end(links, plan.hospitals, config.training.rounds)
    write_traffic(links, out)
