"""A hospital in training: from its patients to the final global model, round by round.

`run` goes through a whole run. The way of an update: `run` -> `_round` -> `hospital_round` -> `_local_steps` trains, encodes
the update and hands it to `aggregation.quorum_sum.contribute`, which masks it (`sharing.closed_sum.SummandMasks.masked`).
Who takes part in a round is `attendance`, what all sign after it `audit_trail`.
"""

from __future__ import annotations

import functools

from mpc_fl.aggregation.rules import Missed, Rules
from mpc_fl.aggregation.words import next_word
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.config.config import Config, party_names
from mpc_fl.errors import ProtocolError
from mpc_fl.federation.attendance import PlansFollowed, RoundPlan, announce, await_end, await_keys
from mpc_fl.federation.audit_trail import (
    begin_ledger,
    open_ledger,
    require_signed_model,
    sign_end,
    sign_round,
    signatory_of,
)
from mpc_fl.federation.distribution import receive_model
from mpc_fl.federation.global_model import calibrate_own
from mpc_fl.federation.hospital_round import hospital_round
from mpc_fl.federation.hospital_state import Hospital, join
from mpc_fl.federation.planning import largest_weight_total, sum_rules, training_runtime
from mpc_fl.federation.preparation import hospital_preparation
from mpc_fl.federation.secure_evaluation import hospital_evaluation
from mpc_fl.files import append_json_line, keep_json_lines
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.data.tables import Split
from mpc_fl.learning.models.feature_extractor import as_records
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.learning.training.process_group import training_group
from mpc_fl.links.frames import Observer
from mpc_fl.links.party_links import connect, site_directory, write_traffic
from mpc_fl.progress import Notify
from mpc_fl.roles import AGGREGATOR, hospital_name
from mpc_fl.sharing.opening import SecretDomain


def run(config: Config, rank: int, notify: Notify, observer: Observer | None = None) -> None:
    """Train until the last round; write this site's own metrics, opening record and the final global model."""
    out, name, rules = site_directory(config), hospital_name(rank), sum_rules(config)
    hospitals = tuple(party for party in party_names(config) if party != AGGREGATOR)
    splits: tuple[Split, ...] = ("train", "test")
    loaded = (load_hospital(config, rank, split) for split in splits)  # one after the other: images are large
    patients, held_out = (as_records(images, config, functools.partial(notify, "features")) for images in loaded)
    notify("load data", 1, 1)
    privacy_ledger = PrivacyLedger((config.site.privacy_ledger or out) / f"{name}-privacy.sqlite3", name)
    hospital = join(config, rank, patients, held_out, privacy_ledger, out)
    links = connect(config, name, observer)
    with (
        training_group(config, hospital.model) as hospital.group,
        links,
        training_runtime(links, config) as runtime,
    ):
        ledger = open_ledger(config, name)
        domain = runtime.domain(ledger, signatory_of(ledger))
        plans = PlansFollowed(rules, config.training.rounds, largest_weight_total(config), hospital.kept_round)
        notify("connect", 1, 1)
        announce(links, AGGREGATOR, hospitals)
        waits = (config.training.rounds + 2) * len(hospitals)  # one for each plan that it may miss
        while True:
            word = next_word(links, AGGREGATOR, ("plan", "wait"))
            if word["word"] == "wait":
                waits -= 1
                if waits < 0:
                    raise ProtocolError(f"{AGGREGATOR} kept {name} waiting for ever", "it does not follow the protocol")
                links.await_change(1.0)
                announce(links, AGGREGATOR, hospitals)
                continue
            plan = RoundPlan.from_word(word)
            plans.follow(plan, name)
            await_keys(links, plan, config.runtime.connect_timeout)
            if plan.newcomers:
                _begin(hospital, domain, ledger, plan)
            if plan.number > config.training.rounds:
                break
            missed = _round(hospital, domain, ledger, rules, plan, notify)
            plans.behind = missed is not None
            if missed == "left out":
                announce(links, AGGREGATOR, hospitals)
        # Written first: who has signed the end has the model, so a full disk leaves a run that goes on.
        save_model(out / "model.safetensors", hospital.model, config, hospital.normalisation)
        sign_end(ledger, links, plan.hospitals, hospital)
        await_end(links, config.training.rounds)
    write_traffic(links, out)


def _begin(hospital: Hospital, domain: SecretDomain, ledger: RevealLedger, plan: RoundPlan) -> None:
    """Newcomers take the global model, at the start or where the others are; all sign who they are."""
    config, links, out = hospital.config, domain.links, site_directory(hospital.config)
    if hospital.name in plan.newcomers:
        links.set_phase("distribution")
        normalise = config.data.normalise
        receive_model(hospital, links, normalise == "weights" or (normalise == "secure" and plan.number > 0))
        calibrate_own(hospital.model, hospital.train.inputs, config)
        hospital.resume(out, plan.number - 1)
        keep_json_lines(out / "metrics.jsonl", lambda line: line["round"] < plan.number)
    begin_ledger(ledger, links, config, plan.hospitals, plan.resumed)
    if hospital.name in plan.newcomers and plan.number > 0:
        require_signed_model(ledger, plan.number - 1, hospital.digests)


def _round(
    hospital: Hospital, domain: SecretDomain, ledger: RevealLedger, rules: Rules, plan: RoundPlan, notify: Notify
) -> Missed | None:
    """A round, or what comes before the first one; written to this site's own metrics, kept, and signed by all.

    In this order: the aggregator goes on from a round that all have signed, so what is written later may be lost.
    """
    out, about = site_directory(hospital.config), f"round {plan.number}"
    if plan.number == 0:
        hospital_preparation(hospital, domain, rules, plan.hospitals)
        if hospital_evaluation(hospital, domain, rules, plan.hospitals, plan) is None:
            return "left out"
    else:
        result = hospital_round(hospital, domain, rules, plan, notify)
        if isinstance(result, str):
            return result
        append_json_line(out / "metrics.jsonl", result)
    hospital.checkpoint(out, plan.number)
    sign_round(ledger, domain.links, rules, about, hospital.digests)
    return None
