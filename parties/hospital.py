"""A hospital: trains on its own patients, shares masked updates; or asks for an encrypted diagnosis of its images."""

from __future__ import annotations

from mpc_fl.audit_trail import begin_ledger, sign_end, sign_round
from mpc_fl.config import Config, party_names
from mpc_fl.crypten_runtime import CrypTenRuntime
from mpc_fl.data import load_hospital, load_images
from mpc_fl.diagnosis import ask, public_graph, write_results
from mpc_fl.federation import (
    Notify,
    await_end,
    hospital_evaluation,
    hospital_round,
    join,
    receive_initial_model,
)
from mpc_fl.files import append_json_line
from mpc_fl.membership import connect, open_ledger, site_directory, write_traffic
from mpc_fl.opening import OpeningRecord, SecretDomain
from mpc_fl.privacy import PrivacyLedger
from mpc_fl.training_group import training_group
from mpc_fl.transport import Observer
from mpc_fl.weights import save_model


def run(config: Config, rank: int, notify: Notify, observer: Observer | None = None) -> None:
    """Take part in the configured task as hospital `rank`."""
    if config.task == "train":
        train(config, rank, notify, observer)
    else:
        diagnose(config, notify, observer)


def train(config: Config, rank: int, notify: Notify, observer: Observer | None = None) -> None:
    """Train until the last round; write this site's own metrics, opening record and the final global model."""
    out, name = site_directory(config), f"hospital-{rank}"
    patients, held_out = load_hospital(config, rank, "train"), load_hospital(config, rank, "test")
    notify("load data", 1, 1)
    directory = config.site.privacy_ledger or out
    hospital = join(config, rank, patients, held_out, PrivacyLedger(directory / f"{name}-privacy.json", name))
    links = connect(config, name, observer)
    with (
        training_group(config, hospital.model) as hospital.group,
        links,
        CrypTenRuntime(links, party_names(config), None, config.aggregation.fraction_bits) as runtime,
    ):
        ledger = open_ledger(config, name)
        domain = SecretDomain(runtime, ledger)
        notify("connect", 1, 1)
        begin_ledger(ledger, links, config)
        links.set_phase("distribution")
        receive_initial_model(hospital, links)
        hospital_evaluation(hospital, domain, 0)
        sign_round(ledger, links, config, 0, hospital.model)
        for number in range(1, config.training.rounds + 1):
            metrics = hospital_round(hospital, domain, number, notify)
            sign_round(ledger, links, config, number, hospital.model)
            append_json_line(out / "metrics.jsonl", metrics)
        sign_end(ledger, links, config, hospital.model)
        await_end(links, config.training.rounds)
        save_model(out / "model.safetensors", hospital.model, config)
    write_traffic(links, out)


def diagnose(config: Config, notify: Notify, observer: Observer | None = None) -> None:
    """Get class probabilities for this hospital's images; neither image nor result leaves it in the clear."""
    out, name = site_directory(config), "hospital-0"
    images = load_images(config.site.images, config, config.inference.limit)
    graph = public_graph(config)
    notify("load data", 1, 1)
    links = connect(config, name, observer)
    world = [name, "model-owner"]
    bits, ahead = config.inference.fraction_bits, config.runtime.dealer_ahead_bytes
    with links, CrypTenRuntime(links, world, "dealer", bits, ahead) as runtime:
        domain = SecretDomain(runtime, OpeningRecord(out / "openings.jsonl", name))
        notify("connect", 1, 1)
        results = ask(config, graph, images, domain, notify)
    write_results(config, images, results, out)
    write_traffic(links, out)
