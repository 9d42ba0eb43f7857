"""The model owner: second party of encrypted inference. It never sees an image, an activation or a prediction."""

from __future__ import annotations

from mpc_fl.config import Config
from mpc_fl.crypten_runtime import CrypTenRuntime
from mpc_fl.diagnosis import answer, private_graph
from mpc_fl.errors import ConfigError
from mpc_fl.federation import Notify
from mpc_fl.membership import connect, site_directory, write_traffic
from mpc_fl.opening import OpeningRecord, SecretDomain
from mpc_fl.transport import Observer
from mpc_fl.weights import load_model

NAME = "model-owner"


def run(config: Config, rank: int, notify: Notify, observer: Observer | None = None) -> None:
    """Share the weights and compute on shares until the hospital has asked about its last image."""
    out = site_directory(config)
    if config.site.model is None:
        raise ConfigError("site.model is not set", "give the path of a model.safetensors with --model")
    graph = private_graph(config, load_model(config.site.model, config))
    notify("load model", 1, 1)
    links = connect(config, NAME, observer)
    bits, ahead = config.inference.fraction_bits, config.runtime.dealer_ahead_bytes
    with links, CrypTenRuntime(links, ["hospital-0", NAME], "dealer", bits, ahead) as runtime:
        domain = SecretDomain(runtime, OpeningRecord(out / "openings.jsonl", NAME))
        notify("connect", 1, 1)
        answer(config, graph, domain)
    write_traffic(links, out)
