"""The aggregator: leads the rounds, holds a share, learns the opened mean update and nothing about one hospital."""

from __future__ import annotations

import time

from mpc_fl.audit_trail import begin_ledger, sign_end, sign_round
from mpc_fl.config import AGGREGATOR, Config, party_names
from mpc_fl.crypten_runtime import CrypTenRuntime
from mpc_fl.federation import (
    Notify,
    aggregator_evaluation,
    aggregator_round,
    announce_end,
    prepare_aggregator,
    send_initial_model,
)
from mpc_fl.files import append_json_line
from mpc_fl.membership import connect, open_ledger, site_directory, write_traffic
from mpc_fl.opening import SecretDomain
from mpc_fl.transport import Observer
from mpc_fl.weights import save_model


def run(config: Config, rank: int, notify: Notify, observer: Observer | None = None) -> None:
    """Take part in a training run until its last round; write model, metrics and opening record to `site.out`."""
    out = site_directory(config)
    aggregator = prepare_aggregator(config)
    links = connect(config, AGGREGATOR, observer)
    with links, CrypTenRuntime(links, party_names(config), None, config.aggregation.fraction_bits) as runtime:
        ledger = open_ledger(config, AGGREGATOR)
        domain = SecretDomain(runtime, ledger)
        notify("connect", 1, 1)
        begin_ledger(ledger, links, config)
        links.set_phase("distribution")
        send_initial_model(aggregator.model, links)
        evaluation = aggregator_evaluation(config, domain, 0)
        sign_round(ledger, links, config, 0, aggregator.model)
        append_json_line(out / "metrics.jsonl", {"round": 0, "evaluation": evaluation.to_json(), "seconds": 0.0})
        for number in range(1, config.training.rounds + 1):
            began = time.monotonic()
            evaluation = aggregator_round(aggregator, domain, number, notify)
            sign_round(ledger, links, config, number, aggregator.model)
            line = {"round": number, "evaluation": evaluation.to_json(), "seconds": time.monotonic() - began}
            append_json_line(out / "metrics.jsonl", line)
        sign_end(ledger, links, config, aggregator.model)
        save_model(out / "model.safetensors", aggregator.model, config)
        announce_end(links, config.training.rounds)
    write_traffic(links, out)
