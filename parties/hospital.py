"""A hospital: trains on its own patients, shares masked updates; or asks for an encrypted diagnosis of its images."""

from __future__ import annotations

from dataclasses import replace

from mpc_fl.aggregation.rules import Missed, Rules
from mpc_fl.aggregation.words import next_word
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.config.config import Config, party_names
from mpc_fl.errors import RefusedError
from mpc_fl.federation.attendance import RoundPlan, announce, await_end, await_keys
from mpc_fl.federation.audit_trail import begin_ledger, open_ledger, sign_end, sign_round
from mpc_fl.federation.hospital_round import hospital_round
from mpc_fl.federation.hospital_state import Hospital, join
from mpc_fl.federation.planning import calibrate_own, sum_rules, training_runtime
from mpc_fl.federation.preparation import hospital_preparation, receive_model
from mpc_fl.federation.secure_evaluation import hospital_evaluation
from mpc_fl.files import append_json_line, keep_json_lines
from mpc_fl.inference.diagnosis import request_diagnoses, require_supported
from mpc_fl.inference.fast.diagnosis import fill_pool
from mpc_fl.inference.results import write_results
from mpc_fl.inference.serving.client import ask_service, fill_from_service, links_to_service
from mpc_fl.inference.serving.visits import Visit
from mpc_fl.learning.data.loading import load_hospital, load_images
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.learning.training.process_group import training_group
from mpc_fl.links.links import Observer
from mpc_fl.links.party_links import connect, site_directory, write_traffic
from mpc_fl.progress import Notify
from mpc_fl.roles import AGGREGATOR, HOSPITAL, hospital_name
from mpc_fl.sharing.opening import SecretDomain


def run(config: Config, rank: int, notify: Notify, observer: Observer | None = None) -> None:
    """Take part in the configured task as hospital `rank`."""
    if config.task == "train":
        train(config, rank, notify, observer)
    elif config.task == "serve" and config.inference.fill:
        fill_from_server(config, hospital_name(rank), notify, observer)
    elif config.task == "serve":
        ask(config, hospital_name(rank), notify, observer)
    elif config.inference.fill:
        fill(config, notify, observer)
    else:
        diagnose(config, notify, observer)


def train(config: Config, rank: int, notify: Notify, observer: Observer | None = None) -> None:
    """Train until the last round; write this site's own metrics, opening record and the final global model."""
    out, name, rules = site_directory(config), hospital_name(rank), sum_rules(config)
    hospitals = tuple(party for party in party_names(config) if party != AGGREGATOR)
    patients, held_out = load_hospital(config, rank, "train"), load_hospital(config, rank, "test")
    notify("load data", 1, 1)
    privacy_ledger = PrivacyLedger((config.site.privacy_ledger or out) / f"{name}-privacy.json", name)
    hospital = join(config, rank, patients, held_out, privacy_ledger, out)
    links = connect(config, name, observer)
    with (
        training_group(config, hospital.model) as hospital.group,
        links,
        training_runtime(links, config) as runtime,
    ):
        ledger = open_ledger(config, name)
        domain = runtime.domain(ledger)
        notify("connect", 1, 1)
        announce(links, AGGREGATOR, hospitals)
        while True:
            word = next_word(links, AGGREGATOR, ("plan", "wait"))
            if word["word"] == "wait":
                links.await_change(1.0)
                announce(links, AGGREGATOR, hospitals)
                continue
            plan = RoundPlan.from_word(word)
            await_keys(links, plan, config.runtime.connect_timeout)
            if plan.newcomers:
                _begin(hospital, domain, ledger, plan)
            if plan.number > config.training.rounds:
                break
            if _round(hospital, domain, ledger, rules, plan, notify) == "left out":
                announce(links, AGGREGATOR, hospitals)
        sign_end(
            ledger, links, config, plan.hospitals, hospital.model, hospital.shared_parameters, hospital.normalisation
        )
        await_end(links, config.training.rounds)
        save_model(out / "model.safetensors", hospital.model, config, hospital.normalisation)
    write_traffic(links, out)


def _begin(hospital: Hospital, domain: SecretDomain, ledger: RevealLedger, plan: RoundPlan) -> None:
    """Newcomers take the global model, at the start or where the others are; all sign who they are."""
    config, links, out = hospital.config, domain.links, site_directory(hospital.config)
    if hospital.name in plan.newcomers:
        links.set_phase("distribution")
        receive_model(hospital, links, config.data.normalise == "secure" and plan.number > 0)
        calibrate_own(hospital.model, hospital.train.inputs, config)
        hospital.resume(out, plan.number - 1)
        keep_json_lines(out / "metrics.jsonl", lambda line: line["round"] < plan.number)
    begin_ledger(ledger, links, config, plan.hospitals, plan.resumed)


def _round(
    hospital: Hospital, domain: SecretDomain, ledger: RevealLedger, rules: Rules, plan: RoundPlan, notify: Notify
) -> Missed | None:
    """A round, or what comes before the first one; written to this site's own metrics, kept, and signed by all.

    In this order: the aggregator goes on from a round that all have signed, so what is written later may be lost.
    """
    out, about = site_directory(hospital.config), f"round {plan.number}"
    if plan.number == 0:
        hospital_preparation(hospital, domain, rules, plan.hospitals)
        hospital_evaluation(hospital, domain, rules, plan.hospitals, 0, plan.attempt)
    else:
        result = hospital_round(hospital, domain, rules, plan, notify)
        if isinstance(result, str):
            return result
        append_json_line(out / "metrics.jsonl", result)
    hospital.checkpoint(out, plan.number)
    sign_round(ledger, domain.links, about, hospital.shared_parameters)
    return None


def diagnose(config: Config, notify: Notify, observer: Observer | None = None) -> None:
    """Get class probabilities for this hospital's images; neither image nor result leaves it in the clear."""
    out, name = site_directory(config), HOSPITAL
    images = load_images(config.site.images, config, config.inference.limit)
    require_supported(config)
    notify("load data", 1, 1)
    links = connect(config, name, observer)
    with links:
        notify("connect", 1, 1)
        results = request_diagnoses(config, images, links, OpeningRecord(out / "openings.jsonl", name), notify)
    write_results(config, images, results, out)
    write_traffic(links, out)


def ask(config: Config, name: str, notify: Notify, observer: Observer | None = None) -> None:
    """Get class probabilities for this hospital's images from a model owner that stays up.

    Raises `RefusedError`, which says when to come back, once what was answered until then is written.
    """
    out = site_directory(config)
    images = load_images(config.site.images, config, config.inference.limit)
    require_supported(config)
    notify("load data", 1, 1)
    links = links_to_service(config, Visit(name), observer)
    with links:
        notify("connect", 1, 1)
        results, refusal = ask_service(config, images, links, OpeningRecord(out / "openings.jsonl", name), notify)
    count = len(results)
    answered = replace(
        images,
        inputs=images.inputs[:count],
        labels=images.labels[:count],
        patients=images.patients[:count],
        names=images.names[:count],
    )
    write_results(config, answered, results, out)
    write_traffic(links, out)
    if refusal is not None:
        raise RefusedError(f"{count} of {len(images)} images were answered; {refusal.what}", refusal.fix)


def fill(config: Config, notify: Notify, observer: Observer | None = None) -> None:
    """Store correlations for diagnoses to come in this hospital's pool; it takes no image."""
    out, name = site_directory(config), HOSPITAL
    require_supported(config)
    links = connect(config, name, observer)
    with links:
        notify("connect", 1, 1)
        fill_pool(config, links, OpeningRecord(out / "openings.jsonl", name), notify)
    write_traffic(links, out)


def fill_from_server(config: Config, name: str, notify: Notify, observer: Observer | None = None) -> None:
    """The same with a model owner that stays up; raises `RefusedError` when it keeps no more for this hospital."""
    out = site_directory(config)
    require_supported(config)
    links = links_to_service(config, Visit(name, "fill"), observer)
    with links:
        notify("connect", 1, 1)
        fill_from_service(config, links, OpeningRecord(out / "openings.jsonl", name), notify)
    write_traffic(links, out)
