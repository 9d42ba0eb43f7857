"""A hospital in training: from its patients to the final global model, round by round.

`run` connects, reads the patients and goes through a whole run. The way of an update: `run` -> `_Run.until_complete` ->
`hospital_round` -> `_local_steps` trains, encodes the update and hands it to `aggregation.quorum_sum.contribute`, which masks
it (`sharing.closed_sum.SummandMasks.masked`). Who takes part in a round is `attendance`, what all sign after it `audit_trail`.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from mpc_fl.aggregation.rules import Missed, Rules
from mpc_fl.aggregation.words import next_word
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.model_origin import MODEL_FILE
from mpc_fl.config.config import Config
from mpc_fl.config.deadlines import deadlines_of
from mpc_fl.errors import PeerLostError, ProtocolError
from mpc_fl.federation.attendance import PlansFollowed, RoundPlan, announce, await_end, await_keys
from mpc_fl.federation.audit_trail import (
    begin_ledger,
    open_ledger,
    require_allowed_leader,
    require_signed_calibration,
    require_signed_model,
    sign_end,
    sign_round,
    signatory_of,
)
from mpc_fl.federation.distribution import receive_calibration, receive_model
from mpc_fl.federation.final_round import hospital_final
from mpc_fl.federation.global_model import calibrate_own, code_of
from mpc_fl.federation.hospital_round import hospital_round
from mpc_fl.federation.hospital_state import Beginning, Hospital
from mpc_fl.federation.ledger_forecast import privacy_ledger_of
from mpc_fl.federation.own_model import compare_own_model
from mpc_fl.federation.planning import largest_weight_total, sum_rules, training_runtime
from mpc_fl.federation.preparation import heaviest_weight, hospital_preparation
from mpc_fl.federation.secure_evaluation import hospital_evaluation
from mpc_fl.files import append_json_line, keep_json_lines
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.data.tables import Part
from mpc_fl.learning.models.feature_cache import open_feature_cache
from mpc_fl.learning.models.feature_extractor import as_records
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.learning.training.process_group import training_group
from mpc_fl.links.frames import Observer
from mpc_fl.links.links import Links
from mpc_fl.links.party_links import connect, site_directory, write_traffic
from mpc_fl.progress import Notify
from mpc_fl.roles import AGGREGATOR, hospital_name
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)


def run(config: Config, rank: int, notify: Notify, observer: Observer | None = None) -> None:
    """Train until the last round; write this site's own metrics, opening record and the final global model."""
    out, name, rules = site_directory(config), hospital_name(rank), sum_rules(config)
    links = connect(config, name, observer, code_of(config))
    with links:  # first, so that the others hear at once of what this hospital cannot do
        notify("connect", 1, 1)
        hospital = prepared_hospital(config, rank, links, notify)
        notify("load data", 1, 1)
        with (
            training_group(config, hospital.trained_network) as hospital.group,
            training_runtime(links, config) as runtime,
        ):
            ledger = open_ledger(config, name)
            domain = runtime.domain(ledger, signatory_of(ledger))
            _Run(hospital, domain, ledger, rules, notify).until_complete()
        await_end(links, config.last_round)
    write_traffic(links, out, config.site.costs)
    compare_own_model(hospital, notify)


def prepared_hospital(config: Config, rank: int, links: Links, notify: Notify) -> Hospital:
    """Read the patients and the privacy ledger, and plan what the run may release of them."""
    links.set_phase("data")
    return joined_hospital(Beginning(config), rank, lambda part: load_hospital(config, rank, part), notify)


def joined_hospital(beginning: Beginning, rank: int, read: Callable[[Part], Dataset], notify: Notify) -> Hospital:
    """The same of images that `read` gives."""
    config, name = beginning.config, hospital_name(rank)
    out = site_directory(config)
    parts: list[Part] = ["train", "test"]
    if config.data.validation_fraction:
        parts.append("validation")
    loaded = (read(part) for part in parts)  # one after the other: images are large
    cache, progress = open_feature_cache(config, name), functools.partial(notify, "features")
    patients, held_out, *aside = (as_records(images, config, progress, cache) for images in loaded)
    hospital = beginning.join(rank, patients, held_out, privacy_ledger_of(config, name), out)
    hospital.validation = aside[0] if aside else None
    if hospital.frozen_outputs is not None:
        hospital.frozen_outputs.keep_in(cache)
    unit, skipped = config.data.counted_unit, hospital.skipped_files
    log.info("%s trains on %d %ss; %d files cannot be read", name, hospital.train.patient_count, unit, skipped)
    return hospital


@dataclass(frozen=True)
class _Run:
    """What a hospital goes through a run with."""

    hospital: Hospital
    domain: SecretDomain
    ledger: RevealLedger
    rules: Rules
    notify: Notify

    def until_complete(self) -> None:
        """Plan after plan, until all have signed that the run is complete."""
        config, links, hospitals = self.hospital.config, self.domain.links, self.rules.hospitals
        deadlines, last = deadlines_of(config), config.last_round + 1
        plans = PlansFollowed(self.rules, last - 1, largest_weight_total(config), self.hospital.kept_round)
        announce(links, AGGREGATOR, hospitals)
        waits = (last + 1) * len(hospitals)  # one for each plan that it may miss
        announced = True
        while True:
            seconds = deadlines.plan if announced else deadlines.word  # the others may be in the middle of a round
            word = next_word(links, AGGREGATOR, ("plan", "wait"), time.monotonic() + seconds)
            if word["word"] == "wait":
                waits -= 1
                if waits < 0:
                    what = f"{AGGREGATOR} kept {links.name} waiting for ever"
                    raise ProtocolError(what, "it does not follow the protocol")
                links.await_change(1.0)
                announce(links, AGGREGATOR, hospitals)
                continue
            plan = RoundPlan.from_word(word)
            plans.follow(plan, links.name)
            await_keys(links, plan, deadlines.keys)
            missed = self._follow(plan)
            plans.behind, announced = missed is not None, missed == "left out"
            if announced:
                announce(links, AGGREGATOR, hospitals)
            elif missed is None and plan.number == last:
                return

    def _follow(self, plan: RoundPlan) -> Missed | None:
        """What a plan says; or why there is no result of it. The loss of another hospital before a sum has it planned anew."""
        hospital = self.hospital
        try:
            if plan.newcomers:
                self._begin(plan)
            if plan.number > hospital.config.last_round:
                self._end(plan)
                return None
        except PeerLostError as error:
            if error.peer == AGGREGATOR or not self.rules.closing:
                raise
            log.warning("%s; %s is planned anew", error, f"round {plan.number}")
            return "left out" if error.peer == hospital.name else "void"
        return self._round(plan)

    def _end(self, plan: RoundPlan) -> None:
        """Keep the last model, then sign the end: who has signed has the model, so a full disk leaves a run that goes on."""
        hospital, config = self.hospital, self.hospital.config
        path, about = site_directory(config) / MODEL_FILE, (hospital.normalisation, hospital.calibration)
        save_model(path, hospital.model, config, *about)
        sign_end(self.ledger, self.domain.links, plan, hospital)

    def _begin(self, plan: RoundPlan) -> None:
        """Newcomers take the global model, at the start or where the others are; all sign who they are."""
        hospital, ledger, links, config = self.hospital, self.ledger, self.domain.links, self.hospital.config
        out, is_new = site_directory(config), hospital.name in plan.newcomers
        if is_new:
            links.set_phase("distribution")
            known = {"none": False, "weights": True, "secure": plan.number > 0 or plan.normalised}
            receive_model(hospital, links, known[config.data.normalise])
            if plan.number > config.last_round and config.evaluation.calibrate != "none":
                hospital.calibration = receive_calibration(links, hospital.digests, config)
            calibrate_own(hospital.model, hospital.train.inputs, config)
            hospital.resume(out, plan.number - 1)
            keep_json_lines(out / "metrics.jsonl", lambda line: line["round"] < plan.number)
        begin_ledger(ledger, links, config, plan)
        require_allowed_leader(ledger, config)
        if is_new and plan.number > 0:
            require_signed_model(ledger, plan.number - 1, hospital.digests)
            if hospital.calibration is not None:
                require_signed_calibration(ledger, plan.number - 1, hospital.digests)
            hospital.heaviest = heaviest_weight(config, ledger, hospital.name, plan.weight_total)

    def _round(self, plan: RoundPlan) -> Missed | None:
        """A round, or what comes before the first one; written to this site's own metrics, kept, and signed by all.

        In this order: the aggregator goes on from a round that all have signed, so what is written later may be lost.
        """
        hospital, domain, ledger, rules = self.hospital, self.domain, self.ledger, self.rules
        out = site_directory(hospital.config)
        if plan.number == 0:
            prepared = hospital_preparation(hospital, domain, ledger, rules, plan)
            if isinstance(prepared, str):
                return prepared
            if hospital_evaluation(hospital, domain, rules, prepared, plan) is None:
                return "left out"
        else:
            trains = plan.number <= hospital.config.training.rounds
            result = (
                hospital_round(hospital, domain, rules, plan, self.notify)
                if trains
                else hospital_final(hospital, domain, ledger, rules, plan)
            )
            if isinstance(result, str):
                return result
            append_json_line(out / "metrics.jsonl", result)
        hospital.checkpoint(out, plan.number)
        signed = sign_round(ledger, domain.links, rules, f"round {plan.number}", hospital.digests)
        return None if signed else "left out"
