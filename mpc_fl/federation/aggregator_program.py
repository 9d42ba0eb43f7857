"""The aggregator in training: it leads all rounds, takes masked updates, and alone learns their opened mean.

`run` goes through a whole run. Where to read on: a round is `aggregator_round`; who takes part in it is `attendance`; what
all sign after it is `audit_trail`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from mpc_fl.aggregation.rules import Rules
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.model_origin import MODEL_FILE
from mpc_fl.config.config import Config
from mpc_fl.config.deadlines import deadlines_of
from mpc_fl.errors import PeerLostError, SumLostError
from mpc_fl.federation.aggregator_round import aggregator_round
from mpc_fl.federation.aggregator_state import Aggregator, prepare_aggregator
from mpc_fl.federation.attendance import Attendance, RoundPlan, announce_end
from mpc_fl.federation.audit_trail import (
    RoundSigned,
    begin_ledger,
    lead_signatures,
    open_ledger,
    sign_end,
    signatory_of,
    signed_model,
)
from mpc_fl.federation.distribution import send_calibration, send_model
from mpc_fl.federation.final_round import aggregator_final
from mpc_fl.federation.global_model import code_of
from mpc_fl.federation.planning import sum_rules, training_runtime
from mpc_fl.federation.preparation import aggregator_preparation
from mpc_fl.federation.secure_evaluation import RoundOpened, aggregator_evaluation
from mpc_fl.files import append_json_line, keep_json_lines
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.links.frames import Observer
from mpc_fl.links.party_links import connect, site_directory, write_traffic
from mpc_fl.progress import Notify
from mpc_fl.roles import AGGREGATOR
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)

T = TypeVar("T")


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
        """All hospitals that are there, before the first round: the same model, the sums of once, a first evaluation."""
        aggregator, domain, rules = self.aggregator, self.domain, self.rules

        def lead(plan: RoundPlan) -> RoundOpened:
            hospitals = aggregator_preparation(aggregator, domain, self.ledger, rules, plan)
            return RoundOpened(*aggregator_evaluation(aggregator, domain, rules, hospitals, plan))

        self._conclude(0, self._lead(0, lead), 0.0)

    def round(self, number: int) -> None:
        """A round, as often as it takes until it has a result: of training, or the one that chooses the model."""
        began, rounds = time.monotonic(), self.aggregator.config.training.rounds

        def lead(plan: RoundPlan) -> RoundOpened:
            if number > rounds:
                return aggregator_final(self.aggregator, self.domain, self.rules, plan)
            return aggregator_round(self.aggregator, self.domain, self.rules, plan, self.notify)

        self._conclude(number, self._lead(number, lead), time.monotonic() - began)

    def end(self) -> None:
        """Whoever has come back since takes the last model, and all sign the end.

        The model is written first: a full disk then leaves a run that goes on.
        """
        aggregator, config, links = self.aggregator, self.aggregator.config, self.domain.links
        path, about = site_directory(config) / MODEL_FILE, (aggregator.normalisation, aggregator.calibration)
        save_model(path, aggregator.model, config, *about)

        def lead(plan: RoundPlan) -> tuple[str, ...]:
            with _planned_anew(self.rules):
                sign_end(self.ledger, links, plan, aggregator)
            return plan.hospitals

        announce_end(links, self._lead(config.last_round + 1, lead), config.last_round)

    def _lead(self, number: int, lead: Callable[[RoundPlan], T]) -> T:
        """Plan round `number` and `lead` it, anew without those that are lost, until it has a result.

        Raises `QuorumError` when too few are left.
        """
        aggregator, attendance = self.aggregator, self.attendance
        for attempt in range(aggregator.config.federation.hospitals):
            known = aggregator.normalisation is not None
            plan = attendance.plan(number, attempt, aggregator.weight_total, bool(self.ledger.blocks), known)
            try:
                self._welcome(plan)
                return lead(plan)
            except SumLostError as error:
                log.warning("%s", error)
                attendance.void(error.lost)
        raise SumLostError(f"round {number} was lost in every attempt", "see the logs of the hospitals")

    def _welcome(self, plan: RoundPlan) -> None:
        """Newcomers get the global model; all sign who they are."""
        links = self.domain.links
        if plan.newcomers:
            links.set_phase("distribution")
            send_model(self.aggregator, links, plan.newcomers)
            if plan.number > self.aggregator.config.last_round and self.aggregator.calibration is not None:
                send_calibration(links, self.aggregator.digests, plan.newcomers, self.aggregator.calibration)
            with _planned_anew(self.rules):
                begin_ledger(self.ledger, links, self.aggregator.config, plan)

    def _conclude(self, number: int, opened: RoundOpened, seconds: float) -> None:
        """All sign the round; it is written down and kept."""
        aggregator, out = self.aggregator, site_directory(self.aggregator.config)
        what = RoundSigned(f"round {number}", aggregator.digests, aggregator.choice.figures.get(number))
        self.attendance.keep(lead_signatures(self.ledger, self.domain.links, self.rules, opened.hospitals, what))
        counts = None if opened.evaluation is None else opened.evaluation.to_json()
        line = {"round": number, "hospitals": list(opened.hospitals), "evaluation": counts, "seconds": seconds}
        if opened.validation is not None:
            line["validation"] = opened.validation.to_json()
        line |= opened.about
        append_json_line(out / "metrics.jsonl", line)
        aggregator.checkpoint(out, number)


@contextlib.contextmanager
def _planned_anew(rules: Rules) -> Iterator[None]:
    """The loss of a hospital while nothing is summed has the round planned anew, where one may be missing."""
    try:
        yield
    except PeerLostError as error:
        if not rules.closing:
            raise
        raise SumLostError(error.what, error.fix, error.peer) from None


def run(config: Config, notify: Notify, observer: Observer | None = None) -> None:
    """Lead a training run until its last round; write model, metrics and opening record to `site.out`."""
    out, rules = site_directory(config), sum_rules(config)
    links = connect(config, AGGREGATOR, observer, code_of(config))
    with links:  # first, so that the others hear at once of what cannot be gone on with
        notify("connect", 1, 1)
        links.set_phase("data")
        aggregator, ledger = prepare_aggregator(config), open_ledger(config, AGGREGATOR)
        resumed = config.site.resume and aggregator.resume(out, functools.partial(signed_model, ledger))
        with training_runtime(links, config) as runtime:
            domain = runtime.domain(ledger, signatory_of(ledger))
            led = _Run(aggregator, domain, ledger, rules, Attendance(links, rules, rules.hospitals), notify)
            led.attendance.await_announced(deadlines_of(config).announcement)
            if resumed:
                keep_json_lines(out / "metrics.jsonl", lambda line: line["round"] <= aggregator.round)
            else:
                led.begin()
            for number in range(aggregator.round + 1, config.last_round + 1):
                led.round(number)
            led.end()
    write_traffic(links, out, config.site.costs)
